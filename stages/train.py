"""Stage train@<seed>: one LoRA adapter is trained on the quantized base."""

from pipeline.core import params, paths, stage
from pipeline.lora import train
from pipeline.model import processes


def main(declared: params.Declared, seed: int) -> None:
    prompt, lora, runtime = declared[params.Prompt], declared[params.Lora], declared[params.Runtime]
    train.fit(seed, prompt, lora, declared[params.Train], runtime)


if __name__ == "__main__":
    seed = stage.seed(__doc__)
    processes.run("train", lambda declared: main(declared, seed), paths.training_summary(seed), seed)
