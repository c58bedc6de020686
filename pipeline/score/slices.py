"""Slices of the test split: does the gain depend on the length of source or answer, or on how new the answer is?"""

from collections.abc import Sequence
from itertools import pairwise

from pipeline.core.records import Example
from pipeline.core.text import compatible, runs, words

PARTS = 3
LEAST_ROWS = 30
"""A split with fewer rows has no slices."""


def of(test: Sequence[Example]) -> dict[str, list[int]]:
    """The numbers of the rows of each slice, by its name: thirds by the length of source and answer, and by novelty.

    Equal values stay in one slice, so a slice may be larger than a third, or missing.
    """
    if len(test) < LEAST_ROWS:
        return {}
    measures = {
        ("sources", "words"): [float(len(words(row.source))) for row in test],
        ("answers", "words"): [float(len(words(row.target))) for row in test],
        ("answers", "% new pairs of words"): [novelty(row) for row in test],
    }
    found = {}
    for (what, unit), values in measures.items():
        order = sorted(values)
        ends = sorted({order[len(order) * part // PARTS - 1] for part in range(1, PARTS + 1)})
        low = order[0]
        for end in ends if len(ends) > 1 else []:
            rows = [i for i, value in enumerate(values) if low <= value <= end]
            span = f"{low:.0f} to {end:.0f}" if round(low) < round(end) else f"{end:.0f}"
            found[f"{what} of {span} {unit}"] = rows
            low = min((value for value in order if value > end), default=end)
    return found


def novelty(row: Example) -> float:
    """The share of the answer's pairs of neighbouring words that the source does not have, in per cent."""
    source, target = (runs(compatible(text).lower()) for text in (row.source, row.target))
    pairs = list(pairwise(target))
    there = set(pairwise(source))
    return 100 * sum(pair not in there for pair in pairs) / len(pairs) if pairs else 0.0
