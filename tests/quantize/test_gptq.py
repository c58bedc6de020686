"""GPTQ: the codes are those of the definition in the paper, and outputs change less than by rounding to the nearest."""

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.model import groups
from pipeline.quantize import gptq, grid

SIZE = 32


def inputs(width: int, tokens: int = 400) -> torch.Tensor:
    """Inputs that go together, as a layer's do: what one column loses another can make up for."""
    draw = torch.Generator().manual_seed(3)
    mixed = torch.randn(width // 4, width, generator=draw)
    return torch.randn(tokens, width // 4, generator=draw) @ mixed + 0.3 * torch.randn(tokens, width, generator=draw)


def weights(rows: int, width: int) -> torch.Tensor:
    return 0.05 * torch.randn(rows, width, generator=torch.Generator().manual_seed(4))


def restored(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return groups.restored(codes.unflatten(1, (-1, SIZE)), scale[..., None], zero[..., None]).flatten(1)


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest on the same kind of grid."""
    in_groups = weight.unflatten(1, (-1, SIZE))
    scale, zero = grid.span(in_groups)
    codes = grid.nearest(in_groups / scale, zero.round())
    return groups.restored(codes, scale, zero.round()).flatten(1)


def test_outputs_on_the_inputs_it_read_change_less_than_by_rounding_to_the_nearest() -> None:
    weight, x = weights(48, 128), inputs(128)
    found = restored(*gptq.codes(weight, x.T @ x, SIZE))
    lost, plain = ((x @ (weight - one).T).norm() for one in (found, nearest(weight)))
    assert float(lost) < 0.7 * float(plain)
    assert float((weight - found).norm()) > float((weight - nearest(weight)).norm()), "at the price of the weights"


def by_definition(weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Equations 2 and 3 of the paper in float64: one column at a time, each time with the inverse of what is left."""
    weight, rows = weight.double().clone(), torch.empty_like(weight)
    diagonal = products.double().diagonal()
    hessian = products.double() + gptq.DAMPING * diagonal.mean() * torch.eye(len(products), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    for column in range(weight.shape[1]):
        if column % SIZE == 0:
            scale, zero = grid.span(weight[:, column : column + SIZE].float())
            zero = zero.round()
        code = grid.nearest(weight[:, column : column + 1] / scale, zero)
        rows[:, column] = code[:, 0].float()
        error = weight[:, column : column + 1] - (code - zero) * scale
        weight -= error / inverse[column, column] * inverse[column]
        inverse -= inverse[:, column : column + 1] @ inverse[column : column + 1] / inverse[column, column]
    return rows


def test_the_codes_are_those_of_the_definition() -> None:
    weight, x = weights(16, 96), inputs(96)
    codes, _, _ = gptq.codes(weight, x.T @ x, SIZE)
    truth = by_definition(weight, x.T @ x)
    # A column that lies halfway between two values may go to either in float32; what follows then differs as well.
    assert float((codes.float() == truth).float().mean()) > 0.98


def test_inputs_that_have_nothing_to_do_with_each_other_leave_rounding_to_the_nearest() -> None:
    weight = weights(8, 64)
    assert torch.equal(restored(*gptq.codes(weight, torch.eye(64), SIZE)), nearest(weight))


def test_an_input_that_is_never_anything_but_0_is_rounded_to_the_nearest() -> None:
    weight, x = weights(8, 64), inputs(64)
    x[:, 5] = 0
    found = restored(*gptq.codes(weight, x.T @ x, SIZE))
    scale, _ = grid.span(weight.unflatten(1, (-1, SIZE)))
    assert bool(((found[:, 5] - weight[:, 5]).abs() <= 0.501 * scale[:, 0, 0]).all())


def test_fewer_tokens_than_inputs_are_enough() -> None:
    weight, x = weights(8, 64), inputs(64, tokens=5)
    found = restored(*gptq.codes(weight, x.T @ x, SIZE))
    assert float((x @ (weight - found).T).norm()) < 0.5 * float((x @ (weight - nearest(weight)).T).norm())


def test_inputs_that_are_not_finite_are_refused() -> None:
    products = torch.eye(64)
    products[3, 3] = float("nan")
    with pytest.raises(UserError, match="quantize.method = 'gptq': the inputs of a layer cannot be used"):
        gptq.codes(weights(8, 64), products, SIZE)


def test_the_weights_given_are_left_as_they_are() -> None:
    weight, x = weights(8, 64), inputs(64)
    before, products = weight.clone(), x.T @ x
    kept = products.clone()
    gptq.codes(weight, products, SIZE)
    assert torch.equal(weight, before)
    assert torch.equal(products, kept), "layers that read one input share the products"
