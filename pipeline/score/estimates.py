"""Scores with what they owe to each group of examples: differences of them are judged against chance.

Whatever is a sum or difference of scores over the same groups is an `Estimate`: tuned minus base, tuned minus a
reference line, or a difference of two such differences. `Judged` gives its intervals and p-values
(`pipeline.score.intervals`).

Dimensions: g groups, m metrics, s seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import params
from pipeline.score import intervals, significance
from pipeline.score.significance import Floats, Interval
from pipeline.score.tables import Corpus


@dataclass(frozen=True)
class Estimate:
    """Scores in m metrics, and the groups' values (gxm), of which they are the means.

    `sides` has the scores of the single seeds (sxm) for each mean over several seeds that went into the scores.
    """

    scores_m: Floats
    values_gxm: Floats
    sides: tuple[Floats, ...] = ()

    @classmethod
    def of(cls, corpus: Corpus) -> "Estimate":
        """The scores of a corpus. The groups' values are the jackknife's pseudo-values."""
        return cls(corpus.scores_m, intervals.jackknife(corpus.scores_m, corpus.without_gxm))

    @classmethod
    def ratios(cls, values_nxm: Floats, weights_n: Floats, groups: Sequence[Any] | NDArray[Any]) -> "Estimate":
        """Sums of values over the sum of weights, such as losses over tokens. `groups` names the group of each row.

        UserError for a single group.
        """
        sums_gxk, _ = intervals.member_sums(np.column_stack([values_nxm, weights_n]), np.array(groups))
        significance.require_groups(len(sums_gxk))
        whole_k = sums_gxk.sum(axis=0)
        rest_gxk = whole_k - sums_gxk
        return cls.of(Corpus(whole_k[:-1] / whole_k[-1], rest_gxk[:, :-1] / rest_gxk[:, -1:]))

    @classmethod
    def intercepts(cls, values_nxm: Floats, x_n: Floats, groups: Sequence[Any] | NDArray[Any]) -> "Estimate":
        """The values of a least-squares line at x = 0. `groups` names the group of each row.

        UserError for a single group. Values are not finite if x is the same in all rows, or without one group.
        """
        columns = [np.ones_like(x_n), x_n, x_n**2, *values_nxm.T, *(x_n[:, None] * values_nxm).T]
        sums_gxk, _ = intervals.member_sums(np.column_stack(columns), np.array(groups))
        significance.require_groups(len(sums_gxk))
        whole_k = sums_gxk.sum(axis=0)
        sums = np.concatenate([whole_k[None], whole_k - sums_gxk])  # of all rows, then without each group
        n, x, xx = sums[:, 0:1], sums[:, 1:2], sums[:, 2:3]
        y, xy = np.hsplit(sums[:, 3:], 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (y * xx - x * xy) / (n * xx - x**2)
        return cls.of(Corpus(found[0], found[1:]))

    @classmethod
    def mean(cls, several: Sequence["Estimate"]) -> "Estimate":
        """The mean over seeds."""
        scores_sxm = np.array([one.scores_m for one in several])
        return cls(
            scores_sxm.mean(axis=0),
            np.mean([one.values_gxm for one in several], axis=0),
            (scores_sxm,) if len(several) > 1 else several[0].sides,
        )

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            significance.difference(self.scores_m, other.scores_m),
            significance.difference(self.values_gxm, other.values_gxm),
            self.sides + other.sides,
        )


class Judged:
    """The intervals and p-values of an estimate. UserError for a single group."""

    def __init__(self, estimate: Estimate, settings: params.Compare) -> None:
        self.estimate, self.settings = estimate, settings
        self.studentized = intervals.Studentized.of(
            estimate.values_gxm, settings.bootstrap_samples, settings.seed
        )  # all estimates over the same groups share the draws

    def over_texts(self, m: int, confidence: float | None = None) -> Interval:
        """Metric `m` with the interval for the choice of examples."""
        value = float(self.estimate.scores_m[m])
        return self.studentized.interval(m, value, confidence or self.settings.confidence)

    def deciding(self, m: int, confidence: float | None = None) -> Interval:
        """Metric `m` with the interval for the choice of examples, and of seeds if there are several."""
        return self._with_seeds(m, confidence or self.settings.confidence)[1]

    def seed_sd(self, m: int) -> float | None:
        """The standard deviation between seeds; None with a single seed."""
        return self._with_seeds(m, self.settings.confidence)[0] if self.estimate.sides else None

    @cached_property
    def p_values(self) -> list[float]:
        """The two-sided p-value of no difference in each metric.

        With several seeds it is the larger one of two: that of the examples, and the level at which the interval for
        both would begin to hold zero.
        """
        flipped = intervals.flip_p_values(self.estimate.values_gxm, self.settings.seed)
        found = [float(p) for p in flipped]
        if self.estimate.sides:
            found = [max(p, intervals.least_level(partial(self.deciding, m))) for m, p in enumerate(found)]
        return found

    def error(self, m: int) -> float:
        """The standard error of metric `m`, in points."""
        if not self.estimate.sides:
            return float(self.studentized.error_k[m])
        both = self.deciding(m)
        return (both.high - both.low) / 2 / NormalDist().inv_cdf((1 + self.settings.confidence) / 2)

    def direction(self, m: int) -> significance.Direction:
        """Whether metric `m` is shown to be above or below zero: by its interval and its p-value."""
        if self.studentized.groups < intervals.MIN_GROUPS:
            return "few"
        one = self.deciding(m)
        if one.low <= 0 <= one.high or self.p_values[m] > 1 - self.settings.confidence:
            return "none"
        return "higher" if one.low > 0 else "lower"

    def within(self, m: int) -> bool | None:
        """Whether metric `m` is equivalent to zero within ± `compare.margin`; None without a margin.

        Two one-sided tests (Schuirmann 1987): the interval of confidence 1 - 2 alpha lies within the margin.
        """
        margin = self.settings.margin
        if margin is None:
            return None
        one = self.deciding(m, 2 * self.settings.confidence - 1)
        return self.studentized.groups >= intervals.MIN_GROUPS and -margin < one.low and one.high < margin

    def _with_seeds(self, m: int, confidence: float) -> tuple[float, Interval]:
        sides = [side[:, m].tolist() for side in self.estimate.sides]
        return intervals.with_seeds(self.over_texts(m, confidence), sides, confidence)
