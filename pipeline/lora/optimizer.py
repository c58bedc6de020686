"""The optimizer of the adapter: AdamW (arXiv 1711.05101), with moments in float32, or in 8 bits by bitsandbytes.

In 8 bits, a moment of at least 4,096 values has one constant for each block of 256 (arXiv 2110.02861); smaller ones
stay in float32. Paged moments lie in memory that CUDA moves between device and machine (QLoRA, arXiv 2305.14314,
section 3). After a resumed run they have the same values, but lie unpaged on the device, so `pipeline.model.memory`
always counts them there.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core import params
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import torch

DEVICES = {"adamw": ("cpu", "cuda", "mps"), "adamw8bit": ("cpu", "cuda"), "paged-adamw8bit": ("cuda",)}
"""The devices on which bitsandbytes 0.50.2 updates the states. On a CPU it would silently ignore paging."""


def require(name: str, device: "torch.device") -> None:
    """UserError if the optimizer `name` (`train.optimizer`) does not run on the device."""
    if device.type not in DEVICES[name]:
        possible = [other for other, types in DEVICES.items() if device.type in types]
        raise UserError(
            f"train.optimizer = {name!r} needs {' or '.join(DEVICES[name])}, and training runs on {device.type}: "
            f"set it to {' or '.join(possible)}"
        )


def groups(tensors: "Mapping[str, torch.Tensor]", plus_ratio: float) -> list[dict[str, Any]]:
    """The parameter groups, each with the `ratio` of its learning rate: LoRA+ (arXiv 2402.12354) raises that of B."""
    if plus_ratio == 1:
        return [{"params": list(tensors.values()), "ratio": 1.0}]
    of_b = {name: tensor for name, tensor in tensors.items() if ".lora_B." in name}
    others = [tensor for name, tensor in tensors.items() if name not in of_b]
    return [{"params": others, "ratio": 1.0}, {"params": list(of_b.values()), "ratio": plus_ratio}]


def build(tensors: Sequence[Any], train: params.Train) -> "torch.optim.Optimizer":
    """The optimizer of `train` over float32 tensors, or groups of them. The learning rate must be set at each step."""
    import torch

    if train.optimizer == "adamw":
        return torch.optim.AdamW(list(tensors), betas=(0.9, train.beta2), weight_decay=train.weight_decay)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if train.optimizer == "paged-adamw8bit" else AdamW8bit
    made: torch.optim.Optimizer = kind(list(tensors), betas=(0.9, train.beta2), weight_decay=train.weight_decay)
    return made
