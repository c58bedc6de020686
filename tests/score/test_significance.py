"""Resampling, intervals, corrections and power against slow and known answers."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.score import significance
from pipeline.score.significance import Interval


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def groups_of(sizes: list[int]) -> NDArray[Any]:
    return np.array([f"g{i:03}" for i, size in enumerate(sizes) for _ in range(size)])


def means(values: NDArray[Any], groups: NDArray[Any], samples: int = 2000, seed: int = 17) -> NDArray[Any]:
    sums, rows = significance.resampled_sums(values, groups, samples, seed)
    return np.asarray(sums / rows[:, None])


def interval(values: NDArray[Any], groups: NDArray[Any], confidence: float = 0.95, **how: int) -> Interval:
    return significance.percentiles(float(values.mean()), means(values, groups, **how)[:, 0], confidence)


def test_equals_a_naive_bootstrap() -> None:
    groups = groups_of([1, 4, 2, 3, 1])
    values = generator(1).normal(size=(11, 2))
    sums, rows = significance.resampled_sums(values, groups, 50, 0)
    rng, names = generator(), sorted(set(groups))
    for total, count in zip(sums, rows, strict=True):
        drawn = [i for g in rng.integers(len(names), size=len(names)) for i in range(11) if groups[i] == names[g]]
        np.testing.assert_allclose(total, [sum(values[i, k] for i in drawn) for k in (0, 1)])
        assert count == len(drawn)


def test_distribution_of_the_smallest_case() -> None:
    # Two groups at 0 and 1: the means of all four equally likely resamples are 0, .5, .5, 1.
    found = means(np.array([[0.0], [1.0]]), groups_of([1, 1]), 20_000)[:, 0]
    shares = [float(np.mean(found == value)) for value in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.015)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values, groups = generator(2).normal(size=(12, 1)), groups_of([3] * 4)
    whole = means(values, groups, 101)
    monkeypatch.setattr(significance, "DRAWS_AT_ONCE", 40)
    np.testing.assert_array_equal(means(values, groups, 101), whole)


def test_order_of_rows_does_not_matter() -> None:
    values, groups = generator(3).normal(size=(30, 1)), groups_of([3] * 10)
    order = generator(4).permutation(30)
    np.testing.assert_allclose(means(values, groups), means(values[order], groups[order]))


def test_same_seed_same_interval_other_seed_other_interval() -> None:
    values, groups = generator(5).normal(size=(30, 1)), groups_of([3] * 10)
    assert interval(values, groups) == interval(values, groups)
    assert interval(values, groups, seed=18) != interval(values, groups)


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state(legacy=False)["state"]["key"].tolist()
    interval(generator(5).normal(size=(6, 1)), groups_of([3, 3]))
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before


def test_rows_of_a_group_that_agree_count_once() -> None:
    # Three equal rows a group: row-wise resampling would believe in three times the evidence, sqrt(3) too narrow.
    values = np.repeat(generator(6).normal(size=(60, 1)), 3, axis=0)
    clustered = interval(values, groups_of([3] * 60))
    rowwise = interval(values, np.array([f"{i:03}" for i in range(180)]))
    ratio = (clustered.high - clustered.low) / (rowwise.high - rowwise.low)
    assert ratio == pytest.approx(3**0.5, rel=0.12)


@pytest.mark.parametrize(("confidence", "deviations"), [(0.95, 1.96), (0.8, 1.2816)])
def test_ends_agree_with_the_normal_interval_of_many_rows(confidence: float, deviations: float) -> None:
    values = generator(8).normal(5, 2, size=(400, 1))
    one = interval(values, groups_of([1] * 400), confidence)
    half = deviations * values.std() / 20
    assert (one.value - one.low) / half == pytest.approx(1, abs=0.08)
    assert (one.high - one.value) / half == pytest.approx(1, abs=0.08)


def test_coverage() -> None:
    """An interval of 95 % over 40 groups holds the true mean about that often: a bit less, as percentiles do."""
    rng = generator(7)
    groups, hits = groups_of([3] * 40), 0
    for _ in range(300):
        values = np.repeat(rng.normal(size=(40, 1)), 3, axis=0) + rng.normal(size=(120, 1))
        one = interval(values, groups, samples=1000)
        hits += one.low <= 0 <= one.high
    assert 0.90 <= hits / 300 <= 0.98


def test_a_single_group_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to resample"):
        significance.resampled_sums(np.ones((3, 1)), groups_of([3]), 10, 0)


def test_ties_are_no_difference() -> None:
    assert significance.difference(np.array([0.1 + 0.2, 2.0]), np.array([0.3, 1.0])).tolist() == [0, 1]


def test_p_values_are_uniform_when_there_is_nothing() -> None:
    rng, found = generator(9), []
    for _ in range(400):
        values = rng.normal(size=(50, 1))
        found.append(significance.p_value(means(values, groups_of([1] * 50), 400)[:, 0]))
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=0.08)


def test_p_of_a_sure_difference_and_of_none() -> None:
    assert significance.p_value(np.ones(999)) == pytest.approx(2 / 1000)
    assert significance.p_value(np.zeros(999)) == 1


def test_holm_as_by_hand() -> None:
    # Sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .06, each at least the one before.
    assert significance.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert significance.holm([0.5, 0.9]) == [1.0, 1.0]
    assert significance.holm([]) == []


def test_both_sources_of_chance_add_up() -> None:
    """Many groups and seeds: the interval is the normal one of the summed variances."""
    examples = generator(1).normal(2, 0.3, size=200_000)
    base, tuned = [10.0], (12 + generator(2).normal(0, 1, size=400)).tolist()
    mean = float(np.mean(tuned)) - 10
    sd, both, p = significance.over_seeds(mean, [base, tuned], examples, 10_000, 0.95)
    assert sd == pytest.approx(np.std(tuned, ddof=1))
    half = 1.96 * (0.3**2 + sd**2 / 400) ** 0.5
    assert (both.high - mean, mean - both.low) == pytest.approx((half, half), rel=0.01)
    assert p < 1e-6


def test_two_seeds_that_disagree_prove_nothing_however_large_the_test_set() -> None:
    from scipy import stats

    examples = np.full(1000, 3.0) + generator(3).normal(0, 1e-3, size=1000)
    _, both, p = significance.over_seeds(3.0, [[0.0], [1.0, 5.0]], examples, 1000, 0.95)
    # Student's t with one degree of freedom: sd 2.83 / sqrt 2 = 2 times 12.7.
    assert both.high - 3 == pytest.approx(2 * stats.t.ppf(0.975, 1), rel=1e-3)
    assert both.low < 0 < both.high
    assert p > 0.3


def test_seeds_that_agree_exactly_on_equal_outputs() -> None:
    assert significance.over_seeds(0.0, [[1.0], [1.0, 1.0]], np.zeros(100), 10, 0.95) == (0.0, Interval(0, 0, 0), 1.0)


def test_effect_size_is_cohens_d_over_groups() -> None:
    values, groups = np.array([1.0, 3.0, 4.0, 6.0]), groups_of([2, 1, 1])
    assert significance.effect_size(values, groups) == pytest.approx(4 / 2)
    assert significance.effect_size(np.ones(4), groups) == 0


def test_a_detectable_difference_is_detected_as_often_as_said() -> None:
    error, rng = 0.5, generator(11)
    found = significance.detectable(error, 0.95)
    assert found == pytest.approx(2.8 * error, abs=0.01)
    shown = np.abs(rng.normal(found, error, size=20_000)) > 1.96 * error
    assert np.mean(shown) == pytest.approx(significance.POWER, abs=0.01)
    assert significance.groups_needed(found / 2, found, 100) == 400


def test_four_times_the_rows_show_half_the_difference() -> None:
    assert significance.planned(1200) == pytest.approx(significance.planned(300) / 2)
    # The default experiment's own comparison says 2.3 of its 300 rows.
    assert significance.planned(300) == pytest.approx(2.3, abs=0.1)
