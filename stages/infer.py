"""Stage infer@base: what the base writes for the test split. Depends on nothing of LoRA or training."""

from pipeline.core import params, paths
from pipeline.infer import infer
from pipeline.model import processes


def main(declared: params.Declared) -> None:
    infer.decode("base", declared[params.Prompt], declared[params.Generation], declared[params.Runtime])


if __name__ == "__main__":
    processes.run("infer", main, result=paths.predictions("base"))
