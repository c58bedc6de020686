"""A checkpoint of a model, in the hub's layout: the facts of its architecture, its tokenizer, and its weights as they
are.

LLaMA (RMSNorm, rotary embeddings, SwiGLU; arXiv 2302.13971) and its relatives with grouped-query attention (Llama 2,
arXiv 2307.09288) are what transformers' causal language models of the same make cover.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import paths, records
from pipeline.core.contracts import Architecture
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import torch


MOST_LAYERS = 1000
"""Of a model that is fetched; the largest that are published have less than 200."""


def architecture(model: Any) -> Architecture:
    """The facts of a model's architecture; `kv_bytes_per_token` counts keys and values of all layers."""
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Architecture(
        family=config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        attention_heads=heads,
        key_value_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        context=_context(config),
        tied_embeddings=bool(config.tie_word_embeddings),
        dtype=str(model.dtype).removeprefix("torch."),
        linear_layers=linear_layers(model),
        kv_bytes_per_token=2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize,
        stop_ids=stop_ids(model),
    )


def _context(config: Any) -> int:
    """Tokens of the longest sequence.

    No longer than a sliding window, since packing and decoding know of none; nor than the length from which on longrope
    (Phi 3, arXiv 2404.14219) turns by other frequencies, since one long sequence would change them for its whole batch.
    """
    slides = getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) if slides else None
    rotation = getattr(config, "rope_parameters", None) or {}
    short = rotation["original_max_position_embeddings"] if rotation.get("rope_type") == "longrope" else None
    longest: int = min(length for length in (config.max_position_embeddings, window, short) if length)
    return longest


def linear_layers(model: Any) -> list[str]:
    """Names (last part) of all linear layers but the head: what `all-linear` adapts, and what is quantized."""
    import torch

    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    }
    return sorted(names)


def stop_ids(model: Any) -> list[int]:
    """The tokens at which the model's authors let decoding stop; the one thing taken from its generation config."""
    ids = model.generation_config.eos_token_id
    ids = model.config.eos_token_id if ids is None else ids
    return sorted([ids] if isinstance(ids, int) else ids or [])


def tokenizer(folder: Path = paths.QUANTIZED) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def pretrained(folder: Path, device: "torch.device | None", **options: Any) -> Any:
    """A checkpoint in evaluation mode on `device`, or where `options` have it, with the attention that packed sequences
    and decoding rely on."""
    from transformers import AutoModelForCausalLM

    from pipeline.model import attention

    return AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=device and {"": device},
        attn_implementation=attention.NAME,
        trust_remote_code=False,
        **options,
    )


def require_intact(folder: Path, sha256: str) -> None:
    """UserError unless the files of a checkpoint have this digest, which its facts hold."""
    if records.sha256_tree(folder) != sha256:
        raise UserError(
            f"{folder} is not what its stage wrote: it has changed on the disk, or in DVC's cache, from where it came; "
            "`lora-repro verify` says where, and what mends it"
        )
