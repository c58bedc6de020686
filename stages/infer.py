"""Stage infer@base: what the base writes for the test split. Depends on nothing of LoRA or training."""

from pipeline import generate, params, paths, stage


def main(declared: params.Declared) -> None:
    generate.infer("base", declared[params.Prompt], declared[params.Generation], declared[params.Runtime])


if __name__ == "__main__":
    stage.run("infer", main, result=paths.predictions("base"))
