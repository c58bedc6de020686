"""Stage compare: base against tuned on the same rows; writes what people read."""

from pipeline import appendix, compare, examples, guards, params, plots, report, stage


def main(declared: params.Declared) -> None:
    seeds, evaluate = declared.seeds, declared[params.Evaluate]
    comparison = compare.compare(seeds, evaluate, declared[params.Compare])
    measured = guards.measured(seeds)
    report.write(comparison, measured)
    plots.write(comparison, seeds)
    appendix.write(comparison, measured, examples.read(seeds, evaluate.metrics), seeds)


if __name__ == "__main__":
    stage.run("compare", main)
