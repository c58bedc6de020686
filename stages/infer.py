"""Stage infer@base: the base answers the split that is scored. It depends on neither LoRA nor training."""

from pipeline.core import params, paths
from pipeline.infer import infer
from pipeline.model import processes


def main(declared: params.Declared) -> None:
    prompt, generation, runtime = declared[params.Prompt], declared[params.Generation], declared[params.Runtime]
    infer.decode("base", prompt, generation, runtime, split=declared.split)


if __name__ == "__main__":
    processes.run("infer", main, result=paths.predictions("base"))
