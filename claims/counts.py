"""Claims about numbers of parameters, of models and of adapters, counted on models that have shapes but no values."""

from typing import Any

from claims import evidence
from claims.evidence import Evidence
from pipeline.core import params
from pipeline.lora import adapter, start
from pipeline.model import attention, checkpoint, devices

GPT2_WORDS, GPT2_PLACES = 50_257, 2048
LLAMA_WORDS = 32_000
LLAMA = {"6.7b": (4096, 32, 32), "13.0b": (5120, 40, 40), "32.5b": (6656, 52, 60), "65.2b": (8192, 64, 80)}
"""Width, heads and layers (LLaMA, table 2), by the paper's number of parameters."""
WIDE_OF = 256
"""LLaMA's feed-forward width is 2/3 of 4 times the model's (section 2.2), rounded up to a multiple of this."""
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
QUERY_AND_VALUE = ["q_proj", "v_proj"]
PLAIN: dict[str, Any] = {
    "rslora": False, "dropout": 0.0, "layers": None, "rank_pattern": {}, "alpha_pattern": {}, "dora": False,
    "init": "default", "train_only": None, "plus_ratio": 1, "bias": "none", "modules_to_save": [],
}  # fmt: skip
"""LoRA as its paper has it."""


def lora_gpt3() -> Evidence:
    """Adapters on GPT-3's queries and values, at ranks 1 and 8, and on a model with narrower value layers."""
    devices.quieten()
    values: dict[str, evidence.Value] = {}
    for rank in (1, 8):
        counted = trainable(_gpt(12_288, 96, 96), rank, QUERY_AND_VALUE)
        values[f"gpt3_r{rank}"] = counted
        values[f"gpt3_r{rank}_millions"] = counted / 1e6
        values[f"gpt3_r{rank}_formula"] = formula(12_288, 96, rank)
    values["smollm2_query_value_r4"] = trainable(_llama(SMOLLM2), 4, QUERY_AND_VALUE)
    values["smollm2_query_value_r4_formula"] = formula(576, 30, 4)
    values["smollm2_all_linear_r8"] = trainable(_llama(SMOLLM2), 8, "all-linear")
    return Evidence(
        values,
        [
            "Of SmolLM2's grouped-query attention the formula knows nothing: its value layers are a third as wide, so "
            "rank x (inputs + outputs), summed over the layers, is less than 2 x layers x width x rank."
        ],
    )


def lora_gpt2() -> Evidence:
    """Adapters of rank 4 on the queries and values of GPT-2 medium and large, in the set-up of the paper's table 3."""
    devices.quieten()
    values: dict[str, evidence.Value] = {}
    for name, (width, heads, layers) in {"medium": (1024, 16, 24), "large": (1280, 20, 36)}.items():
        counted = trainable(_gpt(width, heads, layers), 4, QUERY_AND_VALUE)
        values[f"gpt2_{name}"] = counted
        values[f"gpt2_{name}_millions"] = counted / 1e6
        values[f"gpt2_{name}_formula"] = formula(width, layers, 4)
    return Evidence(
        values,
        [
            "With rank 4 on queries and values, the paper's own set-up, its formula gives 0.39M and 0.74M; its table 3 "
            "says 0.35M and 0.77M, one above and one below, so no common factor explains them."
        ],
    )


def llama() -> Evidence:
    """The parameters of models with the widths, heads and layers of LLaMA's table 2."""
    values: dict[str, evidence.Value] = {}
    for name, (width, heads, layers) in LLAMA.items():
        made = _llama(
            {
                "vocab_size": LLAMA_WORDS,
                "hidden_size": width,
                "intermediate_size": WIDE_OF * -(-(8 * width // 3) // WIDE_OF),
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "tie_word_embeddings": False,
            }
        )
        counted = checkpoint.architecture(made).parameters
        values |= {f"llama_{name}": counted, f"llama_{name}_percent_off": 100 * (counted / 1e9 / float(name[:-1]) - 1)}
    return Evidence(values)


def trainable(model: Any, rank: int, targets: list[str] | str) -> int:
    """Parameters of the adapter that training would use."""
    given = PLAIN | {"r": rank, "alpha": rank, "target_modules": targets}
    adapted = start.attach(model, params.Lora.model_validate(given), seed=0)
    return sum(tensor.numel() for tensor in adapter.tensors(adapted).values())


def formula(width: int, layers: int, rank: int) -> int:
    """The paper's count, 2 x adapted matrices x width x rank (section 4.2), with two adapted matrices a layer."""
    return 2 * (2 * layers) * width * rank


def _gpt(width: int, heads: int, layers: int) -> Any:
    """A model of GPT's shapes. OPT keeps queries, keys and values apart; GPT-2 has them in one matrix."""
    from transformers import OPTConfig

    return _empty(
        OPTConfig(
            vocab_size=GPT2_WORDS,
            max_position_embeddings=GPT2_PLACES,
            hidden_size=width,
            word_embed_proj_dim=width,
            ffn_dim=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
    )


def _llama(shapes: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return _empty(LlamaConfig(**shapes))


def _empty(config: Any) -> Any:
    """A model without values."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)


if __name__ == "__main__":
    evidence.main({"lora-params": lora_gpt3, "lora-params-gpt2": lora_gpt2, "llama-architecture": llama})
