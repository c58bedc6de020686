"""Stage quantize: the base by `quantize.method`, as a checkpoint that every later stage loads, and what that costs.

The cost is measured: bits per parameter, the error of each layer's weights, and perplexity before and after.
"""

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import BaseFacts, QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.model import checkpoint, devices, loss, memory, packed, prompt, windows
from pipeline.model.memory import WINDOW
from pipeline.model.shape import Shape
from pipeline.model.windows import Text, Tokens
from pipeline.quantize import blocks

if TYPE_CHECKING:
    import torch

USES = {"validation": "measure perplexity", "train": "calibrate gptq"}
"""What this stage reads the sources of a split for."""


def write_quantized(quantize: params.Quantize, runtime: params.Runtime) -> None:
    """Write `out/models/quantized` and its facts; with method none, the base as it is.

    UserError if the base has changed since it was fetched, or does not fit into memory, and for groups that do not
    divide its layers.
    """
    device = devices.choose(runtime)
    facts = contracts.read(paths.BASE_FACTS, BaseFacts)
    checkpoint.require_intact(paths.BASE, facts.sha256)
    devices.require(device, facts.dtype)
    if quantize.groups:
        Shape.read(paths.BASE).require_groups(quantize.groups)
    base_here = memory.Base.of(paths.BASE, facts.dtype, quantize.method, quantize.double_quantization, quantize.groups)
    home = memory.require_quantizing(device, base_here, quantize.read_rows)
    if home != device:
        say(f"quantize: the base does not fit beside its quantized form on {device.type}: {home.type} computes it")
    tokenizer, length = checkpoint.tokenizer(paths.BASE), min(WINDOW, facts.context)
    ids = [window.ids for window in _windows(tokenizer, quantize.perplexity_tokens, length)]
    read = _calibration(tokenizer, quantize.read_rows, length) if quantize.read_rows else []
    base = checkpoint.pretrained(paths.BASE, home)
    before = after = loss.perplexity(base, ids, "perplexity before")
    errors: dict[str, float] = {}
    if quantize.method == "none":
        shutil.copytree(paths.BASE, paths.QUANTIZED, dirs_exist_ok=True)
        bits = 8.0 * base.dtype.itemsize
    else:
        quantized, errors, bits = _written(quantize, base, device, read)
        after = loss.perplexity(quantized, ids, "perplexity after")
    made = QuantizedFacts(
        method=quantize.method,
        double_quantization=quantize.double_quantization,
        bits_per_parameter=bits,
        quantized_layers=len(errors),
        layers=errors,
        perplexity_before=before,
        perplexity_after=after,
        perplexity_tokens=sum(len(window) - 1 for window in ids),
        perplexity_window=length,
        perplexity_bos=prompt.starts_with_bos(tokenizer),
        bytes=sum(path.stat().st_size for path in paths.QUANTIZED.glob("*.safetensors")),
        sha256=records.sha256_tree(paths.QUANTIZED),
        context=facts.context,
        dtype=facts.dtype,
        stop_ids=facts.stop_ids,
        int8_threshold=quantize.int8_threshold if quantize.method == "int8" else None,
        base_on=None if home == device else home.type,
        group_size=quantize.groups,
        calibration_tokens=sum(map(len, read)) or None,
    )
    contracts.write(paths.QUANTIZED_FACTS, made)
    say(
        f"quantize: {made.method}, {made.bits_per_parameter:.3f} bits a parameter in {made.quantized_layers} layers, "
        f"perplexity {before:.3f} -> {after:.3f}: {made.perplexity_read}"
    )


def _written(
    quantize: params.Quantize, base: Any, device: "torch.device", read: Sequence[Sequence[int]]
) -> tuple[Any, dict[str, float], float]:
    """Write the quantized checkpoint. Returns it on `device`, the relative error of each layer, and the bits a
    parameter."""
    from pipeline.quantize import grouped

    if quantize.method in params.GROUPED:
        errors, bits = grouped.replace(base, quantize, read)
        base.save_pretrained(paths.QUANTIZED)
        quantized = checkpoint.pretrained(paths.QUANTIZED, device)
    else:
        config = blocks.config(quantize, base.dtype)
        quantized = checkpoint.pretrained(paths.BASE, device, quantization_config=config)
        errors, bits = blocks.reconstruction(base, quantized)
        quantized.save_pretrained(paths.QUANTIZED)
        packed.keep_unpacked(quantized)
    checkpoint.tokenizer(paths.BASE).save_pretrained(paths.QUANTIZED)
    return quantized, errors, bits


def _calibration(tokenizer: Any, rows: int, length: int) -> list[list[int]]:
    """At most `rows` windows of at most `length` tokens, of training sources spread evenly over the split.

    UserError if the sources are one token in all.
    """
    sources = _sources("train")
    count = min(rows, len(sources))
    spread = [sources[at * len(sources) // count] for at in range(count)]
    return [window.ids for window in _cut(tokenizer, "train", spread, rows * length, length)[:rows]]


def _windows(tokenizer: Any, tokens: int, length: int) -> list[Tokens]:
    """Windows of the validation sources with `tokens` to predict, or fewer if there is less text."""
    return _cut(tokenizer, "validation", _sources("validation"), tokens, length)


def _sources(split: str) -> list[str]:
    """The sources of a split, each once."""
    return list(dict.fromkeys(row.source for row in records.read_rows(paths.split(split), records.Example)))


def _cut(tokenizer: Any, split: str, sources: Sequence[str], tokens: int, length: int) -> list[Tokens]:
    """Windows of these sources with `tokens` to predict, or fewer if there is less text.

    Sources of a single token predict nothing. If all are, they are read as the lines of one text. UserError if even
    these are one token.
    """
    texts = [Text(str(number), source) for number, source in enumerate(sources)]
    lines = [Text("", "".join(f"{source}\n" for source in sources))]
    if found := windows.cut(tokenizer, texts, tokens, length) or windows.cut(tokenizer, lines, tokens, length):
        return found
    raise UserError(
        f"the sources in {paths.split(split)} are one token in all, too few to {USES[split]}: name more {split} rows"
    )
