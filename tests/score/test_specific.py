"""The gain that is specific to the source: derangements, a score by hand, and planted models without any."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.core import paths, records
from pipeline.core.records import Example, Prediction
from pipeline.score import metrics, specific
from pipeline.score.comparison import Comparison
from pipeline.score.evaluate import score_variant
from pipeline.score.specific import Pairs, Variant
from pipeline.score.tables import Table
from tests.made.experiment import COMPARE, EVALUATE, compared, example, examples, plant

CHOSEN = metrics.chosen(EVALUATE.model_copy(update={"metrics": ["rouge1", "rouge2"]}))


def variant(texts: list[str], rows: list[Example]) -> Variant:
    return Variant([[text] for text in texts], Table.mean([[text] for text in texts], rows, CHOSEN))


class TestPairs:
    def test_each_row_meets_others_of_its_aspect_and_never_its_own_group(self) -> None:
        rows = examples(12)
        pairs = Pairs.of(rows)
        assert all(rows[a].group != rows[b].group for a, b in zip(pairs.row_p, pairs.other_p, strict=True))
        assert all(rows[a].aspect == rows[b].aspect for a, b in zip(pairs.row_p, pairs.other_p, strict=True))
        # Derangements: each row is met as often as it meets others.
        assert Counter(pairs.row_p) == Counter(pairs.other_p) == dict.fromkeys(range(24), specific.OTHERS)

    def test_are_the_same_in_any_order_of_rows(self) -> None:
        rows = examples(6)
        order = random.Random(0).sample(rows, len(rows))
        met = [
            {(some[a].id, some[b].id) for a, b in zip(pairs.row_p, pairs.other_p, strict=True)}
            for some in (rows, order)
            for pairs in [Pairs.of(some)]
        ]
        assert met[0] == met[1]

    def test_an_aspect_of_one_group_meets_nothing(self) -> None:
        rows = [*examples(3), *(example(f"x{i}", f"p{i}", "outcome", "s", "t", "") for i in range(2))]
        assert Pairs.of(rows).rows() == list(range(6))
        assert Pairs.of(rows[-1:]).rows() == []
        assert Pairs.of([]).rows() == []

    def test_of_many_rows_each_meets_at_least_one_other(self) -> None:
        rows = [example(str(i), str(i), "a", "s", "t", "") for i in range(specific.MOST_PAIRS + 1)]
        assert Counter(Pairs.of(rows).row_p) == dict.fromkeys(range(len(rows)), 1)

    def test_groups_of_unequal_size_meet(self) -> None:
        sizes = (("p", 3), ("q", 1), ("r", 1))
        rows = [example(f"{g}{i}", g, "a", "s", "t", "") for g, n in sizes for i in range(n)]
        pairs = Pairs.of(rows)
        met = {i: {b for a, b in zip(pairs.row_p, pairs.other_p, strict=True) if a == i} for i in range(5)}
        assert met == {0: {3, 4}, 1: {3, 4}, 2: {3, 4}, 3: {0, 4}, 4: {0, 3}}
        assert set(pairs.weight_p) == {0.5}

    def test_without_a_group_neither_its_references_nor_its_outputs_count(self) -> None:
        rows = [example(name, name, "a", "s", target, "") for name, target in (("p", "a b"), ("q", "c"), ("r", "a"))]
        pairs = Pairs.of(rows)
        texts = ["a b", "c", "a d"]
        found = pairs.corpus(pairs.statistics([[text] for text in texts], rows, CHOSEN), CHOSEN)
        # p's text against q's and r's references, and so on; with two others, each pair weighs a half.
        f1 = {("p", "q"): 0, ("p", "r"): 200 / 3, ("q", "p"): 0, ("q", "r"): 0, ("r", "p"): 50, ("r", "q"): 0}
        assert found.scores_m[0] == pytest.approx(np.mean(list(f1.values())))
        for i, name in enumerate("pqr"):
            left = [value for pair, value in f1.items() if name not in pair]
            assert found.without_gxm[i, 0] == pytest.approx(np.mean(left))


class TestMeasured:
    def test_a_gain_on_own_sources_is_specific(self) -> None:
        rows = examples(12)
        whole, *aspects = specific.measured(
            rows, variant(["noise"] * 24, rows), [variant([row.target for row in rows], rows)], COMPARE
        )
        one = whole.results["rouge2"]
        assert (one.base_own, one.base_other, one.tuned_own) == (0, 0, 100)
        assert one.gain.value == pytest.approx(100 - one.tuned_other)
        assert (whole.aspect, whole.n, whole.groups, one.direction) == (None, 24, 12, "higher")
        assert [(part.aspect, part.n, part.groups) for part in aspects] == [("challenge", 12, 12), ("approach", 12, 12)]

    def test_p_of_aspects_is_corrected_for_their_number(self) -> None:
        rows = examples(12)
        base = [" ".join(row.target.split()[:4]) for row in rows]
        tuned = [" ".join(row.target.split()[: 4 + i % 2 * 2]) for i, row in enumerate(rows)]
        whole, *aspects = specific.measured(rows, variant(base, rows), [variant(tuned, rows)], COMPARE)
        smallest = min(gain.p for part in aspects for gain in part.results.values())
        assert smallest >= 4 / 2**11  # the least p of 12 groups is 2 / 2**12; there are four questions
        assert whole.results["rouge1"].p < smallest

    def test_no_aspect_has_enough_groups(self) -> None:
        rows = [example(f"{i}", f"{i}", f"aspect {i}", "s", "t", "") for i in range(12)]
        assert specific.measured(rows, variant(["x"] * 12, rows), [variant(["t"] * 12, rows)], COMPARE) == []


def planted(tuned: Callable[[Example], str]) -> Comparison:
    """Base writes half of each reference and noise of its own; tuned writes what `tuned` says."""
    draw = random.Random(0)
    common = ["we", "present", "a", "new", "model", "that", "is", "better", "than", "all", "before", "it"]
    targets = {row.id: " ".join([*common, *row.target.split()]) for row in examples(20)}
    rows = [replace(row, target=targets[row.id], references=[targets[row.id]]) for row in examples(20)]
    plant(rows, {"base": 0.3, "tuned-17": 0.3})
    for name, write in (("base", lambda row: " ".join(draw.sample(row.target.split(), 5))), ("tuned-17", tuned)):
        texts = [Prediction(row.id, "", 9, write(row), 9, "stop") for row in rows]
        records.write_rows(paths.predictions(name), texts)
        score_variant(name, EVALUATE)
    return compared()


def test_a_model_that_writes_one_fluent_sentence_for_everything_is_not_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = planted(lambda _: "we present a new model that is better than all before it")
    assert all(found.results[name].direction == "higher" for name in COMPARE.decide_by)
    assert found.verdict == "unspecific"
    assert found.specific[0].results["rouge1"].direction in ("none", "lower")
    # The same beginning with what the source says is better.
    better = planted(lambda row: " ".join(row.target.split()[:16]))
    assert better.verdict == "better"
