"""Estimates: scores with their groups' values, and what is judged of sums and differences of them."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from pipeline.core.errors import UserError
from pipeline.score.estimates import Estimate, Judged
from pipeline.score.significance import Floats, Interval
from tests.made.experiment import COMPARE


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def groups_of(sizes: list[int]) -> NDArray[Any]:
    return np.array([f"g{i:03}" for i, size in enumerate(sizes) for _ in range(size)])


def mean(values_n: Floats, groups: NDArray[Any]) -> Estimate:
    """The mean over rows of one metric."""
    return Estimate.ratios(values_n[:, None], np.ones(len(values_n)), groups)


def interval(values_n: Floats, groups: NDArray[Any], **settings: Any) -> Interval:
    return Judged(mean(values_n, groups), COMPARE.model_copy(update=settings)).deciding(0)


class TestOverTexts:
    def test_order_of_rows_does_not_matter(self) -> None:
        values, groups = generator(3).normal(size=30), groups_of([3] * 10)
        order = generator(4).permutation(30)
        one, other = interval(values, groups), interval(values[order], groups[order])
        assert (one.low, one.high) == pytest.approx((other.low, other.high))

    def test_the_seed_decides_the_draws_and_leaves_the_global_generator_alone(self) -> None:
        values, groups = generator(5).normal(size=30), groups_of([3] * 10)
        before = np.random.get_state(legacy=False)["state"]["key"].tolist()
        assert interval(values, groups) == interval(values, groups)
        assert interval(values, groups, seed=18) != interval(values, groups)
        assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before

    def test_rows_of_a_group_that_agree_count_once(self) -> None:
        # Three equal rows a group: taken one by one they would seem three times the evidence, sqrt(3) too narrow.
        values = np.repeat(generator(6).normal(size=60), 3)
        clustered = interval(values, groups_of([3] * 60))
        rowwise = interval(values, groups_of([1] * 180))
        assert (clustered.high - clustered.low) / (rowwise.high - rowwise.low) == pytest.approx(3**0.5, rel=0.1)

    @pytest.mark.parametrize(("confidence", "deviations"), [(0.95, 1.96), (0.8, 1.2816)])
    def test_ends_agree_with_the_normal_interval_of_many_rows(self, confidence: float, deviations: float) -> None:
        values = generator(8).normal(5, 2, size=400)
        one = interval(values, groups_of([1] * 400), confidence=confidence, bootstrap_samples=20_000)
        half = deviations * values.std() / 20
        assert (one.value - one.low) / half == pytest.approx(1, abs=0.08)
        assert (one.high - one.value) / half == pytest.approx(1, abs=0.08)

    @pytest.mark.parametrize("groups", [2, 4])
    def test_very_few_groups_get_student_s_interval(self, groups: int) -> None:
        """A resample of two groups has no spread, or a mean of no difference: it would be sure of anything."""
        values = generator(2).normal(3, 1, size=groups)
        one = interval(values, groups_of([1] * groups))
        expected = stats.t.interval(0.95, groups - 1, values.mean(), stats.sem(values))
        assert (one.low, one.high) == pytest.approx(expected)

    def test_a_single_group_is_refused(self) -> None:
        with pytest.raises(UserError, match="nothing to resample"):
            interval(np.ones(3), groups_of([3]))

    def test_groups_of_unequal_size_are_weighed_by_their_rows(self) -> None:
        values = np.array([1.0, 1.0, 1.0, 5.0])
        found = mean(values, np.array(["a", "a", "a", "b"]))
        assert found.scores_m[0] == 2
        # Two groups, 2 * 2 - 5 and 2 * 2 - 1.
        assert found.values_gxm[:, 0].tolist() == [-1, 3]


def test_intercepts_are_those_of_least_squares() -> None:
    draw, groups = generator(1), groups_of([2] * 15)
    x, values = draw.normal(1, 1, size=30), draw.normal(size=(30, 2))
    found = Estimate.intercepts(values, x, groups)
    for m in range(2):
        assert found.scores_m[m] == pytest.approx(stats.linregress(x, values[:, m]).intercept)
        rest = groups != "g003"
        left_out = stats.linregress(x[rest], values[rest, m]).intercept
        assert found.values_gxm[3, m] == pytest.approx(15 * found.scores_m[m] - 14 * left_out)


class TestDifferences:
    def test_pairing_cancels_what_both_share(self) -> None:
        shared, groups = generator(1).normal(0, 50, size=40), groups_of([1] * 40)
        here, there = mean(shared + 1 + generator(2).normal(0, 0.1, size=40), groups), mean(shared, groups)
        one = Judged(here - there, COMPARE).deciding(0)
        assert 0.9 < one.low < one.value < one.high < 1.1

    def test_rounding_is_no_difference(self) -> None:
        groups = groups_of([1] * 12)
        found = Judged(mean(np.full(12, 0.1 + 0.2), groups) - mean(np.full(12, 0.3), groups), COMPARE)
        assert found.deciding(0) == Interval(0, 0, 0)
        assert (found.p_values, found.direction(0)) == ([1.0], "none")


class TestSeeds:
    @staticmethod
    def of(seeds: list[float], spread: float = 1e-3, groups: int = 200) -> Judged:
        """A base without seeds, and tuned models that differ from it by so much, nearly the same in all groups."""
        names = groups_of([1] * groups)
        rows = spread * generator(3).normal(size=groups)
        tuned = [mean(rows + seed, names) for seed in seeds]
        return Judged(Estimate.mean(tuned) - mean(np.zeros(groups), names), COMPARE)

    def test_two_that_disagree_prove_nothing_however_large_the_test_set(self) -> None:
        found = self.of([1.0, 5.0])
        both = found.deciding(0)
        # Student's t with one degree of freedom: sd 2.83 / sqrt 2 = 2, times 12.7.
        assert both.high - both.value == pytest.approx(2 * stats.t.ppf(0.975, 1), rel=1e-3)
        assert both.low < 0 < both.high
        assert found.p_values[0] == pytest.approx(2 * stats.t.sf(3 / 2, 1), rel=0.01)
        assert found.direction(0) == "none"
        assert found.seed_sd(0) == pytest.approx(8**0.5)

    def test_that_agree_add_nothing(self) -> None:
        alone, both = self.of([3.0], 1.0), self.of([3.0, 3.0, 3.0], 1.0)
        assert both.deciding(0) == pytest.approx(alone.deciding(0))
        assert (alone.seed_sd(0), both.seed_sd(0)) == (None, 0)
        assert alone.p_values[0] == pytest.approx(both.p_values[0], abs=1e-4)
        assert alone.direction(0) == both.direction(0) == "higher"

    def test_p_and_interval_agree(self) -> None:
        """The p-value of both sources is the level at which the interval begins to hold zero."""
        found = self.of([0.8, 1.0, 1.9], 2.0)
        p = found.p_values[0]
        assert 0.001 < p < 0.2
        assert found.deciding(0, 1 - 1.05 * p).low > 0 > found.deciding(0, 1 - 0.95 * p).low

    def test_of_a_difference_of_differences_vary_together(self) -> None:
        """Own minus other source of each seed: what a seed adds to both is no spread."""
        names = groups_of([1] * 20)
        rows = generator(0).normal(size=20)
        parts = [mean(rows + seed, names) - mean(rows + seed - 2, names) for seed in (1.0, 5.0)]
        assert Judged(Estimate.mean(parts), COMPARE).seed_sd(0) == pytest.approx(0)


class TestShown:
    @pytest.mark.parametrize(
        ("groups", "mean_of", "expected"),
        [(9, 5.0, "few"), (10, 5.0, "higher"), (10, -5.0, "lower"), (10, 0.1, "none")],
    )
    def test_direction(self, groups: int, mean_of: float, expected: str) -> None:
        values = generator(1).normal(size=groups)
        found = Judged(mean(values - values.mean() + mean_of, groups_of([1] * groups)), COMPARE)
        assert found.direction(0) == expected

    def test_p_of_five_groups_is_too_large_for_anything(self) -> None:
        found = Judged(mean(np.arange(1.0, 6.0), groups_of([1] * 5)), COMPARE)
        assert found.p_values == [0.0625]

    @pytest.mark.parametrize(("margin", "expected"), [(None, None), (1.0, True), (0.1, False)])
    def test_equivalence_is_two_one_sided_tests(self, margin: float | None, expected: bool | None) -> None:
        values = generator(1).normal(0, 1, size=100)
        values -= values.mean()
        found = Judged(mean(values, groups_of([1] * 100)), COMPARE.model_copy(update={"margin": margin}))
        assert found.within(0) is expected
        if margin == 1.0:
            # Against scipy's one-sided t tests.
            ends = ((-1, "greater"), (1, "less"))
            assert max(stats.ttest_1samp(values, end, alternative=side).pvalue for end, side in ends) < 0.05

    def test_nine_groups_are_not_equivalent(self) -> None:
        settings = COMPARE.model_copy(update={"margin": 5.0})
        nearly = np.array([0.1, -0.1, 0.05] * 3)
        assert Judged(mean(nearly, groups_of([1] * 9)), settings).within(0) is False
        assert Judged(mean(np.append(nearly, 0.0), groups_of([1] * 10)), settings).within(0) is True
