"""What a difference between two variants is worth: resampling, intervals, p-values, corrections, and power.

Two sources of chance are kept apart. The choice of test examples: a paired bootstrap over groups (clusters), since
aspects of one paper share its text: a resample draws groups with replacement and takes all rows of each, all variants
together (Koehn 2004, section 3, for pairing; Davison and Hinkley 1997, section 3.8, for resampling clusters whole).
The training seed: the standard deviation between seeds. Both together: the sum of the two variances of the mean, with
Satterthwaite's degrees of freedom (1946), since a few seeds tell little about their own spread.

Dimensions: n rows, k statistics, b resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError

Floats = NDArray[np.float64]

TIE = 1e-9
"""Differences of fewer points than this are rounding: a mean over seeds of equal scores may differ in the last bit."""
DRAWS_AT_ONCE = 2_000_000
"""Group indices drawn in one chunk of resamples: 16 MB, whatever the number of groups."""
POWER = 0.8
"""Share of repetitions in which a difference of the size called detectable is found."""
TYPICAL_SPREAD = 14.5
"""SD of the difference between base and tuned in ROUGE-1 over examples, in points, on the default experiment: what a
planned experiment is judged by before it has figures of its own."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the ends of its interval, in points."""

    value: float
    low: float
    high: float


def resampled_sums(values_nxk: Floats, groups: NDArray[Any], samples: int, seed: int) -> tuple[Floats, Floats]:
    """Bootstrap over groups: sums of the k columns over the rows of as many groups as there are, `samples` times.

    `groups` names the group of each row. Returns bxk sums and the b numbers of rows that they are over. Every call with
    the same groups, samples and seed draws the same. UserError with a single group, over which nothing can be drawn.
    """
    # Sorted by name, so that the order of the rows does not decide which group a draw stands for.
    names, member = np.unique(groups, return_inverse=True)
    g = len(names)
    if g < 2:
        raise UserError(
            "all test examples belong to one group, so there is nothing to resample: raise data.limits.test, or name "
            "a column that tells sources apart in data.columns.group"
        )
    columns = np.column_stack([values_nxk, np.ones(len(values_nxk))])
    sums_gxk = np.zeros((g, columns.shape[1]))
    np.add.at(sums_gxk, member, columns)
    generator = np.random.Generator(np.random.PCG64(seed))
    chunk = max(1, DRAWS_AT_ONCE // g)
    totals: list[Floats] = []
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        draws = generator.integers(g, size=(size, g)) + g * np.arange(size)[:, None]
        times_bxg = np.bincount(draws.ravel(), minlength=size * g).reshape(size, g).astype(np.float64)
        totals.append(times_bxg @ sums_gxk)
    total_bxk = np.concatenate(totals)
    return total_bxk[:, :-1], total_bxk[:, -1]


def difference(here: Floats, there: Floats) -> Floats:
    """`here` minus `there`, ties exactly zero: no verdict may rest on the rounding of a mean over seeds."""
    found = here - there
    return np.where(np.abs(found) <= TIE, 0.0, found)


def percentiles(value: float, resampled_b: Floats, confidence: float) -> Interval:
    """The bootstrap percentile interval of a value."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_b, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def p_value(resampled_b: Floats) -> float:
    """Two-sided: how often, at most, resamples of a difference lie on the wrong side of zero, doubled."""
    below, above = (int(np.sum(side)) for side in (resampled_b <= 0, resampled_b >= 0))
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(resampled_b))))


def over_seeds(
    mean: float, sides: Sequence[Sequence[float]], resampled_b: Floats, groups: int, confidence: float
) -> tuple[float, Interval, float]:
    """For both sources of chance: the SD of a difference between seeds, the mean difference with its interval, and the
    p-value of there being none.

    `sides` holds the scores of each side's seeds; a side with one adds nothing, since it tells nothing of its spread.
    `resampled_b` is the mean difference in every resample of the examples.
    """
    from scipy import stats

    spreads = [(float(np.var(scores, ddof=1)), len(scores)) for scores in sides if len(scores) > 1]
    sd = sum(variance for variance, _ in spreads) ** 0.5
    parts = [(float(np.var(resampled_b)), groups - 1), *((variance / n, n - 1) for variance, n in spreads)]
    total = sum(part for part, _ in parts)
    if total <= TIE**2:
        return sd, Interval(mean, mean, mean), 1.0 if abs(mean) <= TIE else 0.0
    freedom = total**2 / sum(part**2 / size for part, size in parts)
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * total**0.5
    p = 2 * float(stats.t.sf(abs(mean) / total**0.5, freedom))
    return sd, Interval(mean, mean - half, mean + half), p


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value adjusted for all of them (Holm 1979): below alpha, it is significant at a family-wise alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def effect_size(differences_n: Floats, groups: NDArray[Any]) -> float:
    """Cohen's d of paired differences: the mean of the groups' mean differences over their standard deviation."""
    names, member = np.unique(groups, return_inverse=True)
    means = np.bincount(member, differences_n) / np.bincount(member)
    spread = float(np.std(means, ddof=1)) if len(names) > 1 else 0.0
    return float(np.mean(means)) / spread if spread > TIE else 0.0


def detectable(standard_error: float, confidence: float) -> float:
    """The true difference, in points, that is found in `POWER` of repetitions, by its standard error."""
    return (NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(POWER)) * standard_error


def planned(rows: int) -> float:
    """The difference in ROUGE-1, in points, that a test set of so many independent rows is likely to show."""
    return detectable(TYPICAL_SPREAD / rows**0.5, 0.95)


def groups_needed(points: float, detectable_now: float, groups_now: int) -> int:
    """How many groups a difference of `points` needs, if `groups_now` can show one of `detectable_now`."""
    return max(2, int(np.ceil(groups_now * (detectable_now / points) ** 2)))
