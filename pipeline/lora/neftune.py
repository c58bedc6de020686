"""NEFTune (arXiv 2310.05914): noise on the embeddings in training, evenly distributed in +-alpha / sqrt(L d).

L is the number of a row's tokens, d the embeddings' width. Rows of a group share the noise of the tokens that they
share, and the L of the longest of them. A group's noise depends on its seed alone, not on what is computed beside it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.model import pack

if TYPE_CHECKING:
    import torch


@contextmanager
def noisy(
    model: Any, packed: pack.Packed, part: Sequence[pack.Tree], alpha: float, seeds: Sequence[int]
) -> Iterator[None]:
    """Add noise to what the embedding layer of PEFT's `model` gives for `packed`, the trees of `part`, in the body.

    `seeds`: one for each tree. No noise with `alpha` 0.
    """
    if not alpha:
        yield
        return
    embedding = model.get_base_model().get_input_embeddings()
    length = packed.input_ids_1xL.shape[1]

    def add(_: Any, __: Any, embedded_1xLxD: "torch.Tensor") -> "torch.Tensor":
        noise_LxD = drawn(part, length, embedded_1xLxD.shape[-1], alpha, seeds, embedded_1xLxD.device)
        return embedded_1xLxD + noise_LxD.to(embedded_1xLxD.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def drawn(
    part: Sequence[pack.Tree], length: int, width: int, alpha: float, seeds: Sequence[int], device: "torch.device"
) -> "torch.Tensor":
    """The noise, LxD in float32, for trees that lie side by side in a sequence of `length` tokens; 0 behind them."""
    import torch

    noise_LxD = torch.zeros(length, width, device=device)
    start = 0
    for tree, seed in zip(part, seeds, strict=True):
        draw = torch.Generator(device).manual_seed(seed)
        bound = alpha / math.sqrt(tree.longest * width)
        noise_LxD[start : start + tree.tokens].uniform_(-bound, bound, generator=draw)
        start += tree.tokens
    return noise_LxD
