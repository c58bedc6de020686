"""Grouped-query attention (Llama 2, arXiv 2307.09288) over plain and packed sequences, for transformers' models.

Dimensions: B sequences, Q queries, C keys and values, H key-value heads, G query heads a key-value head, D their size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pipeline.core.errors import UserError

NAME = "grouped"
"""The `attn_implementation` under which transformers finds `grouped`."""


def grouped(
    _module: Any,
    query_BxHGxQxD: torch.Tensor,
    key_BxHxCxD: torch.Tensor,
    value_BxHxCxD: torch.Tensor,
    mask_Bx1xQxC: torch.Tensor | None,
    scaling: float,
    spans: Sequence[tuple[int, torch.Tensor | None]] | None = None,
    softcap: float | None = None,
    beginning: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention's output, BxQxHGxD, and None for its weights.

    `beginning` holds, by layer, the HxPxD keys and values of P tokens that stand before all B sequences alike.

    Without a mask each token sees itself and those before it. `spans` are the parts of a packed sequence that do not
    see each other, as lengths and masks (1x1xLxL, or None): each part is computed by itself, and `mask_Bx1xQxC` is not
    read. UserError for a model that caps its attention scores (`softcap`, Gemma 2).
    """
    if softcap is not None:
        raise UserError("the model caps its attention scores (attn_logit_softcapping), which is not offered here")
    if beginning is not None:
        assert mask_Bx1xQxC is not None
        shared = beginning[_module.layer_idx]
        output_BxHGxQxD = _attend_behind(shared, query_BxHGxQxD, key_BxHxCxD, value_BxHxCxD, mask_Bx1xQxC, scaling)
    elif spans is None:
        output_BxHGxQxD = _attend(query_BxHGxQxD, key_BxHxCxD, value_BxHxCxD, mask_Bx1xQxC, scaling)
    else:
        lengths = [length for length, _ in spans]
        parts = [
            _attend(query, key, value, mask, scaling)
            for query, key, value, (_, mask) in zip(
                query_BxHGxQxD.split(lengths, 2),
                key_BxHxCxD.split(lengths, 2),
                value_BxHxCxD.split(lengths, 2),
                spans,
                strict=True,
            )
        ]
        output_BxHGxQxD = torch.cat(parts, 2)
    return output_BxHGxQxD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    query_BxHGxQxD: torch.Tensor,
    key_BxHxCxD: torch.Tensor,
    value_BxHxCxD: torch.Tensor,
    mask_Bx1xQxC: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention with the G query heads of a key-value head as more queries of that head, not with copied keys."""
    batch, _, width, size = query_BxHGxQxD.shape
    heads, columns = key_BxHxCxD.shape[1:3]
    if mask_Bx1xQxC is None and width == columns and _flash(query_BxHGxQxD, key_BxHxCxD, value_BxHxCxD):
        return torch.nn.functional.scaled_dot_product_attention(
            query_BxHGxQxD, key_BxHxCxD, value_BxHxCxD, is_causal=True, scale=scaling, enable_gqa=True
        )
    if mask_Bx1xQxC is None:
        visible_QxC = torch.ones(width, columns, dtype=torch.bool, device=query_BxHGxQxD.device).tril(columns - width)
        mask_Bx1xQxC = visible_QxC[None, None]
    query_BxHxGQxD = query_BxHGxQxD.reshape(batch, heads, -1, size)
    group = query_BxHxGQxD.shape[2] // width
    mask_Bx1xGQxC = mask_Bx1xQxC.repeat(1, 1, group, 1) if width > 1 else mask_Bx1xQxC
    if Short.serves(query_BxHxGQxD, columns):
        output_BxHxGQxD = Short.apply(query_BxHxGQxD, key_BxHxCxD, value_BxHxCxD, mask_Bx1xGQxC, scaling)
    else:
        output_BxHxGQxD = torch.nn.functional.scaled_dot_product_attention(
            query_BxHxGQxD, key_BxHxCxD, value_BxHxCxD, attn_mask=mask_Bx1xGQxC, scale=scaling
        )
    return output_BxHxGQxD.reshape(batch, -1, width, size)


def _attend_behind(
    beginning: tuple[torch.Tensor, torch.Tensor],
    query_BxHGxQxD: torch.Tensor,
    key_BxHxCxD: torch.Tensor,
    value_BxHxCxD: torch.Tensor,
    mask_Bx1xQxC: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention to a beginning of P tokens that all sequences share, and to C tokens of each.

    `mask_Bx1xQxC` is added to the scores of the latter. On a CPU, a step of one token a sequence reads the beginning
    once for all of them: both parts are attended to by themselves, and weighed by the sums of their exponentials.
    """
    key_HxPxD, value_HxPxD = beginning
    batch, _, width, size = query_BxHGxQxD.shape
    heads, length = key_HxPxD.shape[:2]
    if width > 1 or query_BxHGxQxD.device.type != "cpu":
        key_BxHxPCxD = torch.cat([key_HxPxD.expand(batch, -1, -1, -1), key_BxHxCxD], 2)
        value_BxHxPCxD = torch.cat([value_HxPxD.expand(batch, -1, -1, -1), value_BxHxCxD], 2)
        mask_Bx1xQxPC = torch.nn.functional.pad(mask_Bx1xQxC, (length, 0))
        return _attend(query_BxHGxQxD, key_BxHxPCxD, value_BxHxPCxD, mask_Bx1xQxPC, scaling)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    query_BxHxGxD = query_BxHGxQxD.reshape(batch, heads, -1, size)
    together_1xHxBGxD = query_BxHxGxD.transpose(0, 1).reshape(1, heads, -1, size)
    shared_1xHxBGxD, shared_sums_1xHxBG = attend(together_1xHxBGxD, key_HxPxD[None], value_HxPxD[None], scale=scaling)
    own_BxHxGxD, own_sums_BxHxG = attend(
        query_BxHxGxD, key_BxHxCxD, value_BxHxCxD, attn_mask=mask_Bx1xQxC, scale=scaling
    )
    shared_BxHxGxD = shared_1xHxBGxD.view(heads, batch, -1, size).transpose(0, 1)
    shared_sums_BxHxG = shared_sums_1xHxBG.view(heads, batch, -1).transpose(0, 1)
    share_BxHxGx1 = torch.sigmoid(shared_sums_BxHxG - own_sums_BxHxG)[..., None]
    output_BxHxGxD = torch.lerp(own_BxHxGxD.float(), shared_BxHxGxD.float(), share_BxHxGx1.float())
    return output_BxHxGxD.to(query_BxHGxQxD.dtype).reshape(batch, -1, 1, size)


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch computes this by FlashAttention, which knows no mask but the causal one (arXiv 2307.08691)."""
    if query.device.type != "cuda":
        return False
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(asked)


def describe(device: str) -> str:
    """Which attention training uses on a device, in words: the rule that `_attend` follows."""
    return {
        "cpu": f"weights kept up to {Short.COLUMNS} columns, torch's tiled kernel above",
        "cuda": "FlashAttention for rows by themselves, torch's choice under a mask for rows that share a beginning",
        "mps": "torch's scaled_dot_product_attention under a mask",
    }[device]


class Short(torch.autograd.Function):
    """softmax(s q k' + mask) v, which keeps all weights for the backward pass.

    In training on a CPU, it is twice as fast as the tiled kernel for sequences of a few hundred tokens.
    """

    COLUMNS = 768

    @classmethod
    def serves(cls, query: torch.Tensor, columns: int) -> bool:
        return query.requires_grad and query.device.type == "cpu" and columns <= cls.COLUMNS

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        q, k, v = (states.flatten(0, 1) for states in (query, key, value))
        hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
        scores = torch.bmm(q, k.transpose(1, 2)).view(*query.shape[:3], -1)
        weights = torch.softmax(torch.add(hidden, scores, alpha=scale), -1).flatten(0, 1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        batch = grad.shape[:2]
        grad = grad.flatten(0, 1)
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        grad_query, grad_key = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        return (*(states.unflatten(0, batch) for states in (grad_query, grad_key, grad_value)), None, None)
