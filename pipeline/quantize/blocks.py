"""A base in blocks, through bitsandbytes: 4 bits (QLoRA, arXiv 2305.14314, section 3), or 8 bits for weights and
activations (LLM.int8(), arXiv 2208.07339).

On a CPU, bitsandbytes quantizes activations only in evaluation; in training, int8 layers compute with their weights'
values and plain activations.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.core import params
from pipeline.model import packed

if TYPE_CHECKING:
    import torch


def config(quantize: params.Quantize, dtype: "torch.dtype") -> Any:
    """What transformers is told, so that it quantizes a checkpoint as it loads it. `dtype` is that of arithmetic."""
    from transformers import BitsAndBytesConfig

    if quantize.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantize.int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize.method,
        bnb_4bit_use_double_quant=quantize.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def reconstruction(base: Any, quantized: Any) -> tuple[dict[str, float], float]:
    """Relative error |W - Q(W)| / |W| (Frobenius) of each layer, and the stored bits a parameter with the constants."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    def layers() -> Iterator[tuple[str, list["torch.Tensor"], "torch.Tensor"]]:
        """The name of each layer, what is stored of it, and its restored weight."""
        for name, layer in packed.linear4bit(quantized):
            weight, state = layer.weight.data, layer.weight.quant_state
            yield name, [weight, *_constants(state)], dequantize_4bit(weight, state)
        for name, layer in packed.linear8bit(quantized):
            # One constant for each row. The first forward pass moves them to the layer's state.
            weight, scale = layer.weight.data, layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
            yield name, [weight, scale], int8_vectorwise_dequant(weight, scale)

    errors: dict[str, float] = {}
    bits = parameters = 0
    for name, stored, restored in layers():
        exact = base.get_submodule(name).weight.data
        errors[name] = relative_error(exact, restored)
        bits += stored_bits(stored)
        parameters += exact.numel()
    return errors, bits / parameters


def relative_error(exact: "torch.Tensor", restored: "torch.Tensor") -> float:
    """|W - Q(W)| / |W|, of Frobenius norms."""
    exact = exact.float()
    return float((exact - restored.float().to(exact.device)).norm() / exact.norm())


def stored_bits(stored: list["torch.Tensor"]) -> int:
    """Bits that these tensors take."""
    return sum(8 * tensor.numel() * tensor.itemsize for tensor in stored)


def _constants(state: Any) -> list["torch.Tensor"]:
    """The constants of a 4-bit layer: one for each block of 64, quantized in blocks of 256 or not."""
    return [state.absmax, state.state2.absmax, state.offset] if state.nested else [state.absmax]
