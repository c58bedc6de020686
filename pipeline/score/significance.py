"""The significance of differences between variants: resampling, intervals, p-values, corrections, and power.

Two sources of chance are kept apart:
- The choice of test examples: a paired bootstrap over groups (clusters), since the aspects of one paper share its text.
  A resample draws groups with replacement and takes all rows of each, together for all variants (Koehn 2004, section 3,
  for pairing; Davison and Hinkley 1997, section 3.8, for resampling whole clusters).
- The training seed: the standard deviation between seeds.

Both together: the sum of the two variances of the mean, with Satterthwaite's degrees of freedom (1946), since a few
seeds say little about their own spread.

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
"""Smaller differences, in points, are rounding: means over seeds of equal scores may differ in the last bit."""
DRAWS_AT_ONCE = 2_000_000
"""Group indices drawn in one chunk of resamples, which take 16 MB."""
POWER = 0.8
"""Share of repetitions in which a detectable difference is found."""
TYPICAL_SPREAD = 14.5
"""SD over examples of tuned minus base in ROUGE-1, in points, in the default experiment. A planned experiment is judged
by it, since it has no figures yet."""


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


def resampled_sums(values_nxk: Floats, groups: NDArray[Any], samples: int, seed: int) -> tuple[Floats, Floats]:
    """Bootstrap over groups: draw as many groups as there are, `samples` times, and sum the k columns over their rows.

    `groups` names the group of each row. Returns bxk sums and their b numbers of rows. Equal groups, samples and seeds
    give equal draws. UserError with a single group.
    """
    # Sorted by name, so that the order of the rows does not decide which group a number means.
    names, member = np.unique(groups, return_inverse=True)
    g = len(names)
    require_groups(g)
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
    """`here` minus `there`. Ties are exactly zero, so that no verdict depends on rounding."""
    found = here - there
    return np.where(np.abs(found) <= TIE, 0.0, found)


def percentiles(value: float, resampled_b: Floats, confidence: float) -> Interval:
    """The bootstrap percentile interval of a value."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_b, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def p_value(resampled_b: Floats) -> float:
    """The two-sided p-value of a difference: twice the share of resamples on the rarer side of zero, plus one each."""
    below, above = (int(np.sum(side)) for side in (resampled_b <= 0, resampled_b >= 0))
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(resampled_b))))


def over_seeds(
    mean: float, sides: Sequence[Sequence[float]], resampled_b: Floats, groups: int, confidence: float
) -> tuple[float, Interval, float]:
    """The SD between seeds, and the interval and p-value of the mean difference for both sources of chance.

    `sides` holds the scores of each side's seeds. A side with one seed adds nothing, since its spread is unknown.
    `resampled_b` is the mean difference in every resample of the examples, `groups` the number of their groups.
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
    """The adjusted p-values (Holm 1979): those below alpha are significant at a family-wise alpha."""
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
    """The true difference in points that is found in `POWER` of repetitions."""
    return (NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(POWER)) * standard_error


def planned(rows: int) -> float:
    """The difference in ROUGE-1, in points, that a test set of `rows` independent rows is likely to show."""
    return detectable(TYPICAL_SPREAD / rows**0.5, 0.95)


def groups_needed(points: float, detectable_now: float, groups_now: int) -> int:
    """How many groups a difference of `points` needs, if `groups_now` can show one of `detectable_now`."""
    return max(2, int(np.ceil(groups_now * (detectable_now / points) ** 2)))
