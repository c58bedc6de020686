"""Stages evaluate@base and evaluate-tuned@<seed>: one variant's predictions scored."""

import argparse

from pipeline import params, scores, stage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", required=True, help="base or tuned-<seed>")
    variant = parser.parse_args().variant
    name = "evaluate" if variant == "base" else "evaluate-tuned"
    stage.run(name, lambda declared: scores.evaluate(variant, declared[params.Evaluate]))
