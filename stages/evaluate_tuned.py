"""Stage evaluate-tuned@<seed>: one seed's predictions are scored."""

from pipeline.core import params, paths, stage
from pipeline.score import evaluate

if __name__ == "__main__":
    seed = stage.seed(__doc__)
    variant = paths.variant(seed)
    stage.run("evaluate-tuned", lambda declared: evaluate.score_variant(variant, declared[params.Evaluate]), seed=seed)
