"""A GGUF file, checked before and after transformers reads it, so that the model computes what the file means."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.fetch import gguf_header
from pipeline.fetch.unfit import UnfitError, require_few_layers

GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
"""Families that are read from GGUF. transformers does not read the others, or ignores what changes their results."""

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


def require_readable(file: Path) -> None:
    """UnfitError for a GGUF file that is damaged, of another family, or says what transformers does not read."""
    import gguf

    try:
        gguf_header.check(file)
        reader = gguf.GGUFReader(str(file))
        family = reader.fields["general.architecture"].contents()
        if family in GGUF_FAMILIES:
            _require_announced_sizes(reader, family)
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
    if unread := sorted({tensor.tensor_type.name for tensor in reader.tensors} - set(GGUF_TYPES)):
        raise UnfitError(
            f"it holds weights of type {unread[0]}; of GGUF files these are read: {', '.join(GGUF_TYPES)}; {INSTEAD}"
        )
    for field in UNREAD:
        key = f"{family}.{field}"
        if key in reader.fields and (value := reader.fields[key].contents()):
            raise UnfitError(f"it says {key} = {value}, which transformers does not read from GGUF files; {INSTEAD}")
    if family in HEAD and (width := _head_width(reader, family)) != HEAD[family]:
        raise UnfitError(
            f"it has attention heads of {width} numbers; of {family} transformers reads GGUF files with {HEAD[family]} "
            f"alone; {INSTEAD}"
        )
    scaling = reader.fields.get(f"{family}.rope.scaling.type")
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if factors or (scaling and scaling.contents() != "none"):
        raise UnfitError(
            f"it scales its rotary embedding ({', '.join(factors) or scaling.contents()}), which transformers does not "
            f"read from GGUF files; {INSTEAD}"
        )


def _require_announced_sizes(reader: Any, family: str) -> None:
    """ValueError unless the tensors have the sizes in the header: transformers builds the model by it, at any size."""
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    own = [name for name in reader.fields if name.startswith(f"{family}.")]
    said = {name.removeprefix(f"{family}."): reader.fields[name].contents() for name in own}
    has = {
        "block_count": len({name.split(".")[1] for name in shapes if name.startswith("blk.")}),
        "embedding_length": shapes["token_embd.weight"][0],
        "vocab_size": shapes["token_embd.weight"][1],
        "feed_forward_length": shapes["blk.0.ffn_up.weight"][1],
        "attention.key_length": _head_width(reader, family),
    }
    wrong = [
        f"{name} is {said[name]}, of the tensors {size}" for name, size in has.items() if said.get(name, size) != size
    ]
    if wrong:
        raise ValueError(", ".join(wrong))
    require_few_layers(has["block_count"])


def _head_width(reader: Any, family: str) -> int:
    """How many numbers an attention head of the query has."""
    rows = next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    return rows // int(reader.fields[f"{family}.attention.head_count"].contents())


def require_whole(file: Path, loaded: Any) -> None:
    """UnfitError unless the model has as many numbers as the file: transformers skips tensors that it does not know."""
    import gguf

    held = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(file)).tensors)
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
