"""The packed layers of a loaded model, by bitsandbytes or in groups: checked, unpacked, kept from being repacked."""

from typing import Any

from pipeline.core.contracts import Loadable
from pipeline.core.errors import UserError


def require_effective(model: Any, facts: Loadable) -> None:
    """UserError unless the loaded model is quantized as its facts say."""
    methods = [
        *(str(layer.weight.quant_type) for _, layer in linear4bit(model)),
        *("int8" for _ in linear8bit(model)),
        *(layer.method for _, layer in in_groups(model)),
    ]
    found, wanted = set(methods), set() if facts.method == "none" else {facts.method}
    if found != wanted or len(methods) != facts.quantized_layers:
        raise UserError(
            f"quantize.method = {facts.method!r} with {facts.quantized_layers} layers was asked for, but the "
            f"loaded model has {len(methods)} layers of {found or 'no quantized type'}: "
            f"run `dvc repro --force quantize`"
        )
    sizes = {layer.group_size for _, layer in in_groups(model)}
    if sizes and sizes != {facts.group_size}:
        raise UserError(
            f"quantize.group_size = {facts.group_size} was asked for, but the loaded model has "
            f"{', '.join(map(str, sorted(sizes)))}: run `dvc repro --force quantize`"
        )
    thresholds = {layer.state.threshold for _, layer in linear8bit(model)}
    if thresholds and thresholds != {facts.int8_threshold}:
        raise UserError(
            f"quantize.int8_threshold = {facts.int8_threshold} was asked for, but the loaded model has "
            f"{', '.join(map(str, sorted(thresholds)))}: run `dvc repro --force quantize`"
        )


def dequantize(model: Any) -> None:
    """Replace 4-bit layers by plain ones that hold the same values in the model's dtype.

    8-bit layers stay: they quantize their inputs as well, so plain ones would compute other numbers.
    """
    import torch

    names = [name for found in (linear4bit(model), in_groups(model)) for name, _ in found]
    for name in names:
        layer = model.get_submodule(name)
        weight = _values(layer).to(model.dtype)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)
        del layer  # the packed weights go as the unpacked ones come
    if names:
        # Without this mark transformers and PEFT would still take the layers for 4-bit ones.
        model.is_loaded_in_4bit = model.is_quantized = False
        model.quantization_method = None


def _values(layer: Any) -> Any:
    """The weights that a 4-bit layer stands for."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.dense()


def keep_unpacked(model: Any) -> None:
    """Stop bitsandbytes from repacking weights on the CPU.

    On CPUs with AVX-512 BF16 the first forward pass in evaluation repacks them for speed. Gradients through repacked
    weights are silently wrong, and their product rounds differently.
    """
    for _, layer in linear4bit(model):
        layer.support_avx512bf16_for_cpu = False


def repacked(model: Any) -> int:
    """The number of layers that bitsandbytes has repacked, which is 0; UserError otherwise, as gradients were wrong."""
    count = sum(bool(getattr(layer.quant_state, "packing_format_for_cpu", False)) for _, layer in linear4bit(model))
    if count:
        raise UserError(
            f"{count} 4-bit layers were repacked for the CPU during training, so gradients were wrong: "
            f"set runtime.keep_dequantized to true"
        )
    return count


def linear4bit(model: Any) -> Any:
    """Name and layer of each 4-bit layer of a model."""
    from bitsandbytes.nn import Linear4bit

    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit))


def linear8bit(model: Any) -> Any:
    """Name and layer of each 8-bit layer of a model."""
    from bitsandbytes.nn import Linear8bitLt

    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear8bitLt))


def in_groups(model: Any) -> Any:
    """Name and layer of each layer of a model that is held in groups."""
    from pipeline.model.groups import GroupLinear

    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, GroupLinear))
