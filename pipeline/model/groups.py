"""Linear layers in 4 bits whose weights are whole numbers in groups: the form in which GPTQ and HQQ leave a base.

The inputs of a layer are cut into groups of S. Each group of a row has a scale and a zero, and a weight is
(code - zero) * scale with a code of 0 to 15. Two codes lie in a byte. transformers loads such a checkpoint as any other
once `register` has been called.

Dimensions: O outputs and I inputs of a layer, G = I / S groups, L tokens.
"""

from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

NAME = "lora-repro-groups"
"""The `quant_method` in the configuration of such a checkpoint."""
TOP = 15
"""The largest code."""
CONSTANTS = torch.float16
"""The type of scales and zeros as they are stored: with groups of 64 they add half a bit to each weight."""


class GroupLinear(torch.nn.Linear):
    """A frozen linear layer with packed weights: `weight` OxI/2 (two codes a byte), `scale` and `zero` OxG.

    It is made without values, in place of a plain layer, whose bias it keeps. `method` says who chose the codes.
    """

    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, plain: torch.nn.Linear, method: str, group_size: int) -> None:
        outputs, inputs, where = plain.out_features, plain.in_features, plain.weight.device
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.method, self.group_size, self.dense_dtype = method, group_size, plain.weight.dtype
        packed_OxH = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=where)
        self.weight = torch.nn.Parameter(packed_OxH, requires_grad=False)
        self.bias = plain.bias
        for name in ("scale", "zero"):
            constants_OxG = torch.empty(outputs, inputs // group_size, dtype=CONSTANTS, device=where)
            self.register_buffer(name, constants_OxG)

    @classmethod
    def of(
        cls,
        plain: torch.nn.Linear,
        method: str,
        codes_OxI: torch.Tensor,
        scale_OxG: torch.Tensor,
        zero_OxG: torch.Tensor,
    ) -> "GroupLinear":
        """The layer with these codes (uint8), scales and zeros."""
        layer = cls(plain, method, plain.in_features // scale_OxG.shape[1])
        layer.weight.data = packed(codes_OxI)
        layer.scale, layer.zero = scale_OxG.to(CONSTANTS), zero_OxG.to(CONSTANTS)
        return layer

    def dense(self) -> torch.Tensor:
        """The weights that the codes stand for, OxI, in the dtype of the model. They are computed in float32."""
        codes_OxGxS = unpacked(self.weight).unflatten(1, (-1, self.group_size))
        weight_OxGxS = restored(codes_OxGxS, self.scale[..., None], self.zero[..., None])
        return weight_OxGxS.flatten(1).to(self.dense_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class Product(torch.autograd.Function):
    """x W' with W unpacked in each pass, and not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: GroupLinear) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.dense())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dense(), None


def restored(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """(code - zero) * scale in float32; scales and zeros are broadcast over the codes of their group."""
    return codes.float().sub_(zero).mul_(scale)


def packed(codes_OxI: torch.Tensor) -> torch.Tensor:
    """Two codes (uint8, 0 to 15) in a byte: those of a row's first half low, those of its second half high."""
    low_OxH, high_OxH = codes_OxI.chunk(2, dim=1)
    return low_OxH | (high_OxH << 4)


def unpacked(packed_OxH: torch.Tensor) -> torch.Tensor:
    """The codes that `packed` joined, OxI."""
    return torch.cat((packed_OxH & TOP, packed_OxH >> 4), dim=1)


def linears(model: Any) -> list[tuple[str, torch.nn.Linear]]:
    """Name and layer of each linear layer that is quantized: all but the head."""
    head = model.get_output_embeddings()
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    return [(name, layer) for name, layer in layers if layer is not head]


@cache
def register() -> None:
    """Let transformers load and save checkpoints in groups (its interface for quantizers of others)."""
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, method: str, group_size: int, **_: Any) -> None:
            self.quant_method, self.method, self.group_size = NAME, method, group_size

    class Quantizer(HfQuantizer):  # type: ignore[misc]
        """It puts layers without values where the checkpoint has packed ones; transformers fills them."""

        is_trainable = True

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            config = self.quantization_config
            for name, layer in linears(model):
                model.set_submodule(name, GroupLinear(layer, config.method, config.group_size))
            return model

    register_quantization_config(NAME)(Config)
    register_quantizer(NAME)(Quantizer)


def configuration(method: str, group_size: int) -> dict[str, Any]:
    """What a checkpoint's `config.json` says of its quantization."""
    return {"quant_method": NAME, "method": method, "group_size": group_size}
