"""Several rows as one sequence, exact up to rounding, with no padding between them.

Rows of a group (aspects of one paper) share the beginning of their prompts. The shared tokens are computed once. Each
row's own tokens follow as a branch, which attends to the shared prefix and to itself. Its positions continue where the
prefix ends. So every token sees what it would see in a sequence of its own. Groups stand side by side and do not see
each other. Lengths: L tokens in the sequence, N supervised ones.

`trees` supervise the answer of each row. `weighed` trees supervise its earlier answers and its prompt as well, each
predicted token with a weight. A prompt's token that rows share is predicted once, with the sum of the rows' weights. So
the weighted loss of a group is the sum of what its rows have alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from pipeline.model.prompt import Row

if TYPE_CHECKING:
    import torch

WHOLE = 64
"""Packed sequences are filled up to a multiple of this: libraries choose and build kernels once for each length."""

UNMASKED = ("cuda",)
"""Devices with a faster kernel for causal attention without a mask, which a row by itself needs."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What the prediction of a prompt's token weighs in the loss: for each token of a tree's prefix, and of the rest of
    each branch's prompt. 0.0 is not predicted, as the first token of a row never is."""

    prefix: list[float]
    rests: list[list[float]]

    @property
    def places(self) -> int:
        """The number of prompt tokens that are predicted."""
        return sum(weight > 0 for part in (self.prefix, *self.rests) for weight in part)

    @property
    def total(self) -> float:
        return sum(sum(part) for part in (self.prefix, *self.rests))


@dataclass(frozen=True, slots=True)
class Tree:
    """The rows of one group: their shared prefix, and for each branch the rest of its prompt, and its completion.

    A row is a branch. The last branches may be `earlier` answers of the rows, which their prompts do not hold as such.
    Without `weights` the completions alone are predicted, which weigh 1.
    """

    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]
    earlier: int = 0
    weights: Weights | None = None

    @property
    def rows(self) -> int:
        return len(self.branches) - self.earlier

    @property
    def tokens(self) -> int:
        """The number of tokens to compute: without the last of each completion, which is only predicted."""
        return len(self.prefix) + sum(len(rest) + len(completion) - 1 for rest, completion in self.branches)

    @property
    def supervised(self) -> int:
        """The number of predicted tokens."""
        answers = sum(len(completion) for _, completion in self.branches)
        return answers + self.weights.places if self.weights else answers

    @property
    def weight(self) -> float:
        """The sum of the predicted tokens' weights."""
        answers = sum(len(completion) for _, completion in self.branches)
        return answers + self.weights.total if self.weights else answers

    @property
    def longest(self) -> int:
        """The number of tokens of the longest row."""
        return len(self.prefix) + max(len(rest) + len(completion) for rest, completion in self.branches)


@dataclass(frozen=True, slots=True)
class Packed:
    """Model inputs for one sequence, on one device. The logits at the places `answer_at_N` predict `target_N`, which
    weigh `weight_N`; None: 1 each.

    `spans`: for each group its number of tokens L, and its mask 1x1xLxL, True where the row's token may attend to the
    column's; None on a device in `UNMASKED`.
    """

    input_ids_1xL: "torch.Tensor"
    position_ids_1xL: "torch.Tensor"
    spans: "list[tuple[int, torch.Tensor | None]]"
    answer_at_N: "torch.Tensor"
    target_N: "torch.Tensor"
    weight_N: "torch.Tensor | None" = None


def trees(rows: Iterable[Row]) -> list[Tree]:
    """One tree for each run of consecutive rows of one group."""
    return [tree(list(group)) for _, group in groupby(rows, key=lambda row: row.group)]


def tree(rows: Sequence[Row]) -> Tree:
    """Share the prompts' longest common beginning, without any prompt's last token, which predicts the answer."""
    return _shared([(row.prompt, row.completion) for row in rows])


def weighed(rows: Iterable[Row], prompt_loss_weight: float) -> list[Tree]:
    """The trees of `trees`, in which a prompt's tokens weigh `prompt_loss_weight`, and earlier answers weigh 1 as well.

    An earlier answer that the row's prompt holds, token by token behind the prompt that it had, is predicted there: its
    tokens see what they would see in a row of their own. Any other becomes a branch of the tree.
    """
    return [_weighed(list(group), prompt_loss_weight) for _, group in groupby(rows, key=lambda row: row.group)]


def _shared(sequences: Sequence[tuple[list[int], list[int]]]) -> Tree:
    """The tree of sequences, each a prompt and a completion."""
    shared = 0
    first, _ = sequences[0]
    if len(sequences) > 1:
        limit = min(len(prompt) for prompt, _ in sequences) - 1
        while shared < limit and all(prompt[shared] == first[shared] for prompt, _ in sequences):
            shared += 1
    return Tree(first[:shared], [(prompt[shared:], completion) for prompt, completion in sequences])


def _weighed(rows: Sequence[Row], prompt_loss_weight: float) -> Tree:
    weights, apart = [], []
    for row in rows:
        held = [prompt_loss_weight] * len(row.prompt)
        for prompt, completion in row.earlier:
            start, end = len(prompt), len(prompt) + len(completion)
            if row.prompt[:end] == prompt + completion:
                held[start:end] = [1.0] * len(completion)
            else:
                apart.append((prompt, completion))
        held[0] = 0.0
        weights.append(held)
    made = _shared([*((row.prompt, row.completion) for row in rows), *apart])
    if not any(map(any, weights)):
        return replace(made, earlier=len(apart))
    shared = len(made.prefix)
    return replace(
        made,
        earlier=len(apart),
        weights=Weights(
            prefix=[sum(column) for column in zip(*(held[:shared] for held in weights), strict=True)],
            rests=[
                *(held[shared:] for held in weights),
                *([0.0] * len(rest) for rest, _ in made.branches[len(rows) :]),
            ],
        ),
    )


def micro_batches(batch: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Split a batch into parts of at most `budget` tokens; a longer tree is a part by itself.

    First-fit decreasing: few parts, and the same parts for the same trees.
    """
    parts: list[list[Tree]] = []
    for item in sorted(batch, key=lambda item: -item.tokens):
        for part in parts:
            if item.tokens + sum(other.tokens for other in part) <= budget:
                part.append(item)
                break
        else:
            parts.append([item])
    return parts


def pack(part: Sequence[Tree], device: "torch.device") -> Packed:
    """Lay trees out side by side in one sequence, filled up to a multiple of `WHOLE` tokens."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, torch.Tensor | None]] = []
    answer_at: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for item in part:
        start = len(ids)
        ids += item.prefix
        positions += range(len(item.prefix))
        segments = [0] * len(item.prefix)  # for each token: 0 in the prefix, else the number of its branch
        for number, (rest, completion) in enumerate(item.branches, start=1):
            first_answer = len(ids) + len(rest) - 1
            branch = [*rest, *completion[:-1]]
            ids += branch
            positions += range(len(item.prefix), len(item.prefix) + len(branch))
            segments += [number] * len(branch)
            answer_at += range(first_answer, first_answer + len(completion))
            targets += completion
            weights += [1.0] * len(completion)
        for place, target, weight in _prompted(item):
            answer_at.append(start + place)
            targets.append(target)
            weights.append(weight)
        if device.type in UNMASKED and len(item.branches) == 1:
            spans.append((len(ids) - start, None))
            continue
        segment_L = torch.tensor(segments)
        causal_LxL = torch.ones(len(segments), len(segments), dtype=torch.bool).tril()
        visible_LxL = causal_LxL & ((segment_L[:, None] == segment_L) | (segment_L == 0))
        spans.append((len(ids) - start, visible_LxL[None, None].to(device)))
    padding = -len(ids) % WHOLE
    if padding:
        ids += [0] * padding
        positions += [0] * padding
        spans.append((padding, torch.eye(padding, dtype=torch.bool, device=device)[None, None]))
    return Packed(
        input_ids_1xL=torch.tensor([ids], device=device),
        position_ids_1xL=torch.tensor([positions], device=device),
        spans=spans,
        answer_at_N=torch.tensor(answer_at, device=device),
        target_N=torch.tensor(targets, device=device),
        weight_N=torch.tensor(weights, device=device) if any(item.weights for item in part) else None,
    )


def _prompted(item: Tree) -> Iterator[tuple[int, int, float]]:
    """The predicted tokens of a tree's prompts: the place in the tree that predicts it, the token, and its weight."""
    if item.weights is None:
        return
    for at, (token, weight) in enumerate(zip(item.prefix, item.weights.prefix, strict=True)):
        if weight:
            yield at - 1, token, weight
    start = len(item.prefix)
    for (rest, completion), weights in zip(item.branches, item.weights.rests, strict=True):
        for at, (token, weight) in enumerate(zip(rest, weights, strict=True)):
            if weight:  # the first token of a branch follows the prefix
                yield start + at - 1 if at else len(item.prefix) - 1, token, weight
        start += len(rest) + len(completion) - 1
