"""What a loss counts: prompts, earlier answers and smoothed targets, as plain torch computes them row by row."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from pipeline.model import attention, loss, pack
from pipeline.model.prompt import Row

CPU = torch.device("cpu")
SHARED = list(range(20, 32))
HELD = (SHARED[:4], SHARED[4:7])
"""An earlier answer that stands in the shared beginning, behind the prompt that it had."""
REWRITTEN = ([*SHARED[:6], 70, 71], [72, 73, 1])
"""An earlier answer that the row's prompt holds in another form."""


def group(*earlier: tuple[list[int], list[int]]) -> list[Row]:
    """Rows that share a beginning, and one that shares nothing, of very different lengths."""
    return [
        Row("a/1", "a", [*SHARED, 40, 41], [50, 51, 1], list(earlier)),
        Row("a/2", "a", [*SHARED, 42, 60, 61, 62], [52, 1], [*earlier, ([*SHARED, 42], [60, 61])][: 2 * len(earlier)]),
        Row("a/3", "a", [*SHARED, 43], [53, 54, 55, 56] * 20 + [1]),
        Row("b/1", "b", [60, 61, 62], [63, 1]),
    ]


ROWS = {"answers": group(), "held": group(HELD), "rewritten": group(REWRITTEN), "both": group(HELD, REWRITTEN)}


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention.NAME)
    return loaded


def sequences(row: Row, prompt_loss_weight: float) -> Iterator[tuple[list[int], list[float]]]:
    """The definition: token ids, each with the weight of its prediction. The row; each earlier answer by itself."""
    weights = [prompt_loss_weight] * len(row.prompt) + [1.0] * len(row.completion)
    for prompt, completion in row.earlier:
        yield [*prompt, *completion], [0.0] * len(prompt) + [1.0] * len(completion)
        end = len(prompt) + len(completion)
        if row.prompt[:end] == prompt + completion:  # an answer is no part of the prompt's own loss
            weights[len(prompt) : end] = [0.0] * len(completion)
    yield [*row.prompt, *row.completion], weights


def plain(
    model: torch.nn.Module, rows: Sequence[Row], prompt_loss_weight: float, smoothing: float
) -> tuple[torch.Tensor, float]:
    """The sum of the losses, and of the weights: one sequence a row, no mask of ours, all logits."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        for ids, weights in sequences(row, prompt_loss_weight):
            log_LxV = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            own_L = -log_LxV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            nats_L = (1 - smoothing) * own_L - smoothing * log_LxV.mean(-1)
            total = total + nats_L @ torch.tensor(weights[1:], dtype=torch.float64)
            weight += sum(weights[1:])
    return total, weight


def gradient(model: torch.nn.Module, total: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    total.backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_loss_of_packed_groups_is_that_of_their_rows_by_plain_torch(
    model: torch.nn.Module, rows: list[Row], prompt_loss_weight: float, smoothing: float
) -> None:
    expected, weight = plain(model, rows, prompt_loss_weight, smoothing)
    expected_gradient = gradient(model, expected)
    together = [pack.weighed(rows, prompt_loss_weight)]
    alone = [pack.weighed([row], prompt_loss_weight) for row in rows]
    for parts in (together, alone):
        assert sum(tree.weight for part in parts for tree in part) == pytest.approx(weight)
        found = sum((loss.summed(model, pack.pack(part, CPU), smoothing) for part in parts), start=torch.zeros(()))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        off = gradient(model, found) - expected_gradient
        assert float(off.norm() / expected_gradient.norm()) < 1e-5


def test_what_counts_answers_alone_is_what_it_was() -> None:
    """No weights, no other order of places: not a bit of a loss may change."""
    rows = group()
    assert pack.weighed(rows, 0.0) == pack.trees(rows)
    packed = pack.pack(pack.trees(rows), CPU)
    assert packed.weight_N is None
    assert packed.target_N.tolist() == [token for row in rows for token in row.completion]


def test_a_token_that_rows_share_is_predicted_once_with_their_weights_together() -> None:
    tree, single = pack.weighed(group(HELD), 0.25)
    assert tree.prefix == SHARED
    assert tree.weights is not None
    # Two of the three rows learn the earlier answer; the first token of a row has nothing before it.
    assert tree.weights.prefix == [0.0, *[0.75] * 3, *[2.25] * 3, *[0.75] * 5]
    assert tree.weights.rests == [[0.25] * 2, [0.25, 1.0, 1.0, 0.25], [0.25]]
    assert (tree.rows, tree.earlier) == (3, 0)
    assert tree.supervised == 11 + 7 + (3 + 2 + 81)
    assert single.weights == pack.Weights([], [[0.0, 0.25, 0.25]])


def test_a_rewritten_answer_is_a_branch_and_no_row() -> None:
    tree, _ = pack.weighed(group(REWRITTEN), 0.0)
    assert (tree.rows, tree.earlier, len(tree.branches)) == (3, 2, 5)
    assert tree.prefix == SHARED[:6]
    assert tree.branches[-1] == ([70, 71], [72, 73, 1])
    assert tree.longest == 6 + len(SHARED[6:]) + 1 + 81


def test_a_sequence_that_is_not_counted_has_no_loss(model: torch.nn.Module) -> None:
    """Planted: with the weights of another row the loss differs."""
    rows = group(HELD)
    right = pack.pack(pack.weighed(rows, 0.3), CPU)
    assert right.weight_N is not None
    wrong = pack.Packed(
        right.input_ids_1xL, right.position_ids_1xL, right.spans, right.answer_at_N, right.target_N,
        right.weight_N.roll(1),
    )  # fmt: skip
    one, other = (float(loss.summed(model, packed).detach()) for packed in (right, wrong))
    assert abs(one - other) > 1e-3 * one
