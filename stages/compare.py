"""Stage compare: base against tuned on the same rows; writes what people read."""

from pipeline import compare, params, report, stage


def main(declared: params.Declared) -> None:
    report.write(compare.compare(declared.seeds, declared[params.Evaluate], declared[params.Compare]))


if __name__ == "__main__":
    stage.run("compare", main)
