"""What stages leave as JSON (`pipeline.core.contracts`), with plausible values; a test changes what it is about."""

from dataclasses import replace
from typing import Any

from pipeline.core.contracts import (
    BaseFacts,
    DataCard,
    Overlap,
    QuantizedFacts,
    Scores,
    Split,
    TrainingSummary,
    Validation,
    Words,
)
from pipeline.core.records import Decoding, Encoded


def data_card(**change: Any) -> DataCard:
    words = Words(1, 2.0, 3)
    split = Split(["a.jsonl"], 300, 300, 100, {"approach": 300}, words, words, {}, 0, 0, {})
    splits = dict.fromkeys(("train", "validation", "test"), split)
    return replace(DataCard("pip:a==1/x", None, splits, {"train in test": Overlap(0, 0)}), **change)


def base_facts(**change: Any) -> BaseFacts:
    """Of the tiny model of the tests (`tiny_model`), in float32."""
    made = BaseFacts(
        family="llama",
        parameters=134515008,
        layers=2,
        hidden_size=64,
        intermediate_size=128,
        attention_heads=4,
        key_value_heads=2,
        head_dim=16,
        vocabulary=512,
        context=512,
        tied_embeddings=True,
        dtype="float32",
        linear_layers=["q_proj"],
        kv_bytes_per_token=512,
        stop_ids=[1],
        source="pip:m==1/m.gguf",
        sha256="e" * 64,
    )
    return replace(made, **change)


def quantized_facts(**change: Any) -> QuantizedFacts:
    made = QuantizedFacts(
        method="nf4",
        double_quantization=True,
        bits_per_parameter=4.127,
        quantized_layers=14,
        layers={"model.layers.0.mlp.up_proj": 0.09},
        perplexity_before=10.0,
        perplexity_after=11.0,
        perplexity_tokens=4096,
        perplexity_window=256,
        perplexity_bos=False,
        bytes=1000,
        sha256="b" * 64,
        context=512,
        dtype="bfloat16",
        stop_ids=[1],
    )
    return replace(made, **change)


def training(seed: int, **change: Any) -> TrainingSummary:
    """A training of two epochs, whose validation loss was the lowest after the first."""
    made = TrainingSummary(
        seed=seed,
        device="cpu",
        threads=2,
        attention="torch's",
        rows=300,
        dropped=0,
        validation_rows=150,
        steps=8,
        planned_steps=8,
        epochs=2.0,
        stopped_early=False,
        prompts_checked=450,
        encoded={"train": encoded(300), "validation": encoded(150)},
        shortest_answer=14,
        repacked_layers=0,
        largest_grad_norm=1.5,
        trainable_parameters=1000,
        adapter_bytes=4200,
        supervised_tokens=8000,
        tokens=32000,
        final_loss=2.5,
        validation=[Validation(0, 3.5), Validation(4, 2.5), Validation(8, 2.6)],
        best_step=4,
        best_epoch=1.0,
        best_loss=2.5,
        kept_step=8,
        kept_epoch=2.0,
        kept_loss=2.6,
        training_loss=2.1,
        training_loss_rows=150,
        gap=0.5,
        logit_change=38.0,
    )
    return replace(made, **change)


def encoded(examples: int, **change: int) -> Encoded:
    return replace(Encoded(examples, controls=0, cut=0, lost=0, thoughts=0), **change)


def decoding(variant: str, **change: Any) -> Decoding:
    generation = {"num_beams": 1, "top_k": 50, "batch_size": 4, "backend": "transformers"}
    recheck = {"examples": 1, "identical": 1}
    made = Decoding(variant, "a" * 64, "b" * 64, None, generation, "cpu", 2, "float32", recheck, False, encoded(300))
    return replace(made, **change)


def scores(variant: str, **change: Any) -> Scores:
    """One variant's scores in ROUGE-1, of no rows."""
    made = Scores(
        variant=variant,
        signature="rouge-score 0.1.2|F1x100",
        test_sha256="d" * 64,
        n=2,
        groups=2,
        corpus={"rouge1": 10.0},
        words=20.0,
        reference_words=22.0,
        stopped_by_cap=0.0,
        empty=0.0,
        copied=0.0,
        thoughts=0,
        in_language=None,
        references_in_language=None,
        decoding=decoding(variant),
        examples=[],
        statistics={},
    )
    return replace(made, **change)
