"""Stage train: one LoRA adapter for one seed, on the quantized base."""

import argparse

from pipeline import distributed, params, paths, train


def main(declared: params.Declared, seed: int) -> None:
    prompt, lora, runtime = declared[params.Prompt], declared[params.Lora], declared[params.Runtime]
    train.train(seed, prompt, lora, declared[params.Train], runtime)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    seed = parser.parse_args().seed
    distributed.run("train", lambda declared: main(declared, seed), result=paths.training_summary(seed))
