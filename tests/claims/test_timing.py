"""Timing by turns: who is called how often, and what a ratio and its interval are."""

from functools import partial

import pytest

from claims import timing


def test_every_call_has_its_turn_in_every_round_after_one_that_does_not_count() -> None:
    turns: list[str] = []
    taken = timing.seconds({name: partial(turns.append, name) for name in "ab"}, rounds=8, seed=1)
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 8, "b": 8}
    rounds = ["".join(turns[at : at + 2]) for at in range(0, len(turns), 2)]
    assert len(rounds) == 9
    assert set(rounds) == {"ab", "ba"}


def test_a_ratio_is_the_median_over_rounds_and_knows_its_spread() -> None:
    sure = timing.ratio([2.0] * 10, [1.0] * 10, seed=1)
    assert (sure.low, sure.value, sure.high) == (2, 2, 2)
    # The machine stalled once, for both: a round later it is forgotten.
    stalled = timing.ratio([2.0] * 9 + [20.0], [1.0] * 9 + [1.0], seed=1)
    assert stalled.value == pytest.approx(2)
    unsure = timing.ratio([1.1, 0.9] * 5, [1.0] * 10, seed=1)
    assert unsure.low < 1 < unsure.high
