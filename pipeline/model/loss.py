"""Cross-entropy where there is a label, and nowhere else; perplexity from it.

With label smoothing (arXiv 1512.00567, section 7) the target is the label with the probability 1 - smoothing, and any
token of the vocabulary, the label included, with the rest.
"""

import math
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError
from pipeline.core.progress import bar
from pipeline.model import pack
from pipeline.model.prompt import Row

if TYPE_CHECKING:
    import torch


def logits(model: Any, packed: pack.Packed) -> "torch.Tensor":
    """The logits, 1xNxV, at the places that predict a supervised token."""
    logits_1xNxV: torch.Tensor = model(
        input_ids=packed.input_ids_1xL,
        # transformers passes on a mask of four dimensions as it is; `attention.grouped` reads the spans instead.
        attention_mask=packed.input_ids_1xL.new_empty(1, 1, 0, 0),
        position_ids=packed.position_ids_1xL,
        spans=packed.spans,
        logits_to_keep=packed.answer_at_N,
        use_cache=False,
    ).logits
    return logits_1xNxV


def summed(model: Any, packed: pack.Packed, smoothing: float = 0.0) -> "torch.Tensor":
    """Cross-entropy in nats, summed over the supervised tokens, each times its weight. `smoothing`: [0, 1)."""
    from torch.nn.functional import cross_entropy

    logits_NxV = logits(model, packed)[0].float()
    if packed.weight_N is None:
        return cross_entropy(logits_NxV, packed.target_N, reduction="sum", label_smoothing=smoothing)
    nats_N = cross_entropy(logits_NxV, packed.target_N, reduction="none", label_smoothing=smoothing)
    return nats_N @ packed.weight_N


def perplexity(model: Any, windows: list[list[int]], label: str) -> float:
    """exp of the mean negative log-likelihood, over all tokens but the first of each window.

    UserError if it is not finite. `label` names it there, and in the progress bar.
    """
    import torch

    total, count = 0.0, 0
    with torch.no_grad(), bar(label, sum(map(len, windows)), "tokens") as advance:
        for window in windows:
            packed = pack.pack([pack.tree([Row("", "", window[:1], window[1:])])], model.device)
            total += float(summed(model, packed))
            count += packed.target_N.numel()
            advance(len(window))
    value = math.exp(total / count)
    if not math.isfinite(value):
        raise UserError(f"{label} is {value}: the weights are damaged, or model.dtype is too narrow for them")
    return value
