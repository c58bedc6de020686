"""Stage evaluate@base: the base's predictions scored."""

from pipeline import params, paths, scores, stage

if __name__ == "__main__":
    stage.run("evaluate", lambda declared: scores.evaluate(paths.variant(None), declared[params.Evaluate]))
