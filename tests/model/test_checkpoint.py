"""Facts of an architecture."""

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pipeline.model import checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def test_keys_and_values_are_counted_with_grouped_heads() -> None:
    facts = checkpoint.architecture(LlamaForCausalLM(LlamaConfig(**SIZES)))
    assert (facts.attention_heads, facts.key_value_heads, facts.head_dim) == (4, 2, 4)
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 4 * 4  # keys and values, layers, heads, size, float32
    assert facts.context == 64


@pytest.mark.parametrize(
    ("made", "context"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32)), 32),
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)), 64),
        (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, sliding_window=32, use_sliding_window=False)), 64),
    ],
    ids=["slides", "does not", "switched off"],
)
def test_a_sliding_window_ends_the_context(made: Any, context: int) -> None:
    """Attention of ours sees everything before a token; within the window so does the model's."""
    assert checkpoint.architecture(made()).context == context
