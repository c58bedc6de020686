"""Stage variant: the answers of the base, or of the model tuned with one seed, to the test split of a task.

A task is a recipe's whole experiment, on as many rows as `claims/training.yaml` says. The pipeline's own stage
functions train, load and decode. Base and tuned model share the quantized weights.
"""

import argparse
from pathlib import Path

from claims import lab, training
from claims.evidence import OUT
from pipeline.core import params, paths, records, stage
from pipeline.infer import infer
from pipeline.lora import adapter, train

BASE = "base"
"""Stands for the seed of the model that is not tuned."""
PREDICTIONS, DECODING = "predictions.jsonl", "predictions.json"


def folder(task: str, which: str) -> Path:
    """The output of one variant of a task: predictions and how they were decoded, and the adapter if it is tuned."""
    return OUT / "variants" / task / which


def rows(task: str, split: str) -> list[records.Example]:
    """The rows of a split that a task uses."""
    kept = getattr(training.one(training.load().tasks, task, "tasks"), split)
    return training.spread(records.read_rows(lab.data(task) / f"{split}.jsonl", records.Example), kept)


def run(task: str, which: str) -> None:
    """Train the variant, unless it is the base, and decode its answers; UserError for one that is not declared."""
    splits = {split: rows(task, split) for split in paths.SPLITS}
    seeds = {str(seed): seed for seed in training.load().training_seeds}
    seed = None if which == BASE else training.one(seeds, which, "training_seeds")
    experiment = lab.experiment(task)
    method = experiment.quantize.method
    links = {
        paths.QUANTIZED: lab.quantized(method),
        paths.QUANTIZED_FACTS: lab.quantized(method).with_suffix(".json"),
    }
    variant, to = paths.variant(seed), folder(task, which)
    results = {
        paths.predictions(variant): to / PREDICTIONS,
        paths.decoding(variant): to / DECODING,
    }
    if seed is not None:
        results |= {
            paths.adapter(seed): to / "adapter",
            paths.training_summary(seed): to / "training.json",
            paths.training_log(seed): to / "training.csv",
        }
    with lab.lab(f"variant-{task}-{which}", links, results):
        for split, some in splits.items():
            records.write_rows(paths.split(split), some)
        _answer(experiment, seed)


def _answer(experiment: params.Params, seed: int | None) -> None:
    prompt, runtime = experiment.prompt, experiment.runtime
    saved = None
    if seed is not None:
        train.fit(seed, prompt, experiment.lora, experiment.train, runtime)
        saved = adapter.Saved(paths.adapter(seed))
    infer.decode(paths.variant(seed), prompt, experiment.generation, runtime, saved)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("which", help=f"{BASE} or a training seed")
    arguments = parser.parse_args()
    stage.process(
        f"claims-variant-{arguments.task}-{arguments.which}",
        lambda: run(arguments.task, arguments.which),
        result=folder(arguments.task, arguments.which) / PREDICTIONS,
    )
