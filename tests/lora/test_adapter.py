"""Adapters: the right layers, plain PEFT files, and a proof that they act once loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.core.errors import UserError
from pipeline.lora import adapter, start
from pipeline.model import attention
from tests.made.parameters import lora


@pytest.fixture
def base(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention.NAME).requires_grad_(False)


def made(tiny_model: Path, folder: Path, seed: int, **changes: Any) -> Path:
    """An adapter that acts, in `folder`, of a base with the digest abc."""
    adapted = start.attach(AutoModelForCausalLM.from_pretrained(tiny_model), lora(**changes), seed)
    for name, tensor in adapter.tensors(adapted).items():
        if "lora_B" in name:
            tensor.data.fill_(0.01)
    adapter.save(adapted, adapter.tensors(adapted), folder, "abc")
    return folder


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Path:
    return made(tiny_model, tmp_path / "a", 1)


def test_all_linear_is_every_linear_layer_but_the_head(base: Any) -> None:
    adapted = start.attach(base, lora(), 1)
    # 2 layers, 7 matrices each; r (in + out) parameters a matrix, hidden 64, kv 32, MLP 128.
    each = 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert sum(tensor.numel() for tensor in adapter.tensors(adapted).values()) == 2 * each
    assert not any("lm_head" in name or "embed" in name for name in adapter.tensors(adapted))


def test_named_layers_alone_are_adapted_and_unknown_ones_refused(base: Any) -> None:
    with pytest.raises(UserError, match=r"lora.target_modules names qproj, .*it has down_proj, gate_proj"):
        start.attach(base, lora(target_modules=["qproj"]), 1)
    adapted = start.attach(base, lora(target_modules=["q_proj", "v_proj"]), 1)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter.tensors(adapted)} == {"q_proj", "v_proj"}


def test_initialization_depends_on_the_seed_alone(tiny_model: Path) -> None:
    def first(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        fresh = AutoModelForCausalLM.from_pretrained(tiny_model)
        return next(iter(adapter.tensors(start.attach(fresh, lora(), seed)).values())).detach()

    assert torch.equal(first(1, 10), first(1, 20))
    assert not torch.equal(first(1, 10), first(2, 10))


def test_plain_peft_loads_it_and_it_changes_the_logits(saved: Path, tiny_model: Path) -> None:
    from peft import PeftModel

    fresh = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7]])
    before = fresh(ids).logits.detach()
    after = PeftModel.from_pretrained(fresh, saved)(ids).logits.detach()
    assert float((before - after).abs().max()) > 1e-3
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "origin.json",
    ]


def test_the_files_are_the_same_in_every_process(saved: Path) -> None:
    """The names of the layers come out of a set, and strings hash differently in each process."""
    names = json.loads((saved / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 7
    assert names == sorted(names)


def test_it_loads_on_its_own_base_alone(saved: Path, base: Any) -> None:
    with pytest.raises(UserError, match=r"was trained on another base \(sha256 abc\) than the one loaded \(def\)"):
        adapter.Saved(saved).load(base, "def")
    assert adapter.logit_change(adapter.Saved(saved).load(base, "abc")) > 0


def test_several_adapters_on_one_base_give_what_each_gives_alone(saved: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = made(tiny_model, tmp_path / "b", 2, r=8, target_modules=["q_proj", "down_proj"])
    ids = torch.arange(3, 15)[None]

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention.NAME).eval()

    with torch.no_grad():
        alone = [adapter.Saved(folder).load(fresh(), "abc")(ids).logits for folder in (saved, other)]
        both = adapter.Saved(other).load(adapter.Saved(saved).load(fresh(), "abc", "first"), "abc", "second")
        assert torch.equal(both(ids).logits, alone[1])
        both.set_adapter("first")
        assert torch.equal(both(ids).logits, alone[0])
        both.set_adapter("second")
        assert torch.equal(both(ids).logits, alone[1])
        with both.disable_adapter():
            torch.testing.assert_close(both(ids).logits, fresh()(ids).logits)
    with pytest.raises(UserError, match="already holds an adapter named first"):
        adapter.Saved(saved).load(both, "abc", "first")


def planted(saved: Path, change: str) -> None:
    tensors = load_file(saved / adapter.WEIGHTS)
    name = next(name for name in tensors if "lora_B" in name)
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["base_model.model.extra.lora_B.weight"] = torch.zeros(2)
    elif change == "nan":
        tensors[name][0] = float("nan")
    else:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(tensors, saved / adapter.WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "missing or unexpected"),
        ("unexpected", "missing or unexpected"),
        ("nan", "NaN or infinity"),
        ("zero", "does not change the model's logits"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_that_is_not_applied_whole_is_refused(saved: Path, base: Any, change: str, message: str) -> None:
    planted(saved, change)
    with pytest.raises(UserError, match=message):
        adapter.Saved(saved).load(base, "abc")


def test_a_broken_adapter_is_not_saved(base: Any, tmp_path: Path) -> None:
    adapted = start.attach(base, lora(), 1)
    next(iter(adapter.tensors(adapted).values())).data[0] = float("inf")
    with pytest.raises(UserError, match="NaN or infinity"):
        adapter.save(adapted, adapter.tensors(adapted), tmp_path / "bad", "abc")
    assert not (tmp_path / "bad").exists()
