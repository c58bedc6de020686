"""Reference lines by hand: texts that were written without doing the task."""

from pathlib import Path

import pytest

from pipeline.core import paths, records
from pipeline.core.records import Example, Prediction
from pipeline.score import reference_lines
from pipeline.score.evaluate import score_variant
from pipeline.score.significance import Interval
from tests.made.experiment import ASPECTS, EVALUATE, compared, example, plant


def of(rows: list[Example], training: list[Example]) -> dict[str, list[list[str]]]:
    found = reference_lines.texts(rows, [[""]] * len(rows), training, EVALUATE)
    return {line.key: line.texts for line in found}


def test_cut() -> None:
    assert reference_lines.cut("one two\nthree four", "a b c") == "one two three"
    assert reference_lines.cut("one", "a b c") == "one"
    assert reference_lines.cut("猫在跑", "狗叫") == "猫 在"  # no metric sees the space


def test_one_giant_group_has_no_square_of_texts() -> None:
    rows = [example(str(i), "g", ASPECTS[i % 2], "source text", f"t{i}", "") for i in range(2000)]
    texts = of(rows, [])["wrong_aspect"]
    assert texts[0] == [f"t{i}" for i in range(1, 2 * reference_lines.MOST_OTHERS, 2)]
    assert texts[1] == [f"t{i}" for i in range(0, 2 * reference_lines.MOST_OTHERS, 2)]
    assert {len(some) for some in texts} == {reference_lines.MOST_OTHERS}


class TestConstant:
    """The one training target of an aspect that shares most words with the others."""

    def test_by_hand(self) -> None:
        # Mean F1 with "a b", "a c", "a b d": "a b" has (1 + .5 + .8) / 3, "a c" (.5 + 1 + .4) / 3, and "a b d"
        # (.8 + .4 + 1) / 3.
        targets = {"challenge": ["a c", "a b d", "a b"], "approach": ["x"]}
        training = [
            example(f"{aspect}{i}", f"g{i}", aspect, "s", target, "")
            for aspect, some in targets.items()
            for i, target in enumerate(some)
        ]
        rows = [example(aspect, "g", aspect, "s", "t", "") for aspect in ("approach", "challenge", "outcome")]
        assert of(rows, training)["constant"] == [["x"], ["a b"], []]

    def test_equal_candidates_and_targets_without_words(self) -> None:
        training = [example(str(i), str(i), "challenge", "s", target, "") for i, target in enumerate(["…", "a", "a b"])]
        # "a" has F1 of 0, 1 and 2/3, "a b" of 0, 2/3 and 1: the first one counts.
        assert reference_lines.constants(training, EVALUATE) == {"challenge": "a"}
        assert reference_lines.constants(training[:1], EVALUATE) == {"challenge": "…"}

    def test_many_targets_are_sampled_evenly(self) -> None:
        assert reference_lines.spread(range(10), 5) == [0, 2, 4, 6, 8]
        assert reference_lines.spread("abc", 5) == ["a", "b", "c"]
        count = 10 * reference_lines.AGAINST
        training = [example(str(i), str(i), "challenge", "s", f"w{i % 7} w{i % 11}", "") for i in range(count)]
        assert reference_lines.constants(training, EVALUATE)["challenge"] in {row.target for row in training}


def test_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        example("p/1", "p", "challenge", "s", "alpha beta gamma delta", "alpha beta gamma delta"),
        example("p/2", "p", "approach", "s", "alpha beta kappa mu", "alpha zeta zeta zeta"),
        example("q/1", "q", "challenge", "s", "pi rho", "sigma tau"),
        example("q/2", "q", "approach", "s", "pi xi", "pi rho"),
        example("r/1", "r", "challenge", "s", "nu", "nu"),
    ]
    plant(rows, {"base": 1.0, "tuned-17": 1.0})
    texts = [f"{row.target} and words beyond" for row in rows]
    records.write_rows(
        paths.predictions("base"),
        [Prediction(row.id, "", 1, text, 1, "stop") for row, text in zip(rows, texts, strict=True)],
    )
    score_variant("base", EVALUATE)
    lines = {line.key: line for line in compared().lines}
    assert lines["lead"].scores["rouge1"] == pytest.approx((100 + 25 + 0 + 50 + 100) / 5)
    # r has one aspect, so no other aspect's reference
    assert lines["wrong_aspect"].n == 4
    assert lines["wrong_aspect"].scores["rouge1"] == pytest.approx(50)
    assert lines["wrong_aspect"].scores["rouge2"] == pytest.approx((100 / 3 + 100 / 3) / 4)
    assert lines["wrong_aspect"].ahead["rouge1"].value == pytest.approx(50)
    # cut to the reference, base's outputs are the references
    assert lines["base_cut"].scores["rouge1"] == pytest.approx(100)
    assert lines["base_cut"].ahead["rouge1"] == Interval(0, 0, 0)
    assert "100 % of them were longer" in lines["base_cut"].about
