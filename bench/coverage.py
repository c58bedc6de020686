"""How often the intervals hold the truth: simulated experiments without a true difference, judged as real ones are.

    python -m bench.coverage

Prints a Markdown table: for each number of groups, kind of scores and number of training seeds, the share of intervals
(95 %) that hold zero, and their median width. docs/verdict.md has it.

A simulated difference of a group is that of its texts, shared by all seeds, and a part of its own for each seed; each
seed has an effect on all groups. In units of the texts' spread these have standard deviations of 1, 0.7 and 0.1, or 0.5
where seeds differ a lot. Texts are normal, or skewed: exponential.
"""

import itertools
from collections.abc import Iterator
from statistics import median

import numpy as np

from pipeline.core.progress import bar, say
from pipeline.score.intervals import Studentized, with_seeds
from pipeline.score.significance import Floats

GROUPS = (5, 10, 30, 100)
SEEDS = (1, 2, 3, 5)
KINDS = ("normal", "skewed")
SPREADS = (0.1, 0.5)
REPETITIONS = 2000
SAMPLES = 1000
CONFIDENCE = 0.95
WITHIN = 0.7


def simulated(groups: int, seeds: int, kind: str, spread: float, generator: np.random.Generator) -> Floats:
    """Differences without a true one, groups x seeds."""

    def texts(*shape: int) -> Floats:
        return generator.normal(size=shape) if kind == "normal" else generator.exponential(size=shape) - 1

    shared = texts(groups, 1) + WITHIN * texts(groups, seeds)
    # One seed stands for itself: its interval does not cover the choice of the seed, and says so.
    return shared if seeds == 1 else shared + spread * generator.normal(size=seeds)


def measured(groups: int, seeds: int, kind: str, spread: float, repetitions: int) -> tuple[float, float, float]:
    """The share of intervals that hold zero, that share of percentile intervals over texts, and the median width."""
    generator = np.random.default_rng([groups, seeds, KINDS.index(kind), round(10 * spread)])
    held, before, widths = 0, 0, []
    for number in range(repetitions):
        of_seeds = simulated(groups, seeds, kind, spread, generator)
        values = of_seeds.mean(axis=1, keepdims=True)
        found = Studentized.of(values, SAMPLES, number).interval(0, float(values.mean()), CONFIDENCE)
        if seeds > 1:
            _, found = with_seeds(found, [of_seeds.mean(axis=0).tolist()], CONFIDENCE)
        held += found.low <= 0 <= found.high
        widths.append(found.high - found.low)
        means_b = generator.choice(values[:, 0], (SAMPLES, groups)).mean(axis=1)
        low, high = np.quantile(means_b, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        before += low <= 0 <= high
    return held / repetitions, before / repetitions, median(widths)


def table(repetitions: int = REPETITIONS) -> Iterator[str]:
    """The lines of the table."""
    yield "| groups | scores | seeds | seeds differ by | holds zero | percentile bootstrap | median width |"
    yield "|---:|---|---:|---:|---:|---:|---:|"
    cells = [cell for cell in itertools.product(GROUPS, KINDS, SEEDS, SPREADS) if cell[2] > 1 or cell[3] == SPREADS[0]]
    with bar("coverage", len(cells), "cells") as advance:
        for groups, kind, seeds, spread in cells:
            held, before, width = measured(groups, seeds, kind, spread, repetitions)
            apart = "" if seeds == 1 else f"{spread}"
            yield f"| {groups} | {kind} | {seeds} | {apart} | {held:.3f} | {before:.3f} | {width:.2f} |"
            advance(1)


if __name__ == "__main__":
    for line in table():
        say(line)
