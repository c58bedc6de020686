"""Small questions about differences: their direction, corrections for several of them, their size, and power.

Intervals and p-values are those of `pipeline.score.intervals`.

Dimensions: n rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError

Floats = NDArray[np.float64]

TIE = 1e-9
"""Smaller differences, in points, are rounding: means over seeds of equal scores may differ in the last bit."""
POWER = 0.8
"""Share of repetitions in which a detectable difference is found."""
TYPICAL_SPREAD = 14.5
"""SD over examples of tuned minus base in ROUGE-1, in points, in the default experiment. A planned experiment is judged
by it, since it has no figures yet."""


Direction = Literal["higher", "lower", "none", "few"]
"""What is shown of a difference: above zero, below it, neither; or nothing, since the groups are too few."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the ends of its interval, in points."""

    value: float
    low: float
    high: float


def require_groups(count: int) -> None:
    """UserError unless the test examples have at least two groups, without which there is nothing to resample."""
    if count < 2:
        raise UserError(
            "all test examples belong to one group, so there is nothing to resample: name more test data, raise "
            "data.limits.test, or name a column that tells sources apart in data.columns.group"
        )


def difference(here: Floats, there: Floats) -> Floats:
    """`here` minus `there`. Ties are exactly zero, so that no verdict depends on rounding."""
    found = here - there
    return np.where(np.abs(found) <= TIE, 0.0, found)


def holm(p_values: Sequence[float]) -> list[float]:
    """The adjusted p-values (Holm 1979): those below alpha are significant at a family-wise alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def effect_size(differences_n: Floats, groups: NDArray[Any]) -> float:
    """Cohen's d_z of paired differences: the mean of the groups' mean differences over their standard deviation.

    It is larger over means of several rows than over rows. With each row a group of its own it is that over rows.
    """
    names, member = np.unique(groups, return_inverse=True)
    means = np.bincount(member, differences_n) / np.bincount(member)
    spread = float(np.std(means, ddof=1)) if len(names) > 1 else 0.0
    return float(np.mean(means)) / spread if spread > TIE else 0.0


def detectable(standard_error: float, confidence: float) -> float:
    """The true difference in points that is found in `POWER` of repetitions."""
    return (NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(POWER)) * standard_error


def planned(rows: int) -> float:
    """The difference in ROUGE-1, in points, that a test set of `rows` independent rows is likely to show."""
    return detectable(TYPICAL_SPREAD / rows**0.5, 0.95)


def groups_needed(points: float, detectable_now: float, groups_now: int) -> int:
    """How many groups a difference of `points` needs, if `groups_now` can show one of `detectable_now`."""
    return max(2, int(np.ceil(groups_now * (detectable_now / points) ** 2)))
