"""A trainer of the tiny model, and what it trains on."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from pipeline.core import params
from pipeline.lora import start, train
from pipeline.model import attention, pack
from pipeline.model.prompt import Row
from tests.made import parameters

LORA = parameters.lora(dropout=0.1)


def section(**changes: Any) -> params.Train:
    base = {
        "epochs": 1,
        "batch_size": 4,
        "micro_batch_tokens": 64,
        "turns": "last",
        "prompt_loss_weight": 0.0,
        "label_smoothing": 0.0,
        "neftune_alpha": 0.0,
        "optimizer": "adamw",
        "learning_rate": 1e-2,
        "schedule": "linear",
        "warmup": 0.0,
        "decay": None,
        "weight_decay": 0.0,
        "beta2": 0.999,
        "max_grad_norm": 1.0,
        "max_dropped_share": 0.0,
        "validate_every": 0,
        "early_stopping": 0,
    }
    return params.Train.model_validate(base | changes)


def some_trees() -> list[pack.Tree]:
    return pack.trees(
        Row(f"{group}/{n}", str(group), [*range(20, 40 + group), 60 + n], [80 + n] * (n + 1) + [1])
        for group in range(6)
        for n in range(2)
    )


def fresh(folder: Path, lora: params.Lora = LORA) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME).requires_grad_(False)
    return start.attach(base, lora, 7)


def trainer(folder: Path, **changes: Any) -> train.Trainer:
    without_dropout = LORA.model_copy(update={"dropout": 0.0})
    return train.Trainer(fresh(folder, without_dropout), section(**changes), seed=7, steps=10)
