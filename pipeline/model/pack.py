"""Several rows as one sequence, exact up to rounding, with no padding between them.

Rows of a group (aspects of one paper) share the beginning of their prompts. The shared tokens are computed once, and
each row's own tokens follow as a branch: a branch attends to the shared prefix and to itself, and its positions
continue where the prefix ends, so every token sees just what it would see in a sequence of its own. Groups stand side
by side under the same mask and do not see each other. Lengths: L tokens in the sequence, N supervised ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from pipeline.model.prompt import Row

if TYPE_CHECKING:
    import torch

WHOLE = 64
"""Packed sequences are filled up to a multiple of this: libraries choose and build their kernels once a length."""

UNMASKED = ("cuda",)
"""Devices with a faster kernel for a row by itself, each of whose tokens sees those before it: it is given no mask."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The rows of one group: their shared prefix, and per row what remains of the prompt, and the completion."""

    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]

    @property
    def tokens(self) -> int:
        """Tokens to compute; the last of a completion is only predicted."""
        return len(self.prefix) + sum(len(rest) + len(completion) - 1 for rest, completion in self.branches)

    @property
    def supervised(self) -> int:
        return sum(len(completion) for _, completion in self.branches)


@dataclass(frozen=True, slots=True)
class Packed:
    """Model inputs for one sequence, on one device. `answer_at_N` are the places whose logits predict `target_N`.

    `spans`: of each group its number of tokens, and 1x1xLxL, True where the row's token may attend to the column's,
    or None (`UNMASKED`).
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
    """Share the longest common beginning of the prompts, but for each prompt's last token: it predicts the answer."""
    shared = 0
    if len(rows) > 1:
        limit = min(len(row.prompt) for row in rows) - 1
        first = rows[0].prompt
        while shared < limit and all(row.prompt[shared] == first[shared] for row in rows):
            shared += 1
    return Tree(rows[0].prompt[:shared], [(row.prompt[shared:], row.completion) for row in rows])


def micro_batches(batch: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Split a batch so that each part has at most `budget` tokens, unless a single tree is longer.

    Largest first, each into the first part with room: few parts, and the same parts for the same trees.
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
        segments = [0] * len(item.prefix)  # of each token: 0 in the prefix, else the number of its branch
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
