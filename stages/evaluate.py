"""Stage evaluate@base: the base's predictions are scored."""

from pipeline.core import params, paths, stage
from pipeline.score import evaluate

if __name__ == "__main__":
    stage.run("evaluate", lambda declared: evaluate.score_variant(paths.variant(None), declared[params.Evaluate]))
