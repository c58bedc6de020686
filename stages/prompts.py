"""Stage prompts: validation and test prompts fit the model. Otherwise nothing is computed with it."""

from pipeline import prompts
from pipeline.core import params, stage


def main(declared: params.Declared) -> None:
    new_tokens = declared.number("generation.max_new_tokens")
    prompts.require_fitting(declared[params.Prompt], new_tokens, declared[params.Baseline], declared.split)


if __name__ == "__main__":
    stage.run("prompts", main)
