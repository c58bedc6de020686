"""The architecture's claims on a tiny Llama: its parts are the papers', and a part that is another is found out."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from claims import architecture, lab, parallelism, register
from claims.evidence import Evidence
from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.model import attention
from tests import ROOT

MEASUREMENTS: dict[str, Callable[[], Evidence]] = {
    "rmsnorm": architecture.rmsnorm,
    "rotary": architecture.rotary,
    "swiglu": architecture.swiglu_mlp,
    "causality": architecture.causality,
    "gqa-groups": architecture.gqa_groups,
    "scaled-dot-product": architecture.scaled_dot_product,
    "parallel-attention": architecture.parallel_attention,
}


@pytest.fixture(autouse=True)
def base(project: params.Params, tiny_model: Path) -> None:  # noqa: ARG001
    lab.BASE.parent.mkdir(parents=True)
    lab.BASE.symlink_to(tiny_model)


def failed(claim: str, evidence: Evidence) -> set[str]:
    """The measured values whose conditions do not hold."""
    entry = register.load(ROOT / register.FILE)[claim]
    findings = register.judge(entry, evidence).findings
    pairs = zip(entry.reproduced_when, findings, strict=True)
    return {condition.value for condition, finding in pairs if not finding.holds}


@pytest.mark.parametrize("claim", MEASUREMENTS)
def test_a_llama_is_what_the_papers_say(claim: str) -> None:
    # The tiny model's MLP is twice as wide as the model, not 8/3 times.
    assert failed(claim, MEASUREMENTS[claim]()) == ({"width_over_model_width"} if claim == "swiglu" else set())


def layer_norm(norm: Any, states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(states, states.shape[-1:], norm.weight, eps=norm.variance_epsilon)


def sublayers_side_by_side(layer: Any, states: torch.Tensor, **settings: Any) -> torch.Tensor:
    output, _ = layer.self_attn(hidden_states=layer.input_layernorm(states), **settings)
    return torch.as_tensor(states + output + layer.mlp(layer.post_attention_layernorm(states)))


def norms_after_sublayers(layer: Any, states: torch.Tensor, **settings: Any) -> torch.Tensor:
    states = layer.input_layernorm(states + layer.self_attn(hidden_states=states, **settings)[0])
    return torch.as_tensor(layer.post_attention_layernorm(states + layer.mlp(states)))


@pytest.mark.parametrize(
    ("kind", "other", "found"),
    [
        (modeling_llama.LlamaRMSNorm, layer_norm, {"formula_error", "shift_change"}),
        (modeling_llama.LlamaDecoderLayer, sublayers_side_by_side, {"order_error"}),
        (modeling_llama.LlamaDecoderLayer, norms_after_sublayers, {"order_error"}),
    ],
)
def test_another_norm_and_another_place_are_found(
    monkeypatch: pytest.MonkeyPatch, kind: Any, other: Any, found: set[str]
) -> None:
    monkeypatch.setattr(kind, "forward", other)
    assert failed("rmsnorm", architecture.rmsnorm()) == found


def test_what_is_no_number_in_a_later_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = architecture.base

    def base() -> Any:
        model = real()
        model.model.layers[-1].post_attention_layernorm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(architecture, "base", base)
    for measure in (architecture.rmsnorm, architecture.causality):
        with pytest.raises(ValueError, match="not finite"):
            measure()


def test_positions_that_are_not_rotated_evenly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = modeling_llama.LlamaRotaryEmbedding.forward
    monkeypatch.setattr(
        modeling_llama.LlamaRotaryEmbedding, "forward", lambda self, x, position_ids: real(self, x, position_ids**2 / 8)
    )
    assert failed("rotary", architecture.rotary()) == {"formula_error", "shift_error", "logits_shift"}


def test_no_positions_at_all_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda query, key, *_: (query, key))
    assert failed("rotary", architecture.rotary()) == {"formula_error", "distance_change"}


def test_another_gate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x)))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert failed("swiglu", architecture.swiglu_mlp()) == {"formula_error", "reglu_change", "width_over_model_width"}


def test_a_look_at_later_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention._attend

    def attend(query: Any, key: Any, value: Any, _mask: Any, scaling: float) -> Any:
        everything = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        return real(query, key, value, everything, scaling)

    monkeypatch.setattr(attention, "_attend", attend)
    assert failed("causality", architecture.causality()) == {"future_gradient"}


def test_cosines_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = modeling_llama.eager_attention_forward

    def cosine(module: Any, query: Any, key: Any, *given: Any, **settings: Any) -> Any:
        query, key = (torch.nn.functional.normalize(states, dim=-1) for states in (query, key))
        return real(module, query, key, *given, **settings | {"scaling": 1.0})

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", cosine)
    evidence = architecture.scaled_dot_product()
    assert failed("scaled-dot-product", evidence) == {"weights_error", "cosine_distance"}


def test_heads_that_read_another_key_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention._attend
    monkeypatch.setattr(
        attention, "_attend", lambda query, key, value, *rest: real(query, key.flip(1), value.flip(1), *rest)
    )
    assert failed("gqa-groups", architecture.gqa_groups()) == {"group_error"}
    assert failed("parallel-attention", architecture.parallel_attention()) == {"one_by_one_error", "summed_error"}
    assert failed("scaled-dot-product", architecture.scaled_dot_product()) == {"output_error"}


@pytest.mark.slow
def test_two_processes_give_the_model_and_not_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, base = parallelism._run, architecture.base

    def run(task: parallelism.Task) -> None:
        real(task)
        for rank in range(2):
            shutil.copy(task.folder / f"{rank}.pt", tmp_path)

    def again(task: parallelism.Task) -> None:
        for rank in range(2):
            shutil.copy(tmp_path / f"{rank}.pt", task.folder)

    def another() -> Any:
        model = base()
        model.model.layers[1].self_attn.o_proj.weight.data[:, -16:] = 0  # the last head's
        return model

    monkeypatch.setattr(parallelism, "PROCESSES", 2)
    monkeypatch.setattr(parallelism, "_run", run)
    evidence = parallelism.model_parallelism()
    assert failed("model-parallelism", evidence) == set()
    assert evidence.values["key_value_heads_a_process"] == 1
    monkeypatch.setattr(parallelism, "_run", again)
    monkeypatch.setattr(architecture, "base", another)
    assert failed("model-parallelism", parallelism.model_parallelism()) == {"logits_difference"}


@pytest.mark.slow
def test_a_member_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    task = parallelism.Task(tmp_path / "none", tmp_path, [1], 2, 16, 1e-5, 1e4, True, 1)
    with pytest.raises(RuntimeError, match="did not end well"):
        parallelism._run(task)


def test_heads_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UserError, match="attention_heads = 4, key_value_heads = 2, intermediate_size = 128"):
        parallelism.model_parallelism()
