"""Packing is exact: a row in a packed sequence has the loss and the gradients of the row alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.model import attention, loss, pack
from pipeline.model.prompt import Row

CPU = torch.device("cpu")


def some_rows() -> list[Row]:
    shared = list(range(20, 32))
    return [
        Row("a/1", "a", [*shared, 40, 41], [50, 51, 1]),
        Row("a/2", "a", [*shared, 42], [52, 1]),
        Row("a/3", "a", [*shared, 43, 44, 45], [53, 54, 55, 56, 1]),
        Row("b/1", "b", [60, 61, 62], [63, 1]),
    ]


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention.NAME)
    return loaded


def summed_and_gradient(model: torch.nn.Module, parts: list[list[pack.Tree]]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    total = sum(loss.summed(model, pack.pack(part, CPU)) for part in parts)
    assert isinstance(total, torch.Tensor)
    total.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return float(total.detach()), torch.cat(gradients)


def plain_loss(model: torch.nn.Module, row: Row) -> float:
    """The definition: one row, one sequence, no mask of ours, full logits."""
    ids = torch.tensor([row.prompt + row.completion])
    logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(row.completion), reduction="sum").item()


def test_loss_of_a_pack_is_the_sum_of_the_losses_of_its_rows(model: torch.nn.Module) -> None:
    rows = some_rows()
    packed, _ = summed_and_gradient(model, [pack.trees(rows)])
    assert packed == pytest.approx(sum(plain_loss(model, row) for row in rows), rel=1e-6)


def test_gradients_do_not_depend_on_packing_or_sharing(model: torch.nn.Module) -> None:
    rows = some_rows()
    _, together = summed_and_gradient(model, [pack.trees(rows)])
    _, alone = summed_and_gradient(model, [[pack.tree([row])] for row in rows])
    assert float((together - alone).norm() / alone.norm()) < 1e-5


def test_a_mask_that_let_branches_see_each_other_would_be_noticed(model: torch.nn.Module) -> None:
    rows = some_rows()
    packed = pack.pack(pack.trees(rows), CPU)
    planted = replace(
        packed, spans=[(n, None if mask is None else torch.ones_like(mask).tril()) for n, mask in packed.spans]
    )
    assert loss.summed(model, planted).item() != pytest.approx(sum(plain_loss(model, row) for row in rows), rel=1e-4)


def test_a_row_by_itself_needs_no_mask_where_a_kernel_is_faster_without(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = pack.trees(some_rows())
    masked = pack.pack(trees, CPU)
    monkeypatch.setattr(pack, "UNMASKED", ("cpu",))
    bare = pack.pack(trees, CPU)
    assert [mask is None for _, mask in bare.spans] == [False, True, False]  # a group, a row, the padding
    assert [length for length, _ in bare.spans] == [length for length, _ in masked.spans]
    assert loss.summed(model, bare).item() == loss.summed(model, masked).item()


def test_a_shared_prefix_is_laid_out_once() -> None:
    tree, single = pack.trees(some_rows())
    assert len(tree.prefix) == 12
    assert [len(rest) for rest, _ in tree.branches] == [2, 1, 3]
    assert tree.tokens == 12 + (2 + 2) + (1 + 1) + (3 + 4)
    assert tree.supervised == 10
    assert single.prefix == []


def test_the_last_prompt_token_is_never_shared() -> None:
    """It predicts the first token of the answer, and of several answers each needs its own."""
    tree = pack.tree([Row("1", "g", [5, 6, 7], [8, 1]), Row("2", "g", [5, 6, 7], [9, 1])])
    assert tree.prefix == [5, 6]
    assert [rest for rest, _ in tree.branches] == [[7], [7]]


def test_micro_batches_hold_every_tree_once_within_the_budget() -> None:
    trees = [pack.tree([Row(str(n), str(n), [5] * n, [1])]) for n in (3, 60, 10, 200, 7, 31)]
    parts = pack.micro_batches(trees, 64)
    assert sorted(tree.tokens for part in parts for tree in part) == sorted(tree.tokens for tree in trees)
    assert [sum(tree.tokens for tree in part) for part in parts] == [200, 63, 48]
