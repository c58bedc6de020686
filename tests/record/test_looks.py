"""Looks at a test split are counted, and each has its own level, so that many cost no more than one."""

from typing import Any

import numpy as np
import pytest

from pipeline.core import params
from pipeline.record import looks
from pipeline.record.looks import Looks
from pipeline.record.runs import DIGEST, FINISHED, TEST, Stored
from pipeline.score import intervals
from pipeline.score.estimates import Estimate, Judged
from tests.made.experiment import COMPARE


def run(digest: str, test: str | None = "t", status: str = FINISHED) -> Stored:
    tags = {DIGEST: digest} | ({TEST: test} if test else {})
    return Stored("0" * 32, digest, status, tags, {}, {})


class TestCount:
    def test_twelve_looks_are_twelve(self) -> None:
        runs = [run(f"e{i}") for i in range(12)]
        assert looks.among(runs, "e11", "t") == Looks(12, 12, 0)
        assert looks.among(runs, "e11", "t").told().startswith("The test split has been looked at 12 times: ")
        assert looks.among(runs[:11], "e11", "t") == Looks(12, 12, 0)  # not recorded yet

    def test_other_splits_unfinished_runs_and_repetitions_do_not_count(self) -> None:
        runs = [run("a"), run("b", "other"), run("a"), run("c", status="FAILED"), run("d")]
        assert looks.among(runs, "d", "t") == Looks(2, 2, 0)
        assert looks.among(runs, "b", "other") == Looks(1, 1, 0)
        assert looks.among([], "a", "t").told() == "The test split has been looked at once, by this experiment."

    def test_runs_that_do_not_say_count(self) -> None:
        found = looks.among([run("old", None), run("new")], "new", "t")
        assert found == Looks(2, 2, 1)
        assert found.told().endswith("For 1 of them, which are older, that is assumed.")

    def test_a_store_that_cannot_be_used_counts_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert looks.read("a", "t", params.Tracking(uri=None, experiment="toy")) is None


def test_the_levels_of_all_looks_add_up_to_one_test() -> None:
    alphas = [1 - looks.level(place, 0.95) for place in range(1, 10_001)]
    assert alphas[:3] == pytest.approx([0.05 / 2, 0.05 / 6, 0.05 / 12])
    assert 0.0499 < sum(alphas) < 0.05


def moved(differences_hxgxk: Any, level: Any) -> float:
    """The share of histories in which one of k candidates is shown to be better than the champion."""
    found = 0
    for values_gxk in differences_hxgxk:
        p_values = intervals.flip_p_values(values_gxk, 0)
        for place, p in enumerate(p_values, start=1):
            confidence = level(place)
            if p <= 1 - confidence:  # else the interval need not be asked
                one = Estimate(values_gxk[:, [place - 1]].mean(axis=0), values_gxk[:, [place - 1]])
                if Judged(one, COMPARE.model_copy(update={"confidence": confidence})).direction(0) == "higher":
                    found += 1
                    break
    return found / len(differences_hxgxk)


@pytest.mark.slow
def test_forty_equal_candidates_move_the_champion_in_one_history_of_twenty_at_most() -> None:
    draw = np.random.default_rng(0)
    groups, candidates, histories = 12, 40, 1000
    own = draw.normal(size=(histories, groups, 1))  # the champion's luck, which all comparisons share
    differences = draw.normal(size=(histories, groups, candidates)) - own
    assert moved(differences, lambda place: looks.level(place, 0.95)) <= 0.05
    assert moved(differences, lambda _: 0.95) > 0.2
