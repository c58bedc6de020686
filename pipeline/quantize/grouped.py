"""A base in groups of 4-bit whole numbers, by HQQ or GPTQ, in place of the layers that it has."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipeline.core import params
from pipeline.core.progress import bar
from pipeline.model.groups import GroupLinear, configuration, linears
from pipeline.quantize import calibration, gptq, hqq
from pipeline.quantize.blocks import relative_error, stored_bits

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes OxI, scales OxG and zeros OxG of a layer."""


def replace(base: Any, quantize: params.Quantize, windows: Sequence[Sequence[int]]) -> tuple[dict[str, float], float]:
    """Quantize the linear layers of `base` in place, all but the head; `windows` are the tokens that gptq reads.

    Returns the relative error |W - Q(W)| / |W| (Frobenius) of each layer, and the stored bits a parameter with the
    constants. UserError for inputs that gptq cannot use.
    """
    errors: dict[str, float] = {}
    bits = parameters = 0
    with torch.no_grad():
        for name, plain, codes in _codes(base, quantize, windows):
            layer = GroupLinear.of(plain, quantize.method, *codes)
            errors[name] = relative_error(plain.weight.data, layer.dense())
            bits += stored_bits([layer.weight, layer.scale, layer.zero])
            parameters += plain.weight.numel()
            base.set_submodule(name, layer)
    base.config.quantization_config = configuration(quantize.method, quantize.group_size)
    order = [name for name, _ in linears(base)]
    return {name: errors[name] for name in order}, bits / parameters


def _codes(
    base: Any, quantize: params.Quantize, windows: Sequence[Sequence[int]]
) -> Iterator[tuple[str, torch.nn.Linear, Codes]]:
    """Name, layer and codes of each linear layer. It is replaced before the next one is asked for."""
    names = [name for name, _ in linears(base)]
    if quantize.method == "gptq":
        for products in calibration.blocks(base, windows):
            for name, sums in products.items():
                plain = base.get_submodule(name)
                yield name, plain, gptq.codes(plain.weight, sums, quantize.group_size)
        return
    with bar("quantize", len(names), "layers") as advance:
        for name in names:
            plain = base.get_submodule(name)
            yield name, plain, hqq.codes(plain.weight, quantize.group_size)
            advance(1)
