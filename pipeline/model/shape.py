"""The shape of a model: its sizes, from which parameters and memory are counted (`pipeline.model.memory`).

A recipe states it for a model that is not here to ask; a checkpoint in the hub's layout has it in `config.json`.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from pipeline.core import params
from pipeline.core.errors import UserError

Positive = Annotated[int, Field(ge=1)]

SWITCHED = ("qwen2", "qwen3", "smollm3")
"""Families whose sliding window is on only where `use_sliding_window` says so; others slide wherever one is named."""


class Shape(params.Section):
    """The sizes of a model of LLaMA's kind: attention with grouped heads, and an MLP with a gate."""

    family: str
    layers: Positive
    hidden_size: Positive
    intermediate_size: Positive
    attention_heads: Positive
    key_value_heads: Positive
    head_dim: Positive
    vocabulary: Positive
    tied_embeddings: bool
    context: Positive

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The shape of a checkpoint in the hub's layout."""
        return cls.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))

    @classmethod
    def of(cls, config: dict[str, Any]) -> Self:
        """The shape that a configuration of transformers describes."""
        config = config.get("text_config", config)
        heads = config["num_attention_heads"]
        return cls(
            family=config["model_type"],
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            attention_heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            context=context(config),
        )

    @property
    def queries(self) -> int:
        """Outputs of the query projection."""
        return self.attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.key_value_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads for each key-value head."""
        return self.attention_heads // self.key_value_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The number of inputs and of outputs of each linear layer of a block."""
        h, i, a, k = self.hidden_size, self.intermediate_size, self.queries, self.keys
        if self.family == "phi3":
            return {"qkv_proj": (h, a + 2 * k), "o_proj": (a, h), "gate_up_proj": (h, 2 * i), "down_proj": (i, h)}
        return {
            **{"q_proj": (h, a), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (a, h)},
            **{"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)},
        }

    def names(self, block: int) -> dict[str, str]:
        """The full name, as in transformers, of each linear layer of a block (from 0)."""
        parts = {
            name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj") else "mlp"
            for name in self.linears
        }
        return {name: f"model.layers.{block}.{part}.{name}" for name, part in parts.items()}

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Parameters of embeddings, head and norms, which are never quantized."""
        embeddings = self.vocabulary * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + (2 * self.layers + 1) * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def require_groups(self, group_size: int) -> None:
        """UserError if groups of this many weights do not fill the rows of every linear layer."""
        odd = sorted({inputs for inputs, _ in self.linears.values() if inputs % group_size})
        if odd:
            raise UserError(
                f"quantize.group_size = {group_size} does not divide {' and '.join(map(str, odd))}, the inputs of "
                "linear layers of this model: take a smaller one that does, or quantize.method nf4"
            )


def context(config: dict[str, Any]) -> int:
    """Tokens of the longest sequence that is computed faithfully, by a whole configuration of transformers.

    Packing and decoding know no sliding window, so it ends there. It also ends where longrope (Phi 3, arXiv 2404.14219)
    changes its frequencies, since one long sequence would change them for its whole batch.
    """
    slides = config["model_type"] not in SWITCHED or config.get("use_sliding_window")
    window = config.get("sliding_window") if slides else None
    rotation = config.get("rope_parameters") or {}
    short = rotation["original_max_position_embeddings"] if rotation.get("rope_type") == "longrope" else None
    longest: int = min(length for length in (config["max_position_embeddings"], window, short) if length)
    return longest
