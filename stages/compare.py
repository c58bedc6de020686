"""Stage compare: base and tuned are compared on the same rows, and the comparison becomes reports."""

from pipeline.core import params, stage
from pipeline.report import files
from pipeline.score import compare


def main(declared: params.Declared) -> None:
    compare.write(declared.seeds, declared[params.Evaluate], declared[params.Compare])
    files.write(declared.seeds)


if __name__ == "__main__":
    stage.run("compare", main)
