"""Several rows as one sequence, exact up to rounding, with no padding between them.

Rows of a group (aspects of one paper) share the beginning of their prompts. The shared tokens are computed once. Each
row's own tokens follow as a branch, which attends to the shared prefix and to itself. Its positions continue where the
prefix ends. So every token sees what it would see in a sequence of its own. Groups stand side by side and do not see
each other. Lengths: L tokens in the sequence, N supervised ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
class Tree:
    """The rows of one group: their shared prefix, and for each row the rest of its prompt, and its completion."""

    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]

    @property
    def tokens(self) -> int:
        """The number of tokens to compute: without the last of each completion, which is only predicted."""
        return len(self.prefix) + sum(len(rest) + len(completion) - 1 for rest, completion in self.branches)

    @property
    def supervised(self) -> int:
        """The number of predicted tokens."""
        return sum(len(completion) for _, completion in self.branches)


@dataclass(frozen=True, slots=True)
class Packed:
    """Model inputs for one sequence, on one device. The logits at the places `answer_at_N` predict `target_N`.

    `spans`: for each group its number of tokens L, and its mask 1x1xLxL, True where the row's token may attend to the
    column's; None on a device in `UNMASKED`.
    """

    input_ids_1xL: "torch.Tensor"
    position_ids_1xL: "torch.Tensor"
    spans: "list[tuple[int, torch.Tensor | None]]"
    answer_at_N: "torch.Tensor"
    target_N: "torch.Tensor"


def trees(rows: Iterable[Row]) -> list[Tree]:
    """One tree for each run of consecutive rows of one group."""
    return [tree(list(group)) for _, group in groupby(rows, key=lambda row: row.group)]


def tree(rows: Sequence[Row]) -> Tree:
    """Share the prompts' longest common beginning, without any prompt's last token, which predicts the answer."""
    shared = 0
    if len(rows) > 1:
        limit = min(len(row.prompt) for row in rows) - 1
        first = rows[0].prompt
        while shared < limit and all(row.prompt[shared] == first[shared] for row in rows):
            shared += 1
    return Tree(rows[0].prompt[:shared], [(row.prompt[shared:], row.completion) for row in rows])


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
    )
