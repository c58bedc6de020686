"""The parts of a LLaMA by the papers' formulas, checked on the weights of the default experiment's base.

While the model reads a text, each module's input and output are recorded. A measurement applies the paper's formula to
the input, in float64, and compares the result with the output, in float32. Dimensions: L tokens, C the width of the
model, H query heads, K key-value heads, G query heads per key-value head, D the size of a head, V the vocabulary.

Positions rotate pairs of dimensions. RoFormer pairs neighbours, and this model's weights pair i with i + D/2: the same
rotation with the dimensions in another order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from claims import evidence, lab
from claims.evidence import Evidence
from pipeline.core import params
from pipeline.model import checkpoint, devices

if TYPE_CHECKING:
    import torch

TEXT = (
    "A bridge carries its load to the ground in one of a few ways: a beam bends, an arch is pressed together, and a "
    "cable is pulled. Which of them is cheapest depends on the span, on the ground, and on what stands ready nearby."
)
SHIFTS = (1, 16, 128, 1024)
"""Numbers of tokens by which all positions are shifted."""
SCALES = (0.1, 3.0, 1000.0)


def rms_norm(states: "torch.Tensor", gain: "torch.Tensor", epsilon: float) -> "torch.Tensor":
    """RMSNorm (arXiv 1910.07467, equation 4), with the epsilon that implementations add under the root."""
    return states / (states.square().mean(-1, keepdim=True) + epsilon).sqrt() * gain


def rotated(states_HxLxD: "torch.Tensor", positions_L: "torch.Tensor", theta: float) -> "torch.Tensor":
    """Each pair of dimensions, as a complex number, times e^(i m theta^(-2j/D)) (RoFormer, section 3.2.2)."""
    import torch

    half = states_HxLxD.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle_LxF = positions_L.double()[:, None] * frequency
    turn_LxF = torch.polar(torch.ones_like(angle_LxF), angle_LxF)
    pairs_HxLxF = torch.complex(states_HxLxD[..., :half].double(), states_HxLxD[..., half:].double()) * turn_LxF
    return torch.cat([pairs_HxLxF.real, pairs_HxLxF.imag], -1).to(states_HxLxD.dtype)


def swiglu(x: "torch.Tensor", gate: "torch.Tensor", up: "torch.Tensor", down: "torch.Tensor") -> "torch.Tensor":
    """(Swish(x W) * x V) W2 (arXiv 2002.05202, equation 6); matrices are stored as in linear layers, outputs first."""
    gated = x @ gate.T
    return (gated * gated.sigmoid() * (x @ up.T)) @ down.T


def weights(scores_LxL: "torch.Tensor") -> "torch.Tensor":
    """Attention weights: for each token, the softmax over the scores of the tokens up to it."""
    import torch

    future_LxL = torch.ones_like(scores_LxL, dtype=torch.bool).triu(1)
    return scores_LxL.masked_fill(future_LxL, float("-inf")).softmax(-1)


def attended(query_LxD: "torch.Tensor", key_LxD: "torch.Tensor", value_LxD: "torch.Tensor") -> "torch.Tensor":
    """One head: softmax(Q K' / sqrt(D)) V (arXiv 1706.03762, equation 1)."""
    return weights(query_LxD @ key_LxD.T / query_LxD.shape[-1] ** 0.5) @ value_LxD


def error(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The largest relative difference among the rows: |found - expected| / |expected|."""
    return float(((found.double() - expected).norm(dim=-1) / expected.double().norm(dim=-1)).max())


@dataclass(frozen=True, slots=True)
class Reader:
    """The base in float32, with the inputs and outputs of its modules while it reads TEXT."""

    model: Any
    given: "dict[str, torch.Tensor]"
    gave: "dict[str, torch.Tensor]"
    """Inputs and outputs by the module's name. The output of an attention module is its weights, HxLxL, if the
    implementation returns them."""

    def weight(self, name: str) -> "torch.Tensor":
        weight: torch.Tensor = self.model.get_parameter(f"{name}.weight").double()
        return weight

    @property
    def layers(self) -> list[str]:
        return [f"model.layers.{number}" for number in range(self.model.config.num_hidden_layers)]

    @property
    def positions(self) -> "torch.Tensor":
        import torch

        return torch.arange(len(self.gave["model.embed_tokens"]))

    @property
    def theta(self) -> float:
        return theta(self.model)

    def heads(self, layer: str, kind: str) -> "torch.Tensor":
        """The output of q_proj, k_proj or v_proj by heads, before rotation: HxLxD or KxLxD, float64."""
        size = checkpoint.architecture(self.model).head_dim
        states_LxHD = self.gave[f"{layer}.self_attn.{kind}_proj"].double()
        states_HxLxD: torch.Tensor = states_LxHD.unflatten(-1, (-1, size)).transpose(0, 1)
        return states_HxLxD

    def attention_inputs(self, layer: str) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """Rotated queries HxLxD, rotated keys and values KxLxD."""
        query, key = (rotated(self.heads(layer, kind), self.positions, self.theta) for kind in "qk")
        return query, key, self.heads(layer, "v")


def base() -> Any:
    """The base in float32, on the CPU, since accelerators may round float32 products to fewer bits."""
    import torch

    runtime = params.load().runtime.model_copy(update={"device": "cpu"})
    return checkpoint.pretrained(lab.BASE, devices.choose(runtime), dtype=torch.float32).requires_grad_(False)


def theta(model: Any) -> float:
    """The base of the rotation's frequencies."""
    return float(model.config.rope_parameters["rope_theta"])


def ids() -> "torch.Tensor":
    """The token ids of TEXT, 1xL."""
    import torch

    return torch.tensor([checkpoint.tokenizer(lab.BASE)(TEXT, add_special_tokens=False).input_ids])


def _read(implementation: str | None = None) -> Reader:
    """Read TEXT with the pipeline's own attention, or with an implementation of transformers."""
    import torch

    reader = Reader(base(), {}, {})
    if implementation is not None:
        reader.model.set_attn_implementation(implementation)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: Any, given: tuple[Any, ...], gave: Any) -> None:
            last = gave[-1] if isinstance(gave, tuple) else gave
            if given and isinstance(given[0], torch.Tensor):
                reader.given[name] = given[0][0]
            if isinstance(last, torch.Tensor):
                reader.gave[name] = last[0]

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in reader.model.named_modules()]
    with torch.no_grad():
        reader.model(ids(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return reader


def rmsnorm() -> Evidence:
    """The norms against the formula, their invariances, and their places in the model."""
    reader = _read()
    epsilon = reader.model.config.rms_norm_eps
    formula, scale, shift = [], [], []
    names = [name for name in reader.gave if name.endswith("norm")]
    for name in names:
        norm, given = reader.model.get_submodule(name), reader.given[name]
        formula.append(error(reader.gave[name], rms_norm(given.double(), norm.weight.double(), epsilon)))
        norm.variance_epsilon = 0.0
        scale += [error(norm(given * factor), norm(given)) for factor in SCALES]
        shift.append(_change(norm(given + given.square().mean(-1, keepdim=True).sqrt()), norm(given)))
    return Evidence(
        {
            "norms": len(names),
            "norms_by_layers": 2 * len(reader.layers) + 1,
            "formula_error": evidence.largest(formula),
            "scale_error": evidence.largest(scale),
            "shift_change": evidence.least(shift),
            "order_error": _order_error(reader),
        },
        [f"The model adds {epsilon:g} under the root, which the paper does not; scale_error is taken without it."],
    )


def _order_error(reader: Reader) -> float:
    """The largest absolute difference between the model's residual stream and one in which each sublayer reads the norm
    of the stream and adds to it, and the head reads the norm of its end."""
    stream_LxC = reader.gave["model.embed_tokens"]
    pairs = []
    for layer in reader.layers:
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        pairs.append((reader.given[f"{layer}.input_layernorm"], stream_LxC))
        pairs.append((reader.given[f"{attention}.q_proj"], reader.gave[f"{layer}.input_layernorm"]))
        stream_LxC = stream_LxC + reader.gave[f"{attention}.o_proj"]
        pairs.append((reader.given[f"{layer}.post_attention_layernorm"], stream_LxC))
        pairs.append((reader.given[mlp], reader.gave[f"{layer}.post_attention_layernorm"]))
        stream_LxC = stream_LxC + reader.gave[mlp]
    pairs.append((reader.given["model.norm"], stream_LxC))
    pairs.append((reader.given["lm_head"], reader.gave["model.norm"]))
    return evidence.largest(float((one - other).abs().max()) for one, other in pairs)


def _change(found: "torch.Tensor", before: "torch.Tensor") -> float:
    """The relative difference of two whole tensors: how much a change of the formula moves the result."""
    return float((found.double() - before).norm() / before.double().norm())


def rotary() -> Evidence:
    """The rotation against the formula, and the dependence of scores and logits on positions."""
    import torch
    from transformers.models.llama import modeling_llama

    reader = _read()

    def turned(states_HxLxD: "torch.Tensor", positions_L: "torch.Tensor") -> "torch.Tensor":
        cos, sin = reader.model.model.rotary_emb(states_HxLxD, positions_L[None])
        query_1xHxLxD, _ = modeling_llama.apply_rotary_pos_emb(states_HxLxD[None], states_HxLxD[None], cos, sin)
        return torch.as_tensor(query_1xHxLxD[0])

    here_L = reader.positions
    formula, shifted, nearer = [], [], []
    for layer in reader.layers:
        query_HxLxD, key_KxLxD = reader.heads(layer, "q").float(), reader.heads(layer, "k").float()
        key_HxLxD = key_KxLxD.repeat_interleave(len(query_HxLxD) // len(key_KxLxD), 0)

        def scores(  # by the positions of queries and of keys
            query_at_L: "torch.Tensor", key_at_L: "torch.Tensor", query: Any = query_HxLxD, key: Any = key_HxLxD
        ) -> "torch.Tensor":
            return turned(query, query_at_L) @ turned(key, key_at_L).transpose(1, 2)

        formula.append(error(turned(query_HxLxD, here_L), rotated(query_HxLxD.double(), here_L, reader.theta)))
        unmoved_HxLxL = scores(here_L, here_L)
        shifted += [error(scores(here_L + shift, here_L + shift), unmoved_HxLxL) for shift in SHIFTS]
        nearer.append(_change(scores(here_L, here_L + 1), unmoved_HxLxL))
    with torch.no_grad():
        logits, moved = (reader.model(ids(), position_ids=here_L[None] + shift).logits for shift in (0, max(SHIFTS)))
    return Evidence(
        {
            "formula_error": evidence.largest(formula),
            "shift_error": evidence.largest(shifted),
            "distance_change": evidence.least(nearer),
            "logits_shift": float((moved - logits).abs().max()),
            "theta": reader.theta,
        },
        [
            f"The base of the frequencies is {reader.theta:,.0f} in this model, 10,000 in RoFormer.",
            "This model's weights pair dimension i with i + D/2 where RoFormer pairs neighbours: the same up to order.",
        ],
    )


def swiglu_mlp() -> Evidence:
    """All MLPs against the formula, the change by another gate, and their width."""
    reader = _read()
    formula, relu = [], []
    for layer in reader.layers:
        gate, up, down = (reader.weight(f"{layer}.mlp.{kind}_proj") for kind in ("gate", "up", "down"))
        x_LxC, gave_LxC = reader.given[f"{layer}.mlp"].double(), reader.gave[f"{layer}.mlp"]
        formula.append(error(gave_LxC, swiglu(x_LxC, gate, up, down)))
        relu.append(_change(gave_LxC, ((x_LxC @ gate.T).relu() * (x_LxC @ up.T)) @ down.T))
    config = reader.model.config
    return Evidence(
        {
            "formula_error": evidence.largest(formula),
            "reglu_change": evidence.least(relu),
            "width": config.intermediate_size,
            "width_over_model_width": config.intermediate_size / config.hidden_size,
        }
    )


def causality() -> Evidence:
    """The gradients of each token's logits, weighted at random, with respect to the embeddings of all tokens."""
    import torch

    model, ids_1xL = base(), ids()[:, :12]
    embedded_1xLxC = model.get_input_embeddings()(ids_1xL).requires_grad_()
    logits_LxV = model(inputs_embeds=embedded_1xLxC).logits[0]
    weight_V = torch.randn(logits_LxV.shape[1], generator=torch.Generator().manual_seed(0))
    last = len(logits_LxV) - 1
    future, past = [], []
    for at, logits_V in enumerate(logits_LxV):
        (gradient_1xLxC,) = torch.autograd.grad(logits_V @ weight_V, embedded_1xLxC, retain_graph=at < last)
        largest_L = gradient_1xLxC[0].abs().amax(-1)
        future += largest_L[at + 1 :].tolist()
        past += largest_L[: at + 1].tolist()
    return Evidence(
        {"tokens": last + 1, "future_gradient": evidence.largest(future), "past_gradient": evidence.least(past)}
    )


def gqa_groups() -> Evidence:
    """Every layer's heads against the formula, with the key-value head of their group, and with another one."""
    import torch

    reader = _read()
    facts = checkpoint.architecture(reader.model)
    heads, kv_heads = facts.attention_heads, facts.key_value_heads
    group = heads // kv_heads
    formula, other = [], []
    for layer in reader.layers:
        query, key, value = reader.attention_inputs(layer)
        found_LxHD = reader.given[f"{layer}.self_attn.o_proj"]
        right, wrong = (
            torch.cat([attended(query[h], key[kv], value[kv]) for h, kv in enumerate(chosen)], -1)
            for chosen in ([h // group for h in range(heads)], [h % kv_heads for h in range(heads)])
        )
        formula.append(error(found_LxHD, right))
        other.append(_change(found_LxHD, wrong))
    return Evidence(
        {
            "query_heads": heads,
            "key_value_heads": kv_heads,
            "group_error": evidence.largest(formula),
            "other_heads_change": evidence.least(other),
        },
        [
            f"Query head h reads key-value head h // {group}; other_heads_change is what h % {kv_heads} would give.",
            "Of the Llama 2 models, 34B and 70B have grouped-query attention; 7B and 13B have none.",
        ],
    )


def scaled_dot_product() -> Evidence:
    """The model's attention weights against the softmax of scaled dot products, of plain ones, and of cosines."""
    import torch

    formula, unscaled, cosine = [], [], []
    reader = _read("eager")  # the only implementation that returns its weights
    for layer in reader.layers:
        query_HxLxD, key_KxLxD, _ = reader.attention_inputs(layer)
        key_HxLxD = key_KxLxD.repeat_interleave(len(query_HxLxD) // len(key_KxLxD), 0)
        dot_HxLxL = query_HxLxD @ key_HxLxD.transpose(1, 2)
        lengths_HxLxL = query_HxLxD.norm(dim=-1)[:, :, None] * key_HxLxD.norm(dim=-1)[:, None]
        found_HxLxL = reader.gave[f"{layer}.self_attn"]
        expected_HxLxL = weights(dot_HxLxL / query_HxLxD.shape[-1] ** 0.5)
        formula.append(float((found_HxLxL.double() - expected_HxLxL).abs().max()))
        unscaled.append(_variation(found_HxLxL, weights(dot_HxLxL)))
        cosine.append(_variation(found_HxLxL, weights(dot_HxLxL / lengths_HxLxL)))
    output = []
    reader = _read()  # the pipeline's implementation
    for layer in reader.layers:
        query_HxLxD, *shared = reader.attention_inputs(layer)
        key_HxLxD, value_HxLxD = (states.repeat_interleave(len(query_HxLxD) // len(states), 0) for states in shared)
        heads = [attended(*head) for head in zip(query_HxLxD, key_HxLxD, value_HxLxD, strict=True)]
        output.append(error(reader.given[f"{layer}.self_attn.o_proj"], torch.cat(heads, -1)))
    return Evidence(
        {
            "weights_error": evidence.largest(formula),
            "output_error": evidence.largest(output),
            "unscaled_distance": evidence.least(unscaled),
            "cosine_distance": evidence.least(cosine),
        },
        [
            "A description from which this project started takes attention for cosine similarity. The paper's is the "
            "dot product over sqrt(D), and so is the model's: the lengths of queries and keys count.",
            "Distances: total variation between two distributions over tokens, mean of rows, least of layers.",
        ],
    )


def _variation(found: "torch.Tensor", other: "torch.Tensor") -> float:
    return float((found.double() - other).abs().sum(-1).mean() / 2)


def parallel_attention() -> Evidence:
    """Every layer's attention with its heads computed one after another, each from its own slices of the weights."""
    import torch

    reader = _read()
    facts = checkpoint.architecture(reader.model)
    heads, size = facts.attention_heads, facts.head_dim
    group = heads // facts.key_value_heads
    concatenated, summed = [], []
    for layer in reader.layers:
        x_LxC = reader.given[f"{layer}.self_attn.q_proj"].double()
        query, key, value = (reader.weight(f"{layer}.self_attn.{kind}_proj").split(size) for kind in "qkv")
        out_CxHD = reader.weight(f"{layer}.self_attn.o_proj")
        one_by_one = []
        for head in range(heads):
            q, k = (
                rotated((x_LxC @ weight.T)[None], reader.positions, reader.theta)[0]
                for weight in (query[head], key[head // group])
            )
            one_by_one.append(attended(q, k, x_LxC @ value[head // group].T))
        found_LxC = reader.gave[f"{layer}.self_attn.o_proj"]
        heads_LxHD = torch.cat(one_by_one, -1)
        concatenated.append(error(found_LxC, heads_LxHD @ out_CxHD.T))
        parts = zip(one_by_one, out_CxHD.split(size, 1), strict=True)
        summed.append(error(found_LxC, torch.stack([part @ out.T for part, out in parts]).sum(0)))
    return Evidence(
        {
            "heads": heads,
            "heads_times_size": heads_LxHD.shape[-1],
            "model_width": found_LxC.shape[-1],
            "one_by_one_error": evidence.largest(concatenated),
            "summed_error": evidence.largest(summed),
        },
        ["summed_error: each head through its own columns of the output projection, and the products added up."],
    )


if __name__ == "__main__":
    evidence.main(
        {
            "rmsnorm": rmsnorm,
            "rotary": rotary,
            "swiglu": swiglu_mlp,
            "causality": causality,
            "gqa-groups": gqa_groups,
            "scaled-dot-product": scaled_dot_product,
            "parallel-attention": parallel_attention,
        }
    )
