"""The same layers with less memory traffic: LoRA, RMSNorm, SwiGLU and rotary embedding as single differentiable steps.

Each step computes what transformers and PEFT compute, keeps only its inputs for the backward pass, and adds in place.
`apply` puts the steps into the layers of a loaded model that they can replace, and leaves other layers alone.
Dimensions: L tokens, I and O a layer's inputs and outputs, R the adapter's rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.model import shard
from pipeline.model.groups import GroupLinear

RMS_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
SWIGLUS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
ATTENTIONS = frozenset({"LlamaAttention"})


def apply(model: Any) -> None:
    """Let the layers of a loaded model, with or without an adapter, compute their fused equivalents from now on."""
    sharding = shard.kind(model)
    if sharding == "tensor":  # the steps that would be replaced also add up over the processes
        return
    siblings = partial(Siblings, join=sharding == "none")
    for layer in model.modules():
        name = type(layer).__name__
        if "forward" in vars(layer):
            continue
        if name in RMS_NORMS:
            layer.forward = partial(_rms_norm, layer)
        elif name in SWIGLUS and type(layer.act_fn).__name__ in ("SiLU", "SiLUActivation"):
            layer.forward = partial(_swiglu, layer, siblings(layer, ("gate_proj", "up_proj")))
        elif name in ATTENTIONS:
            layer.forward = partial(_attention, layer, siblings(layer, ("q_proj", "k_proj", "v_proj")))
        elif name in ("Linear", "Linear4bit") and hasattr(layer, "lora_A"):
            layer.forward = partial(_lora, layer, layer.forward)


@contextmanager
def apart(model: Any) -> Iterator[None]:
    """Within it, layers that read one input are called one by one, so that hooks on them are."""
    joined = [layer for layer in model.modules() if type(layer).__name__ in SWIGLUS | ATTENTIONS]
    held = {layer: vars(layer).pop("forward") for layer in joined if "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in held.items():
            layer.forward = forward


class LoraLinear(torch.autograd.Function):
    """x W' + b + (x A') B', with W and b frozen (arXiv 2106.09685, equation 3; B comes scaled).

    W is a function, called in both passes: 4-bit weights are unpacked twice, and not kept in between.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OxI: Callable[[], torch.Tensor],
        bias_O: torch.Tensor | None,
        a_RxI: torch.Tensor,
        b_OxR: torch.Tensor,
    ) -> torch.Tensor:
        x_LxI = x.reshape(-1, x.shape[-1])
        hidden_LxR = x_LxI @ a_RxI.T
        y_LxO = torch.nn.functional.linear(x_LxI, weight_OxI(), bias_O).addmm_(hidden_LxR, b_OxR.T)
        # Without a gradient of A the input is not needed again (LoRA-FA, arXiv 2308.03303).
        ctx.save_for_backward(x_LxI if ctx.needs_input_grad[3] else None, hidden_LxR, a_RxI, b_OxR)
        ctx.weight_OxI = weight_OxI
        return y_LxO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_LxI, hidden_LxR, a_RxI, b_OxR = ctx.saved_tensors
        grad_LxO = grad.reshape(-1, grad.shape[-1])
        back_LxR = grad_LxO @ b_OxR
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_LxO @ ctx.weight_OxI()).addmm_(back_LxR, a_RxI).view(*grad.shape[:-1], -1)
        grad_a = None if x_LxI is None else back_LxR.T @ x_LxI
        grad_b = grad_LxO.T @ hidden_LxR if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b


class Siblings:
    """Linear layers that read the same input, computed as one product with their weights concatenated.

    With `join`, plain weights are concatenated once and for all. Without it (other processes hold parts of them), they
    are concatenated for each product.
    """

    def __init__(self, parent: Any, names: tuple[str, ...], join: bool) -> None:
        self.parent, self.names, self.join = parent, names, join
        self.joined: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layers' outputs side by side."""
        layers = [getattr(self.parent, name) for name in self.names]
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        adapters = [_adapter(layer, x) for layer in layers]
        if None in adapters or not all(_is_linear(base) and base.bias is None for base in bases):
            return torch.cat([layer(x) for layer in layers], -1)
        acting = [pair for pair in adapters if pair]
        if not acting:
            return torch.nn.functional.linear(x, self._weight(bases))
        a_RxI = torch.cat([a for a, _ in acting])
        b_OxR = torch.block_diag(
            *(
                pair[1] if pair else x.new_zeros(base.out_features, 0)
                for pair, base in zip(adapters, bases, strict=True)
            )
        )
        return LoraLinear.apply(x, partial(self._weight, bases), None, a_RxI, b_OxR)

    def _weight(self, bases: list[Any]) -> torch.Tensor:
        if not self.join or any(type(base) is not torch.nn.Linear for base in bases):
            return torch.cat([dense(base) for base in bases])
        if self.joined is None:
            self.joined = torch.cat([base.weight for base in bases])
            for base, part in zip(bases, self.joined.split([base.out_features for base in bases]), strict=True):
                base.weight.data = part
        return self.joined


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * w with w frozen; the norm is taken in float32 (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon))
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        wide = (grad * weight).float()
        inner = (wide * normal).mean(-1, keepdim=True)
        return (wide.sub_(normal.mul_(inner)).mul_(scale)).to(x.dtype), None, None


class Rotary(torch.autograd.Function):
    """Rotary position embedding (arXiv 2104.09864) of BxLxHxD by cosines and sines BxLxD; backward turns back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(x, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return _rotate(grad, cosine, -sine), None, None


class SwiGlu(torch.autograd.Function):
    """silu(g) u (arXiv 2002.05202), which keeps only g and u."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = torch.nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    sine = sine[:, :, None]
    turned = x * cosine[:, :, None]
    turned[..., :half] -= x[..., half:] * sine[..., :half]
    turned[..., half:] += x[..., :half] * sine[..., half:]
    return turned


def _adapter(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """A (RxI) and the scaled B (OxR) that act on a layer; () without an adapter, None for more than equation 3.

    Several adapters that act at once are one of their ranks' sum.
    """
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return None if getattr(layer, "merged", False) else ()
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or (layer.base_layer.bias is not None and layer.base_layer.bias.requires_grad):
        return None
    pairs = []
    for name in active:
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        drops = dropout.training and not isinstance(dropout, torch.nn.Identity)
        if drops or name in layer.lora_variant or a.bias is not None or b.bias is not None or a.weight.dtype != x.dtype:
            return None
        pairs.append((a.weight, b.weight * layer.scaling[name]))
    if len(pairs) < 2:
        return pairs[0] if pairs else ()
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)


def _lora(layer: Any, plain: Callable[..., Any], x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    """Equation 3 as one step; PEFT's own forward wherever it does more."""
    adapter = _adapter(layer, x)
    if not adapter or arguments or options or not _is_linear(layer.base_layer):
        return plain(x, *arguments, **options)
    return LoraLinear.apply(x, partial(dense, layer.base_layer), layer.base_layer.bias, *adapter)


def _is_linear(layer: Any) -> bool:
    from bitsandbytes.nn import Linear4bit

    return type(layer) in (torch.nn.Linear, Linear4bit, GroupLinear)


def dense(layer: Any) -> torch.Tensor:
    """The weight of a linear layer, unpacked if it is held in 4 bits."""
    if type(layer) is torch.nn.Linear:
        return layer.weight
    if isinstance(layer, GroupLinear):
        return layer.dense()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.quant_state)


def _rms_norm(layer: Any, x: torch.Tensor) -> Any:
    return RmsNorm.apply(x, layer.weight, layer.variance_epsilon)


def _swiglu(layer: Any, projections: Siblings, x: torch.Tensor) -> Any:
    return layer.down_proj(SwiGlu.apply(*projections(x).chunk(2, -1)))


def _attention(
    layer: Any,
    projections: Siblings,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """LlamaAttention's forward pass, with one projection and one rotation for queries and keys together."""
    batch, length, _ = hidden_states.shape
    heads, kv_heads = layer.config.num_attention_heads, layer.config.num_key_value_heads
    states_BxLxHxD = projections(hidden_states).view(batch, length, -1, layer.head_dim)
    turned_BxLxHxD, value_BxLxHxD = states_BxLxHxD.split([heads + kv_heads, kv_heads], 2)
    query, key = Rotary.apply(turned_BxLxHxD, *position_embeddings).transpose(1, 2).split([heads, kv_heads], 1)
    value = value_BxLxHxD.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, layer.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[layer.config._attn_implementation]
    output, _ = attend(layer, query, key, value, attention_mask, scaling=layer.scaling, **options)
    return layer.o_proj(output.reshape(batch, length, -1)), None
