"""Looks at a test split are counted, and each has its own level, so that many cost no more than one."""

from typing import Any

import numpy as np
import pytest

from pipeline.core import params
from pipeline.record import looks
from pipeline.record.looks import Look, Looks
from pipeline.record.runs import ANSWERS, DIGEST, FINISHED, RULE, SPLIT, TEST, Stored
from pipeline.score import intervals
from pipeline.score.estimates import Estimate, Judged
from tests.made.experiment import COMPARE


def run(digest: str, test: str | None = "t", status: str = FINISHED, **tags: str) -> Stored:
    """A run; `answers`, `rule` and `split` are as of `Look`."""
    names = {"answers": ANSWERS, "rule": RULE, "split": SPLIT}
    held = {DIGEST: digest} | ({TEST: test} if test else {}) | {names[key]: one for key, one in tags.items()}
    return Stored("0" * 32, digest, status, held, {}, {})


def among(runs: list[Stored], digest: str, test: str | None = "t", **tags: str) -> Looks:
    return looks.among(runs, Look.of(run(digest, test, **tags).tags))


class TestCount:
    def test_twelve_looks_are_twelve(self) -> None:
        runs = [run(f"e{i}") for i in range(12)]
        assert among(runs, "e11") == Looks(12, 12, 0)
        assert among(runs, "e11").told().startswith("The test split has been looked at 12 times: ")
        assert among(runs[:11], "e11") == Looks(12, 12, 0)  # not recorded yet

    def test_other_splits_unfinished_runs_and_repetitions_do_not_count(self) -> None:
        runs = [run("a"), run("b", "other"), run("a"), run("c", status="FAILED"), run("d")]
        assert among(runs, "d") == Looks(2, 2, 0)
        assert among(runs, "b", "other") == Looks(1, 1, 0)
        assert among([], "a").told() == "The test split has been looked at once, by this experiment."

    def test_runs_that_do_not_say_count(self) -> None:
        found = among([run("old", None), run("new")], "new")
        assert found == Looks(2, 2, 1)
        assert found.told().endswith("For 1 of them, which are older, that is assumed.")

    def test_a_store_that_cannot_be_used_counts_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert looks.read(Look.of(run("a").tags), params.Tracking(uri=None, experiment="toy")) is None

    def test_a_report_that_is_made_anew_is_no_look(self) -> None:
        runs = [run("a", answers="x", rule="r"), run("b", answers="x", rule="r"), run("c", answers="y", rule="r")]
        assert among(runs, "c", answers="y", rule="r") == Looks(2, 2, 0)
        assert among(runs, "d", answers="x", rule="r") == Looks(1, 2, 0)

    def test_another_rule_for_the_same_answers_is_a_look_and_is_told(self) -> None:
        runs = [run("a", answers="x", rule="r"), run("b", answers="y", rule="s")]
        found = among(runs, "c", answers="x", rule="s")
        assert found == Looks(3, 3, 0, rules=1)
        assert "The same answers were scored before under 1 other rule of decision" in found.told()
        assert among(runs, "b", answers="y", rule="s").rules == 0


class TestSeal:
    CHOSEN = run("v", "v", answers="x", rule="r", split="validation")

    def test_a_rule_that_was_recorded_before_the_test_is_told(self) -> None:
        found = among([self.CHOSEN], "t", answers="x", rule="r", split="test")
        assert found == Looks(1, 1, 0, fixed=True)
        assert found.told().endswith("was recorded before this experiment answered the split.")

    @pytest.mark.parametrize(
        "runs",
        [
            [],
            [run("v", "v", answers="x", rule="other", split="validation")],
            [run("v", "v", answers="other", rule="r", split="validation")],
            [run("v", "v", "FAILED", answers="x", rule="r", split="validation")],
            [run("t", "t", answers="x", rule="r", split="test"), CHOSEN],
            [run("t", "t", answers="x", rule="other", split="test"), CHOSEN],
        ],
    )
    def test_a_rule_that_was_not_recorded_before_is_not_said_to_be(self, runs: list[Stored]) -> None:
        found = among(runs, "t", answers="x", rule="r", split="test")
        assert not found.fixed
        assert "recorded before" not in found.told()

    def test_looks_at_the_validation_split_are_told_as_such(self) -> None:
        told = among([self.CHOSEN], "w", "v", answers="y", rule="r", split="validation").told()
        assert told.startswith("The validation split has been looked at 2 times")

    def test_answers_are_tested_once(self) -> None:
        tested = run("t", answers="x", rule="r", split="test")
        assert looks.tested([self.CHOSEN, tested], "x") is tested
        assert looks.tested([self.CHOSEN, tested], "y") is None
        assert looks.tested([self.CHOSEN, run("t", status="FAILED", answers="x", split="test")], "x") is None


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
