"""A GGUF file, checked before and after transformers reads it, so that the model computes what the file means."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.fetch import gguf_header
from pipeline.fetch.gguf_header import Header
from pipeline.fetch.unfit import UnfitError, require_few_layers

GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
"""Families that are read from GGUF. transformers does not read the others, or ignores what changes their results."""

MODEL_TYPES = {"gemma3": "gemma3_text"}
"""transformers' names of families that have another name in GGUF."""
HEAD_TENSOR = "output.weight"
"""The output head. A file without it uses the embedding."""

GGUF_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K",
    "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
)  # fmt: skip
"""Types of weights that are read from GGUF. tests/test_fetch.py compares each with what the gguf library reads."""

UNREAD = (
    "expert_count", "attention.scale", "attention.clamp_kqv", "attn_logit_softcapping", "final_logit_softcapping",
    "logit_scale", "residual_scale", "embedding_scale",
)  # fmt: skip
"""Header fields that change what is computed, and that transformers does not read for the families above."""

HEAD = {"qwen3": 128, "gemma3": 256}
"""For these families transformers does not read the width of a head, or (Gemma 3) the scale of the scores, but assumes
the one of most of their models; others are refused. Gemma 3's 27B scales by yet another number."""

INSTEAD = "name the checkpoint in the Hugging Face layout instead"


def checked(file: Path) -> Header:
    """The header; UnfitError for a GGUF file that is damaged, of another family, or says what transformers does not
    read."""
    try:
        header = gguf_header.read(file)
        family = str(header.values["general.architecture"])
        if family in GGUF_FAMILIES:
            _require_announced_sizes(header, family)
            _require_all_data(header, file)
    except UnfitError:
        raise
    except Exception as error:  # numbers that lead nowhere raise anything
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UnfitError(f"it is not a sound GGUF file, or not the whole of one ({why})") from None
    if family not in GGUF_FAMILIES:
        raise UnfitError(
            f"a GGUF file of architecture {family!r} cannot be read faithfully, only of {', '.join(GGUF_FAMILIES)}; "
            f"{INSTEAD}"
        )
    _require_read(header, family)
    return header


def _require_read(header: Header, family: str) -> None:
    """UnfitError for what changes the results, and transformers does not read."""
    if family == "llama" and header.values.get("general.name") == "mistral":
        raise UnfitError(
            "it is named mistral (general.name), which transformers takes for another family and then finds no names "
            f"for its tensors; {INSTEAD}"
        )
    for field in UNREAD:
        key = f"{family}.{field}"
        if value := header.values.get(key, header.arrays.get(key)):
            raise UnfitError(f"it says {key} = {value}, which transformers does not read from GGUF files; {INSTEAD}")
    scaling = header.values.get(f"{family}.rope.scaling.type")
    factors = [name for name in header.tensors if name.startswith("rope_")]
    if factors or (scaling and scaling != "none"):
        raise UnfitError(
            f"it scales its rotary embedding ({', '.join(factors) or scaling}), which transformers does not "
            f"read from GGUF files; {INSTEAD}"
        )


def config(header: Header) -> dict[str, Any]:
    """The sizes that the file says, by transformers' names, as far as it says them: as transformers reads them."""
    said = header.values
    family = str(said["general.architecture"])
    names = {
        "context_length": "max_position_embeddings", "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size", "embedding_length": "hidden_size",
        "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    } | ({"attention.sliding_window": "sliding_window"} if family == "gemma3" else {})  # fmt: skip
    return {
        **{ours: said[f"{family}.{theirs}"] for theirs, ours in names.items() if f"{family}.{theirs}" in said},
        "model_type": MODEL_TYPES.get(family, family),
        "head_dim": _head_width(header, family),
        "vocab_size": header.tensors["token_embd.weight"].shape[1],
        "tie_word_embeddings": HEAD_TENSOR not in header.tensors,
    }


def _require_announced_sizes(header: Header, family: str) -> None:
    """ValueError unless the tensors have the sizes in the header: transformers builds the model by it, at any size.

    UnfitError for a width of heads that transformers does not read.
    """
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    start = f"{family}."
    said = {name.removeprefix(start): value for name, value in header.values.items() if name.startswith(start)}
    width = _head_width(header, family)
    if width != HEAD.get(family, width):
        raise UnfitError(
            f"it has attention heads of {width} numbers; of {family} transformers reads GGUF files with {HEAD[family]} "
            f"alone; {INSTEAD}"
        )
    has = {
        "block_count": len({name.split(".")[1] for name in shapes if name.startswith("blk.")}),
        "embedding_length": shapes["token_embd.weight"][0],
        "vocab_size": shapes["token_embd.weight"][1],
        "feed_forward_length": shapes["blk.0.ffn_up.weight"][1],
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
    }
    if (keys := shapes.get("blk.0.attn_k.weight")) is not None:
        has["attention.head_count_kv"] = keys[1] // width
    if HEAD_TENSOR in shapes and shapes[HEAD_TENSOR] != shapes["token_embd.weight"]:
        raise ValueError(f"{HEAD_TENSOR} is {shapes[HEAD_TENSOR]}, token_embd.weight {shapes['token_embd.weight']}")
    wrong = [
        f"{name} is {said[name]}, of the tensors {size}" for name, size in has.items() if said.get(name, size) != size
    ]
    if wrong:
        raise ValueError(", ".join(wrong))
    require_few_layers(has["block_count"])


def _require_all_data(header: Header, file: Path) -> None:
    """UnfitError for a type of weights that is not read; ValueError for weights that the file does not hold."""
    import gguf

    size = file.stat().st_size
    for name, tensor in header.tensors.items():
        kind = gguf.GGMLQuantizationType(tensor.type)
        if kind.name not in GGUF_TYPES:
            raise UnfitError(
                f"it holds weights of type {kind.name}; of GGUF files these are read: {', '.join(GGUF_TYPES)}; "
                f"{INSTEAD}"
            )
        numbers, bytes_ = gguf.GGML_QUANT_SIZES[kind]
        if tensor.start + math.prod(tensor.shape) // numbers * bytes_ > size:
            raise ValueError(f"{name} ends behind the end of the file")


def _head_width(header: Header, family: str) -> int:
    """How many numbers an attention head of the query has."""
    return header.tensors["blk.0.attn_q.weight"].shape[1] // int(header.values[f"{family}.attention.head_count"])


def require_whole(header: Header, loaded: Any) -> None:
    """UnfitError unless the model has as many numbers as the file: transformers skips tensors that it does not know."""
    held = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    taken = sum(parameter.numel() for parameter in loaded.parameters())
    if held != taken:
        raise UnfitError(f"it holds {held:,} numbers, of which transformers makes a model of {taken:,}: {INSTEAD}")


@contextmanager
def read_once() -> Iterator[None]:
    """Save seconds: transformers parses the header three times, and asks for the table of names for each module."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)
