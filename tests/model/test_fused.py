"""Fused layers compute what transformers and PEFT compute, forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.model import attention, fused

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
}
IDS = torch.arange(3, 27).view(2, 12)


def adapted(family: str, targets: Any = "all-linear", dropout: float = 0.0, implementation: str = "sdpa") -> Any:
    """The same adapted random model for the same arguments, its B not zero."""
    torch.manual_seed(1)
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    config = LoraConfig(r=4, lora_alpha=10, lora_dropout=dropout, target_modules=targets)
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


def results(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)
    logits = model(input_ids=IDS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, reference: Any) -> None:
    logits, gradients = results(model)
    expected_logits, expected = results(reference)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected.keys()
    assert len(gradients) > 7
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]], ids=["all", "some"])
def test_logits_and_gradients_are_those_of_the_libraries(family: str, targets: Any) -> None:
    model = adapted(family, targets, implementation=attention.NAME)
    fused.apply(model)
    assert_same(model, adapted(family, targets))


def test_a_llama_is_fused_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}
    for function in (fused.LoraLinear, fused.RmsNorm, fused.SwiGlu, fused.Rotary, attention.Short):

        def counted(*arguments: Any, of: Any = function, original: Any = function.apply) -> Any:
            calls[of.__name__] = calls.get(of.__name__, 0) + 1
            return original(*arguments)

        monkeypatch.setattr(function, "apply", counted)
    model = adapted("llama", implementation=attention.NAME)
    fused.apply(model)
    model(input_ids=IDS)
    # Two layers: qkv, o, gate and up, down; two norms a layer and one at the end.
    assert calls == {"LoraLinear": 8, "RmsNorm": 5, "SwiGlu": 2, "Rotary": 2, "Short": 2}


def test_dropout_is_that_of_peft() -> None:
    model, reference = adapted("llama", dropout=0.5), adapted("llama", dropout=0.5)
    fused.apply(model)
    model.train(), reference.train()
    without = results(adapted("llama").train())[0]
    assert not torch.allclose(results(model)[0], without)
    model.eval(), reference.eval()
    assert_same(model, reference)


def test_the_adapter_can_be_switched_and_switched_off() -> None:
    model, reference = adapted("llama"), adapted("llama")
    fused.apply(model)
    seen = []
    for name in ("default", "other", "default"):
        model.set_adapter(name), reference.set_adapter(name)
        assert_same(model, reference)
        seen.append(results(model)[0])
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1])
    with model.disable_adapter(), reference.disable_adapter(), torch.no_grad():
        off = model(input_ids=IDS).logits
        torch.testing.assert_close(off, reference(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(off, seen[0])


def test_fusing_twice_changes_nothing() -> None:
    model = adapted("llama")
    fused.apply(model)
    before = results(model)[0]
    fused.apply(model)
    assert torch.equal(results(model)[0], before)


def test_joined_weights_take_no_second_place_in_memory() -> None:
    model = adapted("llama")
    fused.apply(model)
    model(input_ids=IDS)
    layer = model.get_base_model().model.layers[0].self_attn
    storages = {getattr(layer, name).base_layer.weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj")}
    assert len(storages) == 1
