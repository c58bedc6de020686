"""What is marked as shared is what the metric counts, where it stands in the text."""

import random
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pipeline.core.params import Evaluate
from pipeline.report import marks as overlap
from pipeline.report.marks import PAIR, WORD, Mark, Word
from tests.made.data import WORDS


def given(**change: Any) -> Evaluate:
    content: dict[str, Any] = {"metrics": ["rouge1"], "use_stemmer": True, "rouge_tokenizer": "latin"}
    return Evaluate(
        **content
        | {"bleu_tokenizer": "13a", "normal_form": "NFC", "language": None, "split": "test", "bertscore": None}
        | change
    )


def marked(text: str, reference: str, name: str = "rouge1", **change: Any) -> list[tuple[str, int]]:
    split = overlap.splitter(name, given(**change))
    marks, _ = overlap.shared(split(text), split(reference))
    return [(text[mark.start : mark.end], mark.level) for mark in marks]


def test_stems_are_shared_and_pairs_are_one_mark() -> None:
    text = "The Models' training, and the cat."
    assert marked(text, "Model trains: cats!") == [("Models' training", PAIR), ("cat", WORD)]
    assert marked(text, "Model trains: cats!", use_stemmer=False) == []
    assert marked("They run.", "They run.") == [("They run", PAIR)]


def test_a_word_is_shared_as_often_as_both_have_it() -> None:
    assert marked("a b a c a", "a x a") == [("a", WORD), ("a", WORD)]
    # of three that could be marked, those in the shared pair
    assert marked("cat x cat y cat dog", "cat dog") == [("cat dog", PAIR)]


def test_as_many_words_are_marked_as_rouge_counts() -> None:
    draw, scorer = random.Random(0), RougeScorer(["rouge1"], use_stemmer=True)
    split = overlap.splitter("rouge1", given())
    for _ in range(300):
        text, reference = (" ".join(draw.choices(WORDS[:8], k=draw.randint(0, 12))) + "." for _ in range(2))
        words, others = split(text), split(reference)
        both = [
            sum(any(mark.start <= word.start < mark.end for mark in marks) for word in of)
            for of, marks in zip((words, others), overlap.shared(words, others), strict=True)
        ]
        f1 = scorer.score(reference, text)["rouge1"].fmeasure
        assert both[0] == both[1]
        assert 2 * both[0] / max(1, len(words) + len(others)) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "reference", "name", "change", "expected"),
    [
        ("İstanbul ΛΟΓΟΣ, ΛΟΓΟΣ", "λογος λογος", "rouge1", {"rouge_tokenizer": "unicode"}, ["ΛΟΓΟΣ, ΛΟΓΟΣ"]),
        ("我爱北京", "北京", "rouge1", {"rouge_tokenizer": "unicode"}, ["北京"]),
        ("Save, now.", "save now.", "bleu", {}, ["now."]),
        ("北京 is", "北京", "bleu", {"bleu_tokenizer": "zh"}, ["北京"]),
        ("Save, now.", "Save; Now", "chrf", {}, ["Save"]),
        ("की बात", "कि बात", "chrf", {}, ["बात"]),
        ("le cafe\u0301, noir", "café", "rouge1", {"rouge_tokenizer": "unicode"}, ["cafe\u0301"]),
        ("Wör\xadter Ｆｕｌｌ", "wörter full", "rouge1", {"rouge_tokenizer": "unicode"}, ["Wör\xadter Ｆｕｌｌ"]),
        ("की बात", "कि बात", "rouge1", {"rouge_tokenizer": "unicode"}, ["बात"]),
        ("한국어", "\u1112\u1161\u11ab국어", "rouge1", {"rouge_tokenizer": "unicode"}, ["한국어"]),
        ("The answer: don't, now.", "Answer dont now", "token_f1", {}, ["answer: don't, now"]),
        ("It is Paris", "paris", "exact_match", {}, ["Paris"]),
        ("「東京」です。", "東京", "token_f1", {}, ["東京"]),
        ("le cafe\u0301, noir", "café", "chrf", {}, ["cafe\u0301"]),
        ("le cafe\u0301, noir", "café", "bleu", {}, ["cafe\u0301"]),
        ("le cafe\u0301, noir", "café", "chrf", {"normal_form": "none"}, []),
        ("", "x", "rouge1", {}, []),
        ("x", "", "rouge1", {}, []),
    ],
)
def test_the_words_are_the_tokenizers(
    text: str, reference: str, name: str, change: dict[str, Any], expected: list[str]
) -> None:
    change = {"use_stemmer": False} | change
    assert [word for word, _ in marked(text, reference, name, **change)] == expected


def test_a_token_that_stands_nowhere_is_left_out() -> None:
    # 13a turns the entity into a character that the text does not have
    assert [word for word, _ in marked("say &quot;hi&quot; twice", 'say "hi" twice', "bleu")] == ["say", "hi", "twice"]


def test_after_many_missing_tokens_others_are_looked_for_close_by() -> None:
    split = overlap.splitter("bleu", given())
    far = " near" + " " * 2 * overlap.NEAR + "far"
    assert [word.key for word in split(far)] == ["near", "far"]
    found = [word.key for word in split("&lt;x" + " &quot;y" * overlap.FAR_SEARCHES + far)]
    assert found == ["x", *["y"] * overlap.FAR_SEARCHES, "near"]


def test_the_closest_reference() -> None:
    split = overlap.splitter("rouge1", given())
    others = [split(one) for one in ("nothing here", "a cat sat", "a cat sat down long ago")]
    assert overlap.closest(split("a cat sat"), others) == 1
    assert overlap.closest(split("zzz"), others) == 0


def test_both_texts_are_marked() -> None:
    words = [Word(0, 1, "a"), Word(2, 3, "b")], [Word(0, 1, "b"), Word(5, 6, "a")]
    assert overlap.shared(*words) == ([Mark(0, 1, WORD), Mark(2, 3, WORD)], [Mark(0, 1, WORD), Mark(5, 6, WORD)])
