"""Noise on the embeddings: as large as the paper says, a group's own whatever is beside it, in training alone."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.lora import neftune
from pipeline.model import loss, pack
from pipeline.model.prompt import Row
from tests.made.trainer import LORA, fresh, some_trees, trainer

CPU = torch.device("cpu")


def test_the_noise_is_evenly_distributed_up_to_the_papers_bound_and_zero_behind_the_rows() -> None:
    """arXiv 2310.05914, algorithm 1: uniform in [-1, 1], times alpha / sqrt(L d)."""
    row = Row("", "", list(range(20, 60)), [1] * 24)
    noise = neftune.drawn([pack.tree([row])], 128, 512, 5.0, [3], CPU)
    bound = 5.0 / math.sqrt(64 * 512)
    drawn = noise[:63]
    assert 0.99 * bound < float(drawn.abs().max()) <= bound
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02 * bound)
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not noise[63:].any()


def test_the_noise_of_a_group_does_not_depend_on_what_is_beside_it() -> None:
    first, second, *_ = some_trees()
    together = neftune.drawn([first, second], 192, 64, 5.0, [1, 2], CPU)
    swapped = neftune.drawn([second, first], 192, 64, 5.0, [2, 1], CPU)
    assert torch.equal(together[: first.tokens], swapped[second.tokens :][: first.tokens])
    assert torch.equal(together[first.tokens :][: second.tokens], swapped[: second.tokens])
    assert not torch.equal(together[: first.tokens], together[first.tokens :][: first.tokens])


def test_loss_and_gradients_are_those_of_plain_torch_with_the_same_noise(tiny_model: Path) -> None:
    row = Row("", "", list(range(20, 50)), [80, 81, 1])
    tree = pack.tree([row])
    packed = pack.pack([tree], CPU)
    model = fresh(tiny_model, LORA.model_copy(update={"dropout": 0.0}))
    for tensor in model.parameters():  # B is zero: A would have no gradient
        if tensor.requires_grad:
            torch.nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(1))
    with neftune.noisy(model, packed, [tree], 15.0, [4]):
        found = loss.summed(model, packed)
    found.backward()
    gradients = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    ids = torch.tensor([[*row.prompt, *row.completion[:-1]]])
    bound = 15.0 / math.sqrt(33 * 64)
    noise = torch.empty(32, 64).uniform_(-bound, bound, generator=torch.Generator().manual_seed(4))
    base = model.get_base_model()
    logits = base(inputs_embeds=base.get_input_embeddings()(ids) + noise).logits[0, 29:]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row.completion), reduction="sum")
    expected.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert len(gradients) == 28
    for name, tensor in model.named_parameters():
        if tensor.grad is not None:
            assert torch.allclose(tensor.grad, gradients[name], rtol=1e-3, atol=1e-5), name
    without = float(loss.summed(model, packed).detach())
    assert abs(without - float(found.detach())) > 1e-3


def test_steps_have_noise_that_the_seed_decides_and_validation_has_none(tiny_model: Path) -> None:
    noisy, again, other, plain = (trainer(tiny_model, neftune_alpha=alpha) for alpha in (10.0, 10.0, 10.0, 0.0))
    other.seed = 8
    assert noisy.loss(some_trees(), "validate") == plain.loss(some_trees(), "validate")
    for one in (noisy, again, other, plain):
        one.step(some_trees(), 0.0)
    assert noisy.log == again.log
    assert len({one.log[0].loss for one in (noisy, other, plain)}) == 3
    fresh_noise = trainer(tiny_model, neftune_alpha=10.0, learning_rate=1e-30)
    for _ in range(2):
        fresh_noise.step(some_trees(), 0.0)
    assert fresh_noise.log[0].loss != fresh_noise.log[1].loss, "another step has other noise"


def test_the_hook_is_gone_after_a_step(tiny_model: Path) -> None:
    one = trainer(tiny_model, neftune_alpha=10.0)
    one.step(some_trees(), 0.0)
    assert not one.model.get_base_model().get_input_embeddings()._forward_hooks
    assert (
        AutoModelForCausalLM.from_pretrained(tiny_model)
        .get_input_embeddings()
        .weight.equal(one.model.get_base_model().get_input_embeddings().weight)
    )
