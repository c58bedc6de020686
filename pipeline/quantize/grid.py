"""The grid of a group of weights: 16 values at equal distances, of which one is 0. HQQ then shifts it.

Dimensions: O rows, G groups of S weights.
"""

import torch

from pipeline.model.groups import CONSTANTS, TOP


def span(weight_OxGxS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero, each OxGx1 in float32, of the grid from a group's least weight, or 0, to its largest.

    The scale is one that can be stored. The zero is the place of 0 on the grid, and is not rounded.
    """
    least = weight_OxGxS.amin(-1, keepdim=True).clamp_(max=0.0)
    range_ = weight_OxGxS.amax(-1, keepdim=True).clamp_(min=0.0) - least
    limits = torch.finfo(CONSTANTS)
    scale = (range_ / TOP).clamp_(limits.smallest_normal, limits.max)
    scale = torch.where(range_ == 0, 1.0, scale).to(CONSTANTS).float()
    return scale, -least / scale


def stored(zero: torch.Tensor) -> torch.Tensor:
    """A zero as it will be read again, in float32."""
    return zero.to(CONSTANTS).float()


def nearest(steps: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The codes of the values on the grid that are nearest to weights in steps of the grid, in float32."""
    return (steps + zero).round_().clamp_(0, TOP)
