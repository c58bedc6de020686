"""Corrections, effect sizes and power against slow and known answers."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.score import significance


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def groups_of(sizes: list[int]) -> NDArray[Any]:
    return np.array([f"g{i:03}" for i, size in enumerate(sizes) for _ in range(size)])


def test_ties_are_no_difference() -> None:
    assert significance.difference(np.array([0.1 + 0.2, 2.0]), np.array([0.3, 1.0])).tolist() == [0, 1]


def test_holm_as_by_hand() -> None:
    # Sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .06, each at least the one before.
    assert significance.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert significance.holm([0.5, 0.9]) == [1.0, 1.0]
    assert significance.holm([]) == []


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
