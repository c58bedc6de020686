"""Stage evaluate-shots: what the base with demonstrations wrote is scored."""

from pipeline.core import params, paths, stage
from pipeline.score import evaluate


def main(declared: params.Declared) -> None:
    evaluate.score_baseline(paths.SHOTS, declared[params.Evaluate], declared.value("baseline.rows"))


if __name__ == "__main__":
    stage.run("evaluate-shots", main)
