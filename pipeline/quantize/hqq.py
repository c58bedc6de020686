"""HQQ: the zeros of groups, found without data by half-quadratic splitting (Badri and Shaji, Half-Quadratic
Quantization of Large Machine Learning Models, 2023, mobiusml.github.io/hqq_blog).

It minimizes the sum of |W - Q(W)|^p with p < 1, which weighs a few large errors less than squares do. In turn, what
exceeds a threshold is taken for outliers, and the zero becomes the mean of what the others ask for. Here errors are
counted in steps of the grid: the objective is the same, since a group has one scale. In the units of a model's weights,
which are far below 1, no error would ever exceed the threshold.

Dimensions: O rows, G groups of S weights.
"""

import torch

from pipeline.quantize import grid

P, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20
"""The exponent of the objective, the weight of the splitting, its growth at each step, and the number of steps, as the
authors' library sets them."""
SMALLEST = 1e-12
"""Errors below this count as this."""


def codes(weight_OxI: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes OxI (uint8), scales and zeros OxG (float32) of a layer.

    Of the zeros that were tried, each as it can be stored, a group takes the one with the smallest objective. The first
    is that of the plain grid, so no group is worse than rounded to it.
    """
    weight_OxGxS = weight_OxI.float().unflatten(1, (-1, group_size))
    scale, zero = grid.span(weight_OxGxS)
    steps_OxGxS, zero, beta = weight_OxGxS / scale, grid.stored(zero), BETA
    best, least = zero, torch.full_like(zero, torch.inf)
    for _ in range(STEPS + 1):
        reached, found = step(steps_OxGxS, zero, beta)
        better = reached < least
        best, least = torch.where(better, zero, best), torch.where(better, reached, least)
        zero, before = grid.stored(found), zero
        if torch.equal(zero, before):
            break
        beta *= KAPPA
    return grid.nearest(steps_OxGxS, best).to(torch.uint8).flatten(1), scale[..., 0], best[..., 0]


def step(steps_OxGxS: torch.Tensor, zero_OxGx1: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of each group with this zero, and the zero that the solver takes next, OxGx1 each.

    Weights, and so errors, are in steps of the grid.
    """
    codes = grid.nearest(steps_OxGxS, zero_OxGx1)
    error = steps_OxGxS - (codes - zero_OxGx1)
    size = error.abs().clamp_(min=SMALLEST)
    power = size.pow(P)
    outliers = error.sign_() * (size - power / size / beta).relu_()
    return power.sum(-1, keepdim=True), (codes - (steps_OxGxS - outliers)).mean(-1, keepdim=True)
