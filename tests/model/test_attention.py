"""Grouped-query attention: what torch computes with repeated heads, with and without a mask, packed or not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma2Config, Gemma2ForCausalLM

from pipeline.core.errors import UserError
from pipeline.model import attention


def states(batch: int, queries: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    made = [
        torch.randn(batch, heads, length, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, length in ((6, queries), (2, columns), (2, columns))
    ]
    return made[0], made[1], made[2]


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    key, value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=0.3)
    return output.transpose(1, 2)


@pytest.mark.parametrize("length", [9, attention.Short.COLUMNS + 1], ids=["short", "long"])
def test_output_and_gradients_are_those_of_repeated_heads(length: int) -> None:
    seen = []
    for ours in (True, False):
        query, key, value = states(2, length, length)
        output = attention.grouped(None, query, key, value, None, 0.3)[0] if ours else expected(query, key, value)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        seen.append([output.detach(), query.grad, key.grad, value.grad])
    for mine, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_query_behind_a_cache_sees_what_lies_before_it() -> None:
    query, key, value = (tensor.detach() for tensor in states(1, 1, 7))
    output, _ = attention.grouped(None, query, key, value, None, 0.3)
    torch.testing.assert_close(output, expected(query, key, value, torch.ones(1, 7, dtype=torch.bool)))


def test_parts_of_a_packed_sequence_do_not_see_each_other() -> None:
    query, key, value = (tensor.detach() for tensor in states(1, 9, 9))
    spans = [(n, torch.ones(1, 1, n, n, dtype=torch.bool).tril()) for n in (4, 5)]
    output, _ = attention.grouped(None, query, key, value, None, 0.3, spans=spans)
    for part in (slice(0, 4), slice(4, 9)):
        alone = expected(query[:, :, part], key[:, :, part], value[:, :, part])
        torch.testing.assert_close(output[:, part], alone)


def test_a_softcap_is_refused_and_not_ignored() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
    settings = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=50.0)
    model = Gemma2ForCausalLM(settings)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(UserError, match="attn_logit_softcapping"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("capable", [True, False], ids=["flash", "no flash"])
def test_on_cuda_a_row_by_itself_is_causal_without_a_mask(capable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is faked: what CUDA would be asked for is computed here, and equals the masked computation."""
    asked: list[bool] = []

    def sdpa(*given: Any, **options: Any) -> torch.Tensor:
        asked.append(options.get("is_causal", False))
        return scaled_dot_product_attention(*given, **options)

    monkeypatch.setattr(attention, "_flash", lambda *_: capable)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    seen = []
    for spans in ([(4, None), (5, None)], [(n, torch.ones(1, 1, n, n, dtype=torch.bool).tril()) for n in (4, 5)]):
        query, key, value = states(1, 9, 9)
        output, _ = attention.grouped(None, query, key, value, None, 0.3, spans=spans)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        seen.append([output.detach(), query.grad, key.grad, value.grad])
    for unmasked, masked in zip(*seen, strict=True):
        torch.testing.assert_close(unmasked, masked)
    assert asked == ([True, True] if capable else [])  # without a mask first; short sequences here keep their weights


def test_flash_is_what_torch_says_it_is_and_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = states(1, 9, 9)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: True)
    assert not attention._flash(query, key, value)
    faked = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *given: given)
    for answer in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _, answer=answer: answer)
        assert attention._flash(faked, key, value) is answer  # type: ignore[arg-type]


def test_every_device_has_a_rule_that_is_recorded() -> None:
    assert len({attention.describe(name) for name in ("cpu", "cuda", "mps")}) == 3
    assert str(attention.Short.COLUMNS) in attention.describe("cpu")
