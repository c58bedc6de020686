"""A finished experiment with known scores, in the places where its stages would have written it."""

import random
from dataclasses import asdict, replace
from typing import Any

from pipeline.core import paths, records
from pipeline.core.params import Compare, Evaluate
from pipeline.core.records import Decoding, Example, Prediction
from pipeline.score import compare
from pipeline.score import evaluate as scores
from pipeline.score.compare import Comparison

EVALUATE = Evaluate(
    metrics=["rouge1", "rouge2", "rougeL"],
    use_stemmer=False,
    rouge_tokenizer="latin",
    bleu_tokenizer="13a",
    language=None,
)
COMPARE = Compare(
    bootstrap_samples=2000,
    confidence=0.95,
    seed=17,
    decide_by=["rouge1", "rouge2"],
    examples=3,
    explorer=100,
    published=[],
)
ASPECTS = ("challenge", "approach")
WORDS = [f"w{i}" for i in range(18)]


def example(name: str, group: str, aspect: str, source: str, target: str, lead: str) -> Example:
    return Example(name, group, aspect, source, target, lead, [target])


def examples(n_groups: int = 12) -> list[Example]:
    rng = random.Random(1)
    return [
        example(f"p{i}/{aspect}", f"p{i}", aspect, "source text", " ".join(rng.sample(WORDS, 8)), "alpha beta")
        for i in range(n_groups)
        for aspect in ASPECTS
    ]


def plant(rows: list[Example], keep: dict[str, float], evaluate: Evaluate = EVALUATE, **change: Any) -> None:
    """Score variants in the current folder that keep a share of each reference's words; `change` alters the tuned."""
    records.write_rows(paths.split("test"), rows)
    for seed, (variant, share) in enumerate(keep.items()):
        rng = random.Random(seed)
        texts = [" ".join(w if rng.random() < share else "noise" for w in row.target.split()) for row in rows]
        records.write_rows(
            paths.predictions(variant),
            [Prediction(row.id, "", 9, text, 9, "stop") for row, text in zip(rows, texts, strict=True)],
        )
        adapter = None if variant == "base" else f"{seed}" * 64
        decoding = Decoding(
            variant, "a" * 64, "b" * 64, adapter, {"num_beams": 1, "top_k": 50}, "cpu", 2, "float32", {}
        )
        if variant != "base":
            decoding = replace(decoding, **change)
            trained = int(variant.removeprefix("tuned-"))
            records.write_json(paths.training_summary(trained), training(trained))
            records.write_json(paths.forgetting(trained), {"source": None})
        records.write_json(paths.decoding(variant), asdict(decoding))
        scores.evaluate(variant, evaluate)


def training(seed: int, **change: Any) -> dict[str, Any]:
    """What a training of two epochs leaves: the lowest validation loss after the first."""
    return {
        "seed": seed,
        "trainable_parameters": 1000,
        "adapter_bytes": 4200,
        "validation": [{"step": 0, "loss": 3.5}, {"step": 4, "loss": 2.5}, {"step": 8, "loss": 2.6}],
        "steps": 8,
        "planned_steps": 8,
        "epochs": 2.0,
        "best_loss": 2.5,
        "best_epoch": 1.0,
        "kept_loss": 2.6,
        "kept_epoch": 2.0,
        "training_loss": 2.1,
        "gap": 0.5,
    } | change


def compared(*seeds: int, compare_by: Compare = COMPARE) -> Comparison:
    return compare.compare(seeds or (17,), EVALUATE, compare_by)
