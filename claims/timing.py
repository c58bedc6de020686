"""Durations compared within one process. Calls take turns, so that other load on the machine affects all alike."""

import time
from collections.abc import Callable, Mapping

import numpy as np

from pipeline.score.significance import Interval

RESAMPLES = 2000
CONFIDENCE = 0.95


def seconds(calls: Mapping[str, Callable[[], object]], rounds: int, seed: int) -> dict[str, list[float]]:
    """The seconds of each call in each round, after a round that does not count. Each round draws a new order.

    A call must end with its result on the CPU.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for at in draw.permutation(len(names)):
            started = time.perf_counter()
            calls[names[at]]()
            if number:
                taken[names[at]].append(time.perf_counter() - started)
    return taken


def ratio(one: list[float], other: list[float], seed: int) -> Interval:
    """The median over the rounds of `one` / `other`, with its bootstrap interval over rounds."""
    ratios = np.array(one) / np.array(other)
    draw = np.random.Generator(np.random.PCG64(seed))
    resampled_bxn = draw.choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(resampled_bxn, axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.median(ratios)), float(low), float(high))
