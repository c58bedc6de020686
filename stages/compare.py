"""Stage compare: base against tuned on the same rows; writes what people read."""

from pipeline.core import params, stage
from pipeline.report import comparison


def main(declared: params.Declared) -> None:
    comparison.write(declared.seeds, declared[params.Evaluate], declared[params.Compare])


if __name__ == "__main__":
    stage.run("compare", main)
