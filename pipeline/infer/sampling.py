"""Sampling: the next token is drawn from the model's probabilities (`generation.sampling`).

The draws of an answer depend on the seed, the example and the number of the sample alone. So the batch changes nothing
but rounding, a killed run goes on with the same draws, and base and tuned have the same ones, which makes their
difference vary less (common random numbers).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.core import params, records


def labels(name: str, sampling: params.Sampling | None) -> list[str]:
    """The names of an example's answers as the backend knows them: one, or one for each sample."""
    return [name] if sampling is None else [f"{number} {name}" for number in range(sampling.samples)]


def example(label: str, sampling: params.Sampling | None) -> tuple[str, int]:
    """The example and the number of the sample that a label means."""
    number, _, name = label.partition(" ")
    return (label, 0) if sampling is None else (name, int(number))


def draws(label: str, seed: int) -> Iterator[float]:
    """Numbers in [0, 1) for the tokens of an answer, one after the other."""
    own = np.random.Generator(np.random.PCG64(int(records.sha256_text(f"{seed} {label}"), 16)))
    while True:
        yield float(own.random())


def warpers(sampling: params.Sampling) -> Any:
    """What transformers' `generate` applies to the scores before it draws, in its order."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def drawn(scores_RxV: Any, numbers: Sequence[float]) -> list[int]:
    """The token of each of R rows that its number in [0, 1) falls on, when the probabilities stand in a line."""
    import torch

    line_RxV = torch.softmax(scores_RxV.double(), -1).cumsum(-1).cpu()
    points_Rx1 = torch.tensor(numbers, dtype=torch.float64)[:, None] * line_RxV[:, -1:]
    tokens: list[int] = torch.searchsorted(line_RxV, points_Rx1, right=True)[:, 0].tolist()
    return tokens
