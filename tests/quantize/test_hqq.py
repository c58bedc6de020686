"""HQQ: the solver is the authors', and no group is worse than rounded to the plain grid."""

import pytest
import torch

from pipeline.quantize import grid, hqq


def weights(rows: int = 32, columns: int = 256, tails: bool = True) -> torch.Tensor:
    """Weights as large as a model's; with `tails`, a few of them far from the others."""
    draw = torch.Generator().manual_seed(11)
    weight = 0.02 * torch.randn(rows, columns, generator=draw)
    if tails:
        weight[torch.rand(weight.shape, generator=draw) < 0.01] *= 6
    return weight


def restored(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> torch.Tensor:
    in_groups = codes.float().unflatten(1, (-1, group_size))
    weight: torch.Tensor = ((in_groups - zero[..., None]) * scale[..., None]).flatten(1)
    return weight


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_objective_of_every_group_is_at_most_that_of_rounding_to_the_nearest(group_size: int) -> None:
    weight = weights().unflatten(1, (-1, group_size))
    scale, zero = grid.span(weight)
    nearest, _ = hqq.step(weight / scale, grid.stored(zero), hqq.BETA)
    codes, scales, zeros = hqq.codes(weight.flatten(1), group_size)
    torch.testing.assert_close(scales, scale[..., 0])
    found = (weight.flatten(1) - restored(codes, scales, zeros, group_size)).unflatten(1, (-1, group_size))
    reached = (found / scale).abs().pow(hqq.P).sum(-1, keepdim=True)
    assert bool((reached <= nearest * (1 + 1e-4)).all())
    assert float(reached.sum()) < 0.99 * float(nearest.sum())


def test_the_solver_takes_the_steps_of_the_authors() -> None:
    """hqq 0.2.8.post1, `optimize_weights_proximal_legacy_step` on a CPU with scale 1, beta 10 and p 0.7, four times.

    That release leaves beta as it is, and counts errors in the units of the weights: here these are steps.
    """
    steps = 7.5 * torch.sin(1.7 * torch.arange(32, dtype=torch.float32).reshape(2, 1, 16))
    steps[0, 0, 3] *= 1.9
    steps[1, 0, 8] *= 2.5
    zero = torch.tensor([[[7.0]], [[8.0]]])
    for expected in (
        [7.0119295, 8.0749588],
        [7.0366306, 8.1275673],
        [7.0559931, 8.1581182],
        [7.0699954, 8.1791687],
    ):
        _, zero = hqq.step(steps, zero, 10.0)
        assert zero.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_codes_and_constants_can_be_stored() -> None:
    codes, scale, zero = hqq.codes(weights(), 64)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) == 15
    for constants in (scale, zero):
        assert constants.shape == (32, 4)
        assert torch.equal(constants, constants.half().float())


@pytest.mark.parametrize("value", [0.0, 0.03, -0.03, 1e-9, 3e4])
def test_groups_without_a_spread_are_restored(value: float) -> None:
    weight = torch.full((2, 64), value)
    restored_ = restored(*hqq.codes(weight, 64), 64)
    torch.testing.assert_close(restored_, weight, rtol=1e-3, atol=1e-6)
