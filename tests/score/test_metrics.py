"""Scores against the values of the papers and of the packages' public functions, in any script, with any references."""

import unicodedata
from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from pipeline.core.params import Evaluate
from pipeline.score import metrics


def chosen(*names: str, **changes: Any) -> Evaluate:
    given = {
        "use_stemmer": False,
        "rouge_tokenizer": "latin",
        "bleu_tokenizer": "13a",
        "normal_form": "NFC",
        "language": None,
    }
    return Evaluate.model_validate(given | {"metrics": list(names)} | changes)


def score(name: str, text: str, *references: str, **changes: Any) -> float:
    [metric] = metrics.chosen(chosen(name, **changes))
    return float(metric.each(metric.statistics([text], [references]))[0])


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
    assert score("rouge2", candidate, "police killed the gunman") == pytest.approx(100 * rouge2)
    assert score("rougeL", candidate, "police killed the gunman") == pytest.approx(100 * rouge_l)


def test_summary_level_union_lcs_as_in_the_paper() -> None:
    # Lin 2004, section 3.2: the union LCS is w1 w2 w3 w5, so P = 4/10, R = 4/5, F = .5333.
    found = score("rougeLsum", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    assert found == pytest.approx(100 * 2 * 0.4 * 0.8 / (0.4 + 0.8))
    assert found == pytest.approx(53.33, abs=0.01)


def test_rouge_lsum_sees_sentences_and_rouge_l_does_not() -> None:
    # The first needs the reference split, the second the hypothesis.
    split, whole = "Dogs bark. Cats sleep.", "cats sleep dogs bark"
    for text, reference in ((whole, split), (split, whole)):
        assert score("rougeLsum", text, reference) == pytest.approx(100)
        assert score("rougeL", text, reference) == pytest.approx(50)


def test_stemming_is_honoured() -> None:
    pair = ("police kill the gunmen", "police killed the gunmen")
    assert score("rouge1", *pair) == pytest.approx(75)
    assert score("rouge1", *pair, use_stemmer=True) == pytest.approx(100)


@pytest.mark.parametrize("name", metrics.LABELS)
def test_each_text_is_scored_alone_and_an_empty_one_scores_nothing(name: str) -> None:
    [metric] = metrics.chosen(chosen(name))
    texts, references = ["a b c d e", "", "x y z v w"], [["a b c d f"], ["a"], ["x y z v w"]]
    together = metric.statistics(texts, references)
    alone = [metric.statistics([text], [some]) for text, some in zip(texts, references, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    scores = metric.each(together)
    assert scores[1] == 0
    assert scores[2] == pytest.approx(100)
    assert 0 < scores[0] < 100


TEXTS = ["the cat sat on the mat", "a small dog runs over there", "", "Où est le chat ?"]
REFERENCES = ["the cat is on the mat", "a small dog ran over there now", "something", "Où est le petit chat ?"]


@pytest.mark.parametrize(("name", "public"), [("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())])
def test_corpus_scores_are_those_of_sacrebleu(name: str, public: Any) -> None:
    [metric] = metrics.chosen(chosen(name))
    statistics = metric.statistics(TEXTS, [[one] for one in REFERENCES])
    assert statistics.shape == (4, metric.width)
    found = metric.corpus(statistics.sum(axis=0, keepdims=True), np.array([4.0]))
    assert found == pytest.approx([public.corpus_score(TEXTS, [REFERENCES]).score])
    # Twice the same row is another corpus: sums over a resample, not over all rows.
    twice = metric.corpus(statistics[[0, 0, 1]].sum(axis=0, keepdims=True), np.array([3.0]))
    expected = public.corpus_score([TEXTS[i] for i in (0, 0, 1)], [[REFERENCES[i] for i in (0, 0, 1)]]).score
    assert twice == pytest.approx([expected])


def test_rows_alone_are_those_of_sacrebleu() -> None:
    bleu, chrf = sacrebleu.BLEU(effective_order=True), sacrebleu.CHRF()
    for text, reference in zip(TEXTS, REFERENCES, strict=True):
        assert score("bleu", text, reference) == pytest.approx(bleu.sentence_score(text, [reference]).score)
        assert score("chrf", text, reference) == pytest.approx(chrf.sentence_score(text, [reference]).score)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum", "chrf", "bleu"])
def test_the_best_of_several_references_counts(name: str) -> None:
    text, bad, good = "the cat sat on the mat", "a dog ran over a hill", "the cat sat on the mat"
    assert score(name, text, bad) < 50
    assert score(name, text, bad, good) == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "reference", "shared"),
    [
        ("кошка спит", "кошка бежит", 50),
        ("बिल्ली सो रही", "बिल्ली सो गई", 200 / 3),  # marks belong to the word
        ("猫在睡觉", "猫在跑步", 50),  # characters by themselves
        ("Le café est fermé", "le café est ouvert", 75),
    ],
)
def test_words_of_other_scripts(text: str, reference: str, shared: float) -> None:
    assert score("rouge1", text, reference, rouge_tokenizer="unicode") == pytest.approx(shared)


@pytest.mark.parametrize(
    "text", ["café crème", "हिन्दी की किताब", "한국어 문장", "ﬁve Ｆｕｌｌ", "می\u200cخواهم", "Wör\xadter"]
)
def test_a_text_that_reads_as_its_reference_scores_in_full(text: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        other = unicodedata.normalize(form, text)
        for name in ("rouge1", "rougeLsum"):
            assert score(name, other, text, rouge_tokenizer="unicode") == pytest.approx(100)
    assert score("rouge1", "की", "कि", rouge_tokenizer="unicode") == 0


def test_the_libraries_own_definitions_stay() -> None:
    composed, apart = "un café crème", unicodedata.normalize("NFD", "un café crème")
    assert score("chrf", apart, composed) == pytest.approx(sacrebleu.CHRF().sentence_score(apart, [composed]).score)
    expected = RougeScorer(["rouge1"]).score(composed, apart)["rouge1"].fmeasure
    assert score("rouge1", apart, composed) == pytest.approx(100 * expected)
    assert expected < 1


def test_bleu_tokenizes_as_asked() -> None:
    pair = ("猫在睡觉很久", "猫在睡觉很久了")
    assert score("bleu", *pair, bleu_tokenizer="zh") > score("bleu", *pair) == 0


def test_signature_names_what_the_figures_depend_on() -> None:
    rouge = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    assert metrics.signature(chosen(*rouge, use_stemmer=True)) == (
        "rouge-score 0.1.2|rouge1+rouge2+rougeL+rougeLsum|F1x100|stem:yes|tokenizer:default [a-z0-9]|split:regex|"
        "mean:examples"
    )
    assert "|stem:no|" in metrics.signature(chosen(*rouge))
    assert metrics.signature(chosen("chrf", "bleu", bleu_tokenizer="intl")) == (
        "sacrebleu 2.6.0|chrF2|case:mixed|eff:yes|nc:6|nw:0|space:no|"
        "sacrebleu 2.6.0|BLEU|case:mixed|eff:no|tok:intl|smooth:exp"
    )
