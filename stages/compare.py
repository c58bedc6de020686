"""Stage compare: base against tuned on the same rows; writes what people read."""

from pipeline import compare, guards, params, plots, report, stage


def main(declared: params.Declared) -> None:
    comparison = compare.compare(declared.seeds, declared[params.Evaluate], declared[params.Compare])
    report.write(comparison, guards.measured(declared.seeds))
    plots.write(comparison, declared.seeds)


if __name__ == "__main__":
    stage.run("compare", main)
