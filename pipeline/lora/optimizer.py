"""The optimizer of the adapter, over its values in float32. For all of them the learning rate is the size of a step,
whatever the size of the values.

- AdamW (arXiv 1711.05101), with moments in float32, or in 8 bits by bitsandbytes. In 8 bits, a moment of at least 4,096
  values has one constant for each block of 256 (arXiv 2110.02861); smaller ones stay in float32. Paged moments lie in
  memory that CUDA moves between device and machine (QLoRA, arXiv 2305.14314, section 3). After a resumed run they have
  the same values, but lie unpaged on the device, so `pipeline.model.memory` always counts them there.
- Adafactor (arXiv 1804.04235): the second moment of a matrix as a row and a column, and no first. It is transformers',
  since torch's has no steps that are independent of the values' size: B begins at zero, and would hardly move.
- Muon (arXiv 2502.16982, by torch): each step of a matrix is its momentum, with all singular values made about equal.
  Its root mean square is 0.2 of the learning rate, which the paper found of AdamW's steps in long training. What is no
  matrix is given to AdamW, as the paper does.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core import params
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import torch

BETA2 = 0.999
"""AdamW's beta2 where `train.beta2` is null."""


def require(name: str, device: "torch.device") -> None:
    """UserError if the optimizer `name` (`train.optimizer`) does not run on the device."""
    types = params.OPTIMIZERS[name]
    if device.type not in types:
        possible = [other for other, some in params.OPTIMIZERS.items() if device.type in some]
        raise UserError(
            f"train.optimizer = {name!r} needs {' or '.join(types)}, and training runs on {device.type}: "
            f"set it to {' or '.join(possible)}"
        )


Group = dict[str, Any]
"""Tensors under `params`, with the `ratio` of their learning rate to that of the schedule."""


def groups(tensors: "Mapping[str, torch.Tensor]", plus_ratio: float) -> list[Group]:
    """The parameter groups of an adapter: LoRA+ (arXiv 2402.12354) raises the learning rate of B."""
    if plus_ratio == 1:
        return [{"params": list(tensors.values()), "ratio": 1.0}]
    of_b = {name: tensor for name, tensor in tensors.items() if ".lora_B." in name}
    others = [tensor for name, tensor in tensors.items() if name not in of_b]
    return [{"params": others, "ratio": 1.0}, {"params": list(of_b.values()), "ratio": plus_ratio}]


def build(tensors: Sequence[Any], train: params.Train) -> "torch.optim.Optimizer | Both":
    """The optimizer of `train` over float32 tensors, or groups of them. The learning rate must be set at each step."""
    if train.optimizer == "adafactor":
        return _adafactor(tensors, train)
    if train.optimizer == "muon":
        return _muon(tensors, train)
    return _adamw(tensors, train)


def _adamw(tensors: Sequence[Any], train: params.Train) -> "torch.optim.Optimizer":
    import torch

    options: dict[str, Any] = {
        "betas": (0.9, BETA2 if train.beta2 is None else train.beta2),
        "weight_decay": train.weight_decay,
    }
    if train.optimizer in ("adamw", "muon"):
        return torch.optim.AdamW(list(tensors), **options)
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if train.optimizer == "paged-adamw8bit" else AdamW8bit
    made: torch.optim.Optimizer = kind(list(tensors), **options)
    return made


def _adafactor(tensors: Sequence[Any], train: params.Train) -> "torch.optim.Optimizer":
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(
        list(tensors),
        lr=train.learning_rate,
        weight_decay=train.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )
    return made


def _muon(tensors: Sequence[Any], train: params.Train) -> "torch.optim.Optimizer | Both":
    import torch

    of_groups: list[Group] = list(tensors)
    if not isinstance(tensors[0], dict):
        of_groups = [{"params": list(tensors), "ratio": 1.0}]
    matrices, others = (
        [
            {**group, "params": kept}
            for group in of_groups
            if (kept := [one for one in group["params"] if (one.ndim == 2) is wanted])
        ]
        for wanted in (True, False)
    )
    muon = torch.optim.Muon(matrices, weight_decay=train.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Both([muon, _adamw(others, train)]) if others else muon


class Both:
    """Several optimizers of different tensors, used as one."""

    def __init__(self, parts: "Sequence[torch.optim.Optimizer]") -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
