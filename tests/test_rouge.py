"""Scores against the values of the paper that defines them, and refusals with planted faults."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline import paths, records, rouge
from pipeline.errors import UserError
from pipeline.params import Evaluate
from pipeline.records import Decoding, Example, Prediction

ALL = Evaluate(metrics=["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=False)
STEMMED = Evaluate(metrics=["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)


@pytest.mark.parametrize(
    ("candidate", "rouge2", "rouge_l"),
    [
        # Lin 2004, section 3.1, against "police killed the gunman", beta = 1: S2, S3 and S4.
        ("police kill the gunman", 1 / 3, 3 / 4),
        ("the gunman kill police", 1 / 3, 2 / 4),
        ("the gunman police killed", 2 / 3, 2 / 4),
    ],
)
def test_sentence_level_lcs_as_in_the_paper(candidate: str, rouge2: float, rouge_l: float) -> None:
    [scores] = rouge.score_pairs([candidate], ["police killed the gunman"], ALL)
    assert scores["rouge2"] == pytest.approx(100 * rouge2)
    assert scores["rougeL"] == pytest.approx(100 * rouge_l)


def test_summary_level_union_lcs_as_in_the_paper() -> None:
    # Lin 2004, section 3.2: the union LCS is w1 w2 w3 w5, so P = 4/10, R = 4/5, F = .5333.
    [scores] = rouge.score_pairs(["w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"], ["w1 w2 w3 w4 w5"], ALL)
    assert scores["rougeLsum"] == pytest.approx(100 * 2 * 0.4 * 0.8 / (0.4 + 0.8))
    assert scores["rougeLsum"] == pytest.approx(53.33, abs=0.01)


def test_rouge_lsum_sees_sentences_and_rouge_l_does_not() -> None:
    # The first needs the reference split, the second the hypothesis.
    split, whole = "Dogs bark. Cats sleep.", "cats sleep dogs bark"
    for scores in rouge.score_pairs([whole, split], [split, whole], ALL):
        assert scores["rougeLsum"] == pytest.approx(100)
        assert scores["rougeL"] == pytest.approx(50)


def test_stemming_is_honoured() -> None:
    pair = (["police kill the gunmen"], ["police killed the gunmen"])
    assert rouge.score_pairs(*pair, ALL)[0]["rouge1"] == pytest.approx(75)
    assert rouge.score_pairs(*pair, STEMMED)[0]["rouge1"] == pytest.approx(100)


def test_each_pair_is_scored_alone() -> None:
    hypotheses, references = ["a b c", "", "x y"], ["a b d", "a", "x y"]
    together = rouge.score_pairs(hypotheses, references, ALL)
    alone = [rouge.score_pairs([h], [r], ALL)[0] for h, r in zip(hypotheses, references, strict=True)]
    assert together == alone
    assert set(together[1].values()) == {0.0}
    assert all(0 <= value <= 100 for row in together for value in row.values())


@pytest.mark.parametrize("metric", ["rouge1", "rougeLsum"])
def test_only_the_metrics_asked_for(metric: str) -> None:
    asked = Evaluate.model_validate({"metrics": [metric], "use_stemmer": True})
    assert list(rouge.score_pairs(["a b"], ["a b"], asked)[0]) == [metric]


def test_signature_names_what_the_figures_depend_on() -> None:
    assert rouge.signature(STEMMED) == (
        "rouge-score 0.1.2|rouge1+rouge2+rougeL+rougeLsum|F1x100|stem:yes|tokenizer:default [a-z0-9]|split:regex|"
        "mean:examples"
    )
    assert "|stem:no|" in rouge.signature(ALL)


def plant(texts: dict[str, str], targets: dict[str, str]) -> None:
    """A test split and the predictions of `base` in the current folder."""
    records.write_rows(
        paths.split("test"), [Example(key, key[0], "", "source", text, "lead") for key, text in targets.items()]
    )
    records.write_rows(
        paths.predictions("base"),
        [Prediction(key, "0" * 64, 9, text, 4, "stop" if text else "length") for key, text in texts.items()],
    )
    decoding = Decoding("base", "a" * 64, "b" * 64, None, {"num_beams": 1}, "cpu", 1, "float32", {})
    records.write_json(paths.decoding("base"), asdict(decoding))


def test_file_of_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({"p/1": "a b c d", "p/2": "", "q/1": "x"}, {"p/1": "a b", "p/2": "a b c", "q/1": "x"})
    rouge.evaluate("base", ALL)
    scores = rouge.read("base")
    assert json.loads(paths.scores("base").read_text()) == asdict(scores)
    assert (scores.n, scores.groups, scores.signature) == (3, 2, rouge.signature(ALL))
    assert scores.corpus["rouge1"] == pytest.approx((200 / 3 + 0 + 100) / 3)
    assert scores.length == {"predictions": pytest.approx(5 / 3), "references": 2}
    assert [scores.stopped_by_cap, scores.empty] == pytest.approx([1 / 3, 1 / 3])
    assert scores.decoding["device"] == "cpu"
    assert [row["id"] for row in scores.examples] == ["p/1", "p/2", "q/1"]
    assert scores.examples[0]["group"] == "p"


@pytest.mark.parametrize(
    ("predicted", "said"),
    [
        (["p/1"], "1 test rows have no prediction: p/2"),
        (["p/1", "p/2", "p/3"], "1 predictions belong to no test row: p/3"),
        (["p/2", "p/1"], "their order or number"),
        (["p/1", "p/2", "p/2"], "their order or number"),
    ],
)
def test_other_rows_than_the_test_split_are_refused(
    predicted: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant({}, {"p/1": "a", "p/2": "b"})
    records.write_rows(paths.predictions("base"), [Prediction(key, "", 1, "a", 1, "stop") for key in predicted])
    with pytest.raises(UserError, match=said):
        rouge.evaluate("base", ALL)
    assert not paths.scores("base").exists()


def test_an_empty_test_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({}, {})
    with pytest.raises(UserError, match="nothing can be scored"):
        rouge.evaluate("base", ALL)


def test_an_id_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="1 rows with the id of another"):
        rouge.same_rows("base", ["p/1", "p/1"], ["p/1", "p/1"])


def test_references_that_the_tokenizer_cannot_see_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({"p/1": "кошка спит"}, {"p/1": "кошка спит"})
    with pytest.raises(UserError, match="100% of the references' letters"):
        rouge.evaluate("base", ALL)


def test_scores_of_another_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records.write_json(paths.scores("base"), {"variant": "base"})
    with pytest.raises(UserError, match="does not hold scores"):
        rouge.read("base")


def test_importing_is_cheap() -> None:
    """No torch where scores are computed, and nothing slow before it is needed."""
    code = (
        "import sys, pipeline.report, pipeline.rouge; print({'torch', 'nltk', 'altair', 'vl_convert'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
