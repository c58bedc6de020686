"""Stage infer-shots: the base answers rows of the split with demonstrations from the training split in its prompts."""

from pipeline.core import params, paths
from pipeline.infer import infer
from pipeline.model import processes


def main(declared: params.Declared) -> None:
    prompt, generation, runtime = declared[params.Prompt], declared[params.Generation], declared[params.Runtime]
    infer.decode_shots(declared[params.Baseline], prompt, generation, runtime, declared.split)


if __name__ == "__main__":
    processes.run("infer-shots", main, result=paths.predictions(paths.SHOTS))
