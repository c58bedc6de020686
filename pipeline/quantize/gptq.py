"""GPTQ (arXiv 2210.17323): a layer is rounded column by column, and the columns that are left make up for the error.

What is kept small is the error of the layer's outputs on the inputs that it reads, W X, not that of the weights.

Dimensions: O rows, I inputs, G groups of S inputs.
"""

import torch

from pipeline.core.errors import UserError
from pipeline.model import groups
from pipeline.quantize import grid

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean (section 3.3, step 3)."""


def codes(
    weight_OxI: torch.Tensor, products_IxI: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes OxI (uint8), scales and zeros OxG (float32) of a layer.

    `products_IxI` is the sum of x x' over the inputs that the layer reads, in float32. A block of columns, whose errors
    reach the other blocks together (section 3.3, step 2), is a group: its grid is chosen when the errors of all earlier
    groups have reached it. UserError if the products are not finite.
    """
    weight_OxI = weight_OxI.to(torch.float32, copy=True)
    factor_IxI = inverse_factor(products_IxI)
    chosen_OxI = torch.empty(weight_OxI.shape, dtype=torch.uint8, device=weight_OxI.device)
    scales, zeros = [], []
    for start in range(0, weight_OxI.shape[1], group_size):
        here = slice(start, start + group_size)
        group_OxS, own_SxS = weight_OxI[:, here], factor_IxI[here, here]
        scale_Ox1, zero_Ox1 = grid.span(group_OxS)
        zero_Ox1.round_()
        errors_OxS = torch.empty_like(group_OxS)
        for at in range(group_size):
            column_Ox1 = group_OxS[:, at : at + 1]
            code_Ox1 = grid.nearest(column_Ox1 / scale_Ox1, zero_Ox1)
            chosen_OxI[:, start + at] = code_Ox1[:, 0]
            error_Ox1 = (column_Ox1 - groups.restored(code_Ox1, scale_Ox1, zero_Ox1)) / own_SxS[at, at]
            group_OxS[:, at:] -= error_Ox1 * own_SxS[at, at:]
            errors_OxS[:, at : at + 1] = error_Ox1
        weight_OxI[:, here.stop :] -= errors_OxS @ factor_IxI[here, here.stop :]
        scales.append(scale_Ox1)
        zeros.append(zero_Ox1)
    return chosen_OxI, torch.cat(scales, 1), torch.cat(zeros, 1)


def inverse_factor(products_IxI: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with U' U the inverse of the damped products (section 3.3, step 3).

    Its row i holds what the error of column i asks of the columns after it, when those before it are fixed. An input
    that was never anything but 0 asks nothing. UserError if the products are not finite.
    """
    damped_IxI = products_IxI.clone()
    diagonal_I = damped_IxI.diagonal()
    diagonal_I[diagonal_I == 0] = 1
    diagonal_I += DAMPING * diagonal_I.mean()
    try:
        inverse_IxI = torch.cholesky_inverse(torch.linalg.cholesky(damped_IxI))
        upper_IxI: torch.Tensor = torch.linalg.cholesky(inverse_IxI, upper=True)
    except RuntimeError as error:  # torch's own kind of it for matrices is not typed
        raise UserError(
            f"quantize.method = 'gptq': the inputs of a layer cannot be used ({error}): the weights are damaged, "
            "model.dtype is too narrow for them, or quantize.calibration_rows is too small"
        ) from None
    return upper_IxI
