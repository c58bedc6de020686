"""Stage evaluate-tuned@<seed>: one seed's predictions scored."""

from pipeline import params, paths, scores, stage

if __name__ == "__main__":
    seed = stage.seed(__doc__)
    variant = paths.variant(seed)
    stage.run("evaluate-tuned", lambda declared: scores.evaluate(variant, declared[params.Evaluate]), seed=seed)
