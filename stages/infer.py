"""Stage infer@base: the base answers the test split. It depends on neither LoRA nor training."""

from pipeline.core import params, paths
from pipeline.infer import infer
from pipeline.model import processes


def main(declared: params.Declared) -> None:
    infer.decode("base", declared[params.Prompt], declared[params.Generation], declared[params.Runtime])


if __name__ == "__main__":
    processes.run("infer", main, result=paths.predictions("base"))
