"""Stage evaluate-unquantized: what the base without quantization wrote is scored."""

from pipeline.core import params, paths, stage
from pipeline.score import evaluate


def main(declared: params.Declared) -> None:
    evaluate.score_baseline(paths.UNQUANTIZED, declared[params.Evaluate], declared.value("baseline.rows"))


if __name__ == "__main__":
    stage.run("evaluate-unquantized", main)
