"""Intervals and p-values of scores over groups of examples, which hold what they promise from ten groups on.

A percentile interval of a bootstrap is too narrow where groups are few, and lies wrong where scores are skewed: with 10
groups of exponential differences it holds the truth in 88 % of repetitions instead of 95 % (`bench.coverage`). So:

- A score is taken apart into a value for each group, by the jackknife's pseudo-values (Tukey 1958; Efron and Tibshirani
  1993, section 11.5). For a mean over equally many rows these are the groups' means.
- The interval is a studentized bootstrap of these values (bootstrap-t; Efron and Tibshirani 1993, section 12.5; Hall
  1988): each resample is judged by its own standard error.
- The p-value is that of a sign-flip test: if there is no difference, each group's difference might as well have the
  other sign (Fisher 1935; Good 2005, section 3.2). It is exact, and cannot be smaller than the number of groups allows.
- Training seeds are a second source of chance. The distances to both ends of the two intervals are added as the sides
  of a right angle (MOVER; Zou and Donner 2008), so that the skewness of the one stays.

Dimensions: g groups, k scores, b resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.score.significance import TIE, Floats, Interval, require_groups

MIN_GROUPS = 10
"""With fewer groups nothing is decided: intervals are shown, but no verdict rests on them."""
FEW = 5
"""With fewer groups a resample has hardly a spread of its own, and intervals are Student's, with g - 1 degrees."""
DRAWS_AT_ONCE = 2_000_000
"""Numbers drawn in one chunk, which take 16 MB."""
EXACT = 16
"""Up to so many groups all sign flips are tried, 65,536 at most."""
FLIPS = 100_000
"""Sign flips that are drawn for more groups; fewer above `MOST_FLIPS` signs in all."""
LEAST_P = 1 / (1 + FLIPS)
"""The smallest p-value of many groups."""
LEAST_LEVEL = 1e-9
"""The smallest p-value that an interval is asked for."""
MOST_FLIPS = 200_000_000


def pseudo_values(corpus: Callable[[Floats, Floats], Floats], sums_gxk: Floats, rows_g: Floats) -> Floats:
    """What each group contributes to a score: g values, whose mean is the score (its jackknife estimate).

    `corpus` gives the scores of corpora from their sums of k statistics and their numbers of rows. `sums_gxk` and
    `rows_g` are those of each group.
    """
    whole, rows = sums_gxk.sum(axis=0), rows_g.sum()
    without_g = corpus(whole - sums_gxk, rows - rows_g)
    return jackknife(corpus(whole[None], np.array([rows]))[0], without_g)


def jackknife(whole: Floats, without: Floats) -> Floats:
    """The pseudo-values of g groups, of scores over all groups and `without` each (the first dimension)."""
    values: Floats = len(without) * whole - (len(without) - 1) * without
    return values


@dataclass(frozen=True)
class Studentized:
    """How far scores lie from their true values, in standard errors, by resampling their groups' values.

    `error_k` are the standard errors; `t_bxk` are the resamples' t values, sorted, without those of no spread.
    """

    groups: int
    error_k: Floats
    t_bxk: list[Floats]

    @classmethod
    def of(cls, values_gxk: Floats, samples: int, seed: int) -> "Studentized":
        """Resample the groups' values `samples` times. All k scores share the draws. UserError for a single group."""
        g = len(values_gxk)
        require_groups(g)
        centred = values_gxk - values_gxk.mean(axis=0)  # squares of large scores would drown small differences
        columns = np.column_stack([centred, centred**2])
        generator = np.random.Generator(np.random.PCG64(seed))
        chunk = max(1, DRAWS_AT_ONCE // g)
        found = []
        for start in range(0, samples, chunk):
            size = min(chunk, samples - start)
            draws = generator.integers(g, size=(size, g)) + g * np.arange(size)[:, None]
            times_bxg = np.bincount(draws.ravel(), minlength=size * g).reshape(size, g).astype(np.float64)
            shift_bxk, square_bxk = np.hsplit(times_bxg @ columns / g, 2)
            spread_bxk = np.sqrt(np.maximum(square_bxk - shift_bxk**2, 0) / (g - 1))
            found.append(np.where(spread_bxk > TIE, shift_bxk / np.maximum(spread_bxk, TIE), np.nan))
        t_bxk = np.concatenate(found)
        error_k = np.sqrt((centred**2).mean(axis=0) / (g - 1))
        return cls(g, error_k, [np.sort(column[~np.isnan(column)]) for column in t_bxk.T])

    def interval(self, k: int, value: float, confidence: float) -> Interval:
        """The interval of score `k`, around its `value`: that of all rows, of which the mean is an estimate."""
        from scipy import stats

        if self.error_k[k] <= TIE:
            return Interval(value, value, value)
        if self.groups < FEW:
            half = float(stats.t.ppf((1 + confidence) / 2, self.groups - 1) * self.error_k[k])
            return Interval(value, value - half, value + half)
        ends = self.error_k[k] * np.quantile(self.t_bxk[k], [(1 + confidence) / 2, (1 - confidence) / 2])
        return Interval(value, value - float(ends[0]), value - float(ends[1]))


def flip_p_values(values_gxk: Floats, seed: int) -> Floats:
    """The two-sided p-values of k means of zero, by flipping the signs of the groups' values.

    All flips are tried up to `EXACT` groups; else the share among the drawn ones, each with the unflipped one. All k
    share the flips.
    """
    g = len(values_gxk)
    here_k = np.abs(values_gxk.sum(axis=0)) - TIE * g
    if g <= EXACT:
        # The first sign stays: the other half of the flips has the same sizes.
        signs = 1.0 - 2.0 * (np.arange(2 ** (g - 1))[:, None] >> np.arange(g - 1) & 1)
        found_k = np.mean(np.abs(values_gxk[0] + signs @ values_gxk[1:]) >= here_k, axis=0)
    else:
        count = min(FLIPS, max(1000, MOST_FLIPS // g))
        generator = np.random.Generator(np.random.PCG64(seed))
        reached_k = np.zeros(values_gxk.shape[1])
        chunk = max(1, DRAWS_AT_ONCE // g)
        for start in range(0, count, chunk):
            size = min(chunk, count - start)
            signs = 1.0 - 2.0 * generator.integers(2, size=(size, g), dtype=np.int8)
            reached_k += np.sum(np.abs(signs @ values_gxk) >= here_k, axis=0)
        found_k = (1 + reached_k) / (1 + count)
    return np.where(here_k <= 0, 1.0, found_k)


def with_seeds(over_texts: Interval, seeds: Sequence[Sequence[float]], confidence: float) -> tuple[float, Interval]:
    """The SD between seeds, and the interval for both sources of chance.

    `over_texts` is the interval of the mean difference, `seeds` the scores of each side's seeds. A side with one seed
    adds nothing, since its spread is unknown. Two seeds say little about their spread, so their interval is wide.
    """
    from scipy import stats

    sides = [np.asarray(scores) for scores in seeds if len(scores) > 1]
    variances = [float(np.var(scores, ddof=1)) for scores in sides]
    squares = sum(
        (float(stats.t.ppf((1 + confidence) / 2, len(scores) - 1)) ** 2) * variance / len(scores)
        for scores, variance in zip(sides, variances, strict=True)
    )
    value = over_texts.value
    below, above = value - over_texts.low, over_texts.high - value
    low, high = value - (below**2 + squares) ** 0.5, value + (above**2 + squares) ** 0.5
    return sum(variances) ** 0.5, Interval(value, low, high)


def member_sums(values_nxk: Floats, groups: NDArray[Any]) -> tuple[Floats, Floats]:
    """The sums of k columns over the rows of each group, gxk, and the numbers of rows, g; groups sorted by name."""
    names, member = np.unique(groups, return_inverse=True)
    sums_gxk = np.zeros((len(names), values_nxk.shape[1]))
    np.add.at(sums_gxk, member, values_nxk)
    return sums_gxk, np.bincount(member).astype(np.float64)


def least_level(interval: Callable[[float], Interval]) -> float:
    """The level alpha at which an interval of confidence 1 - alpha begins to hold zero: the p-value that it gives."""
    low, high = np.log(LEAST_LEVEL), 0.0
    for _ in range(40):
        middle = (low + high) / 2
        one = interval(1 - float(np.exp(middle)))
        low, high = (middle, high) if one.low <= 0 <= one.high else (low, middle)
    return float(np.exp(high))
