"""The file of scores, and refusals with planted faults."""

import json
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sacrebleu

from pipeline.core import contracts, paths, records
from pipeline.core.errors import UserError
from pipeline.core.params import Evaluate
from pipeline.core.records import Decoding, Example, Prediction
from pipeline.score import evaluate, metrics, side_by_side
from pipeline.score.evaluate import score_variant
from pipeline.score.tables import Table
from tests.made.experiment import scores_of
from tests.made.records import encoded

ALL = Evaluate(
    split="test",
    metrics=["rouge1", "rouge2", "rougeL", "rougeLsum"],
    use_stemmer=False,
    rouge_tokenizer="latin",
    bleu_tokenizer="13a",
    bertscore=None,
    normal_form="NFC",
    language=None,
)
TRANSLATION = ALL.model_copy(update={"metrics": ["rouge1", "chrf", "bleu"], "language": "en"})


def plant(texts: dict[str, str], targets: dict[str, str]) -> None:
    """A test split and the predictions of `base` in the current folder."""
    records.write_rows(
        paths.split("test"), [Example(key, key[0], "", "source", text, "lead", [text]) for key, text in targets.items()]
    )
    records.write_rows(
        paths.predictions("base"),
        [Prediction(key, "0" * 64, 9, text, 4, "stop" if text else "length") for key, text in texts.items()],
    )
    decoding = Decoding("base", "a" * 64, "b" * 64, None, {"num_beams": 1}, "cpu", 1, "float32", {}, False, encoded(1))
    contracts.write(paths.decoding("base"), decoding)


def test_file_of_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({"p/1": "a b c d", "p/2": "", "q/1": "x"}, {"p/1": "a b", "p/2": "a b c", "q/1": "x"})
    score_variant("base", ALL)
    found = scores_of("base")
    assert json.loads(paths.scores("base").read_text()) == contracts.content(found)
    assert (found.n, found.groups, found.signature) == (3, 2, metrics.signature(ALL, [["a"]]))
    assert found.corpus["rouge1"] == pytest.approx((200 / 3 + 0 + 100) / 3)
    assert [found.words, found.reference_words] == pytest.approx([5 / 3, 2])
    assert [found.stopped_by_cap, found.empty, found.copied] == pytest.approx([1 / 3, 1 / 3, 0])
    assert (found.in_language, found.statistics) == (None, {})
    assert found.decoding.device == "cpu"
    assert [row.id for row in found.examples] == ["p/1", "p/2", "q/1"]
    assert found.examples[0].group == "p"


def test_translation_is_counted_over_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    targets = {"1": "The page was published by the editor.", "2": "Choose the images that you want to delete."}
    texts = {"1": "The page was published by an editor.", "2": "Choisissez les images que vous voulez supprimer."}
    plant(texts, targets)
    score_variant("base", TRANSLATION)
    found = scores_of("base")
    expected = sacrebleu.BLEU().corpus_score([*texts.values()], [[*targets.values()]]).score
    assert found.corpus["bleu"] == pytest.approx(expected)
    assert found.corpus["bleu"] != pytest.approx(sum(row.scores["bleu"] for row in found.examples) / 2)
    chrf = next(metric for metric in metrics.chosen(TRANSLATION) if metric.name == "chrf")
    assert Table.of(found, [chrf]).statistics[0].shape == (2, chrf.width)
    assert (found.in_language, found.references_in_language) == (0.5, 1.0)


def test_outputs_that_hold_thoughts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {
        "1": "<think>a</think>b",
        "2": "<think> it never ends",
        "3": "[THINK]a",
        "4": "it ends</think> b",
        "5": "b",
    }
    plant(texts, dict.fromkeys(texts, "b"))
    score_variant("base", ALL)
    assert scores_of("base").thoughts == 4


def test_copies_of_the_source_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({"1": " source ", "2": "other"}, {"1": "a", "2": "b"})
    score_variant("base", ALL)
    assert scores_of("base").copied == 0.5


def test_copies_and_empty_texts_are_counted_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant({"1": "sou\xadrce", "2": "\u200b\xad", "3": "source code"}, {"1": "a", "2": "b", "3": "c"})
    score_variant("base", ALL.model_copy(update={"language": "en"}))
    assert (scores_of("base").copied, scores_of("base").empty) == (1 / 3, 1 / 3)


@pytest.mark.parametrize(
    ("predicted", "said"),
    [
        (["p/1"], "1 test rows have no prediction: p/2"),
        (["p/1", "p/2", "p/3"], "1 predictions belong to no test row: p/3"),
        (["p/2", "p/1"], "in another order or number"),
        (["p/1", "p/2", "p/2"], "in another order or number"),
    ],
)
def test_other_rows_than_the_test_split_are_refused(
    predicted: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant({}, {"p/1": "a", "p/2": "b"})
    records.write_rows(paths.predictions("base"), [Prediction(key, "", 1, "a", 1, "stop") for key in predicted])
    with pytest.raises(UserError, match=said):
        score_variant("base", ALL)
    assert not paths.scores("base").exists()


def test_an_empty_test_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({}, {})
    with pytest.raises(UserError, match="nothing can be scored"):
        score_variant("base", ALL)


def test_an_id_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="1 rows with the id of another"):
        side_by_side.require_same_rows("base", ["p/1", "p/1"], ["p/1", "p/1"], "test")


def test_references_that_the_tokenizer_cannot_see_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({"p/1": "кошка спит"}, {"p/1": "кошка спит"})
    with pytest.raises(UserError, match=r"100% of the references' letters .*rouge_tokenizer to unicode"):
        score_variant("base", ALL)
    score_variant("base", ALL.model_copy(update={"rouge_tokenizer": "unicode"}))
    assert scores_of("base").corpus["rouge1"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("tokenizer", "text", "refused"),
    [
        ("13a", "猫在睡觉。", True),
        ("intl", "ねこがねる。", True),
        ("13a", "แมวกำลังนอน", True),
        ("13a", "ឆ្មាកំពុងគេង", True),
        ("intl", "ແມວກຳລັງນອນ", True),
        ("13a", "ကြောင်အိပ်နေသည်", True),
        ("zh", "แมวกำลังนอน", True),
        ("zh", "ねこがねる。", True),
        ("ja-mecab", "แมวกำลังนอน", True),
        ("zh", "猫在睡觉。", False),
        ("ja-mecab", "ねこがねる。", False),
        ("char", "แมวกำลังนอน", False),
        ("flores200", "ကြောင်အိပ်နေသည်", False),
        ("13a", "고양이가 자고 있다.", False),  # Korean has spaces
        ("13a", "बिल्ली सो रही है।", False),
        ("13a", "القطة نائمة.", False),
        ("13a", "The cat 猫 sleeps.", False),
    ],
)
def test_bleu_refuses_scripts_that_its_tokenizer_cannot_cut(tokenizer: str, text: str, refused: bool) -> None:
    settings = TRANSLATION.model_copy(update={"metrics": ["bleu"], "bleu_tokenizer": tokenizer})
    if not refused:
        evaluate.require_script([[text]], settings)
        return
    for form in ("NFC", "NFD"):
        with pytest.raises(UserError, match=r"BLEU would take whole sentences .*zh .*ja-mecab .*ko-mecab .*flores200"):
            evaluate.require_script([[unicodedata.normalize(form, text)]], settings)
    evaluate.require_script([[text]], settings.model_copy(update={"metrics": ["chrf"]}))


GERMAN = (
    "Die Katze schläft jeden Tag auf dem Sofa und wird von niemandem gestört, der sie kennt und ihre Ruhe achtet.",
    "Der Bürgermeister eröffnete gestern die neue Brücke über den Fluss, die seit vielen Jahren geplant worden war.",
    "Nach langer Beratung beschloss der Ausschuss, die Gebühren nicht zu erhöhen, sondern die Ausgaben zu senken.",
) * 3
ENGLISH = (
    "The cat sleeps on the sofa every day and is disturbed by nobody who knows it and respects its rest at home.",
    "Yesterday the mayor opened the new bridge over the river, which had been planned for a great many years.",
    "After a long discussion the committee decided not to raise the fees, but to lower what the town spends.",
) * 3


def noticed(references: Sequence[str], source: str = "One. Two.", lead: str = "One.", **changes: Any) -> list[str]:
    rows = [Example(str(i), str(i), "", source, text, lead, [text]) for i, text in enumerate(references)]
    return evaluate.noticed(rows, ALL.model_copy(update=changes))


def test_letters_that_rouge_drops_are_noticed_before_they_are_refused() -> None:
    [told] = noticed(["café déjà vu, où est-il ?", "une tête"])
    assert "21% of the references' letters lie outside a-z" in told
    assert "evaluate.rouge_tokenizer unicode" in told
    assert noticed(["café and twenty more letters of English"]) == []
    assert noticed(["café déjà vu, où est-il ?"], rouge_tokenizer="unicode") == []
    assert noticed(["café déjà vu, où est-il ?"], metrics=["chrf"]) == []


def test_characters_that_bleu_does_not_cut_are_noticed_before_they_are_refused() -> None:
    [told] = noticed(["The cat 猫在睡觉 sleeps there."], metrics=["bleu"])
    assert "letters are in scripts without spaces, which BLEU's tokenizer 13a does not cut" in told
    assert noticed(["The cat 猫在睡觉 sleeps there."], metrics=["bleu"], bleu_tokenizer="zh") == []


def test_english_stems_of_another_language_are_noticed() -> None:
    def told(texts: Sequence[str], **changes: Any) -> list[str]:
        return [one for one in noticed(texts, **{"use_stemmer": True} | changes) if "Porter" in one]

    assert len(told(["a b"], language="de")) == 1
    [seems] = told(GERMAN)
    assert "the references seem to be in 'de'" in seems
    for quiet in (told(ENGLISH), told(GERMAN, language="en"), told(GERMAN, use_stemmer=False), told(["oui", "non"])):
        assert quiet == []
    assert told(GERMAN, metrics=["chrf"]) == []


def test_a_lead_that_is_the_whole_source_is_noticed() -> None:
    [told] = noticed(["a"] * 20, "แมวกำลังนอน หมากำลังวิ่ง", "แมวกำลังนอน หมากำลังวิ่ง")
    assert "There is no reference line “Lead”: 100% of the sources" in told
    assert noticed(["a"] * 20) == []
    assert noticed(["a"] * 20, "One.", "One.", metrics=["chrf"]) == []


def test_notices_and_what_is_not_in_the_source_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({"1": "source 12 source", "2": "It is Rome"}, {"1": "source", "2": "7 other"})
    score_variant("base", ALL.model_copy(update={"language": "de", "use_stemmer": True}))
    found = scores_of("base")
    assert ["Porter" in one for one in found.notices] == [True]
    assert found.not_in_source is not None
    assert found.references_not_in_source is not None
    assert (found.not_in_source.numbers.share, found.references_not_in_source.numbers.share) == (1.0, 1.0)
    assert (found.not_in_source.names.found, found.references_not_in_source.names.share) == (1, None)
    content = contracts.content(found)
    for new in ("notices", "not_in_source", "references_not_in_source"):
        del content[new]
    older = contracts.parse(content, contracts.Scores, "an older file")
    assert (older.notices, older.not_in_source) == ([], None)


def test_scores_of_another_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records.write_json(paths.scores("base"), {"variant": "base"})
    with pytest.raises(UserError, match="base.json does not hold what this version writes there"):
        scores_of("base")


def test_importing_is_cheap() -> None:
    """No torch where scores are computed, and nothing slow before it is needed."""
    slow = "{'torch', 'nltk', 'altair', 'vl_convert', 'sacrebleu', 'py3langid', 'scipy'}"
    code = f"import sys, pipeline.report.wording, pipeline.score.evaluate; print({slow} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_answers_to_another_split_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant({"1": "a"}, {"1": "a"})
    sealed = ALL.model_copy(update={"split": "validation"})
    records.write_rows(paths.split("validation"), records.read_rows(paths.split("test"), Example))
    with pytest.raises(UserError, match="is of the test split, and evaluate.split is validation: run `dvc repro`"):
        score_variant("base", sealed)
    assert not paths.scores("base").exists()
