"""A finished experiment with known scores, in the places where its stages would have written it."""

import random
from dataclasses import replace
from typing import Any

from pipeline.core import contracts, paths, records
from pipeline.core.contracts import Contamination, Forgetting, Scores, Skipped
from pipeline.core.params import Compare, Evaluate
from pipeline.core.records import Example, Prediction
from pipeline.score import baselines, compare
from pipeline.score.comparison import Comparison
from pipeline.score.evaluate import score_variant
from tests.made.records import data_card, decoding, quantized_facts, training

EVALUATE = Evaluate(
    split="test",
    metrics=["rouge1", "rouge2", "rougeL"],
    use_stemmer=False,
    rouge_tokenizer="latin",
    bleu_tokenizer="13a",
    bertscore=None,
    normal_form="NFC",
    language=None,
)
COMPARE = Compare(
    bootstrap_samples=2000,
    confidence=0.95,
    seed=17,
    decide_by=["rouge1", "rouge2"],
    margin=None,
    examples=3,
    explorer=100,
    published=[],
)
GENERATION = {"num_beams": 1, "top_k": 50, "batch_size": 4, "backend": "transformers"}
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
    records.write_rows(paths.split("train"), [replace(row, id=f"t-{row.id}", group=f"t-{row.group}") for row in rows])
    contracts.write(paths.DATA_CARD, data_card())
    contracts.write(paths.QUANTIZED_FACTS, quantized_facts())
    contracts.write(paths.CONTAMINATION, Contamination("b" * 64, not_tested="contamination.shards is 0"))
    for variant in baselines.VARIANTS:
        contracts.write(paths.decoding(variant), Skipped(variant, "baseline.shots is 0"))
        contracts.write(paths.scores(variant), Skipped(variant, "baseline.shots is 0"))
        records.write_rows(paths.predictions(variant), [])
    for seed, (variant, share) in enumerate(keep.items()):
        rng = random.Random(seed)
        texts = [" ".join(w if rng.random() < share else "noise" for w in row.target.split()) for row in rows]
        records.write_rows(
            paths.predictions(variant),
            [Prediction(row.id, "", 9, text, 9, "stop") for row, text in zip(rows, texts, strict=True)],
        )
        adapter = None if variant == "base" else f"{seed}" * 64
        conditions = decoding(variant, adapter_sha256=adapter, generation=GENERATION)
        if variant != "base":
            conditions = replace(conditions, **change)
            trained = int(variant.removeprefix("tuned-"))
            contracts.write(paths.training_summary(trained), training(trained))
            contracts.write(paths.forgetting(trained), Forgetting(trained, "b" * 64, "c" * 64, []))
        contracts.write(paths.decoding(variant), conditions)
        score_variant(variant, evaluate)


def scores_of(variant: str) -> Scores:
    return contracts.read(paths.scores(variant), Scores)


def compared(*seeds: int, compare_by: Compare = COMPARE) -> Comparison:
    return compare.compare_variants(seeds or (17,), EVALUATE, compare_by)
