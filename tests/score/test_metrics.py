"""Scores against the values of the papers and of the packages' public functions, in any script, with any references."""

import importlib.util
import random
import re
import string
import unicodedata
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers import tokenizer_spm

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.params import Evaluate
from pipeline.core.text import SENTENCES, sentences
from pipeline.score import metrics

WITHOUT_ENCODER = [name for name in metrics.LABELS if name != "bertscore"]
"""BERTScore has tests of its own (tests/score/test_bertscore.py)."""


def chosen(*names: str, **changes: Any) -> Evaluate:
    given = {
        "use_stemmer": False,
        "rouge_tokenizer": "latin",
        "bleu_tokenizer": "13a",
        "normal_form": "NFC",
        "language": None,
        "split": "test",
        "bertscore": None,
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


@pytest.mark.parametrize("name", [name for name in WITHOUT_ENCODER if name != "exact_match"])
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


@pytest.mark.parametrize("name", WITHOUT_ENCODER)
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


WRITTEN = {
    "French": "Où est le café crème, à côté ?",
    "Hindi": "क\u095cी प\u095dाई \u095bरूरी है।",
    "Korean": "한국어 문장을 읽는다.",
    "Vietnamese": "Tiếng Việt ở đây.",
    "Japanese": "がぎぐげご、と彼は言った。",
    "Arabic": "آب في أول الكتاب؟",
    "Greek": "Καλημέρα, τι κάνεις;",
}


@pytest.mark.parametrize("name", WITHOUT_ENCODER)
@pytest.mark.parametrize("script", WRITTEN)
def test_a_text_scores_in_full_whatever_normal_form_it_has(name: str, script: str) -> None:
    composed, apart = WRITTEN[script], unicodedata.normalize("NFD", WRITTEN[script])
    assert composed != apart
    rouge = "latin" if script in ("French", "Vietnamese") else "unicode"
    char = {"bleu_tokenizer": "char", "rouge_tokenizer": rouge}
    for pair in ((apart, composed), (composed, apart)):
        for form in ("NFC", "NFKC"):
            assert score(name, *pair, normal_form=form, **char) == pytest.approx(100)
        if name in ("chrf", "bleu"):
            assert score(name, *pair, normal_form="none", **char) < 100


def test_forms_of_letters_are_the_same_under_nfkc_alone() -> None:
    for name in ("rouge1", "chrf", "bleu"):
        assert score(name, "ﬁve Ｆｕｌｌ words of it", "five Full words of it", normal_form="NFKC") == pytest.approx(
            100
        )
        assert score(name, "ﬁve Ｆｕｌｌ words of it", "five Full words of it") < 90


def test_as_they_are_written_texts_have_the_libraries_own_scores() -> None:
    composed, apart = "un café crème", unicodedata.normalize("NFD", "un café crème")
    expected = sacrebleu.CHRF().sentence_score(apart, [composed]).score
    assert score("chrf", apart, composed, normal_form="none") == pytest.approx(expected)
    expected = RougeScorer(["rouge1"]).score(composed, apart)["rouge1"].fmeasure
    assert score("rouge1", apart, composed, normal_form="none") == pytest.approx(100 * expected)
    assert expected < 1


PAIRS = {
    "Hindi": ("बिल्ली चटाई पर सो रही है। कुत्ता बाहर है।", "बिल्ली चटाई पर बैठी है। कुत्ता बाहर है।"),
    "Arabic": ("القطة تنام على السجادة. الكلب في الخارج؟", "القطة تجلس على السجادة. الكلب في الخارج؟"),
    "Chinese": ("猫在垫子上睡觉。狗在外面。", "猫在垫子上坐着。狗在外面。"),
    "Japanese": ("猫がマットの上で寝ている。犬は外にいる。", "猫がマットの上に座っている。犬は外にいる。"),
    "Thai": ("แมวกำลังนอนบนเสื่อ หมาอยู่ข้างนอก", "แมวกำลังนั่งบนเสื่อ หมาอยู่ข้างนอก"),
}
NO_SPACES = ("Chinese", "Japanese", "Thai")


@pytest.mark.parametrize("script", PAIRS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_scores_of_other_scripts_are_those_of_the_libraries(script: str, form: Any) -> None:
    """With the tokenizers that fit: sacrebleu's of the script, and for ROUGE words, or characters with their marks."""
    text, reference = PAIRS[script]
    given = unicodedata.normalize(form, text)
    for name in ["char", *(["zh"] if script == "Chinese" else ["13a", "intl"] if script not in NO_SPACES else [])]:
        bleu = sacrebleu.BLEU(tokenize=name, effective_order=True).sentence_score(text, [reference]).score
        assert 0 < bleu < 100
        assert score("bleu", given, reference, bleu_tokenizer=name) == pytest.approx(bleu)
    chrf = sacrebleu.CHRF().sentence_score(text, [reference]).score
    assert score("chrf", given, reference) == pytest.approx(chrf)

    class Plain:
        def tokenize(self, text: str) -> list[str]:
            unit = r"[\p{L}\p{N}]\p{M}*" if script in NO_SPACES else r"[\p{L}\p{M}\p{N}]+"
            return regex.findall(unit, unicodedata.normalize("NFKC", text))  # type: ignore[no-any-return]

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Plain())
    for name, expected in scorer.score(reference, text).items():
        assert 0 < expected.fmeasure < 1
        found = score(name, given, reference, rouge_tokenizer="unicode")
        assert found == pytest.approx(100 * expected.fmeasure), name


@pytest.mark.parametrize("script", ["Hindi", "Arabic", "Chinese", "Japanese"])
def test_rouge_lsum_sees_the_sentences_of_scripts_that_mark_them(script: str) -> None:
    first, second = sentences(PAIRS[script][0])
    between = "" if script in NO_SPACES else " "
    here, there = f"{first}{between}{second}", f"{second}{between}{first}"
    assert score("rougeLsum", here, there, rouge_tokenizer="unicode") == pytest.approx(100)
    assert score("rougeL", here, there, rouge_tokenizer="unicode") < 90


# Rajpurkar et al. 2016: normalize_answer, f1_score and exact_match_score of evaluate-v1.1.py, by their description.


def squad(text: str) -> list[str]:
    lower = "".join(one for one in text.lower() if one not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", lower).split()


def test_answers_are_scored_as_in_squad() -> None:
    draw = random.Random(4)
    pieces = [
        "The",
        "a",
        "cat",
        "Cats",
        "an",
        "U.S.",
        "don't",
        "3.5",
        "$5",
        "state-of-the-art",
        "dog!",
        "(b)",
        "theory",
    ]
    partial = 0
    for _ in range(2_000):
        text, reference = (" ".join(draw.choices(pieces, k=draw.randrange(1, 5))) for _ in range(2))
        here, there = squad(text), squad(reference)
        if not here or not there:
            continue
        common = sum((Counter(here) & Counter(there)).values())
        precision, recall = common / len(here), common / len(there)
        f1 = 2 * precision * recall / (precision + recall) if common else 0
        partial += 0 < f1 < 1
        assert score("token_f1", text, reference) == pytest.approx(100 * f1)
        assert score("exact_match", text, reference) == 100 * (here == there)
    assert partial > 500


@pytest.mark.parametrize(
    ("text", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower.", "eiffel tower", 100, 100),
        ("in Paris", "Paris", 0, 200 / 3),
        ("A", "B", 0, 0),  # an answer of articles alone keeps them
        ("A", "a.", 100, 100),
        ("", "A", 0, 0),
        ("the", "A", 0, 0),
        ("!", "!", 100, 100),
        ("", "!", 0, 0),
        ("don’t", "don't", 100, 100),
        ("北京。", "北京", 100, 100),
        ("北京市", "北京", 0, 80),
        ("「東京」です", "東京", 0, 200 / 3),
        ("नई दिल्ली।", "नई दिल्ली", 100, 100),
        ("القاهرة،مصر", "القاهرة مصر", 100, 100),
        ("cafe\u0301", "Café", 100, 100),
        ("แมว", "หมา", 0, 200 / 6),
    ],
)
def test_answers_of_any_script(text: str, reference: str, exact: float, f1: float) -> None:
    assert score("exact_match", text, reference) == exact
    assert score("token_f1", text, reference) == pytest.approx(f1)
    assert score("exact_match", text, "no such thing", reference) == exact  # the best of several


# BLEU's tokenizers of packages and models


@pytest.mark.parametrize(("name", "extra"), [("ja-mecab", "ja"), ("ko-mecab", "ko")])
def test_a_tokenizer_without_its_packages_is_refused_with_their_name(name: str, extra: str) -> None:
    if all(importlib.util.find_spec(module) for module in params.TOKENIZER_PACKAGES[name][1]):
        assert score("bleu", "猫が寝る。", "猫が寝る。", bleu_tokenizer=name) == pytest.approx(100)
        params.require_tokenizer(chosen("bleu", bleu_tokenizer=name))
        return
    with pytest.raises(UserError, match=rf"{name}.*sacrebleu\[{extra}\]"):
        params.require_tokenizer(chosen("bleu", bleu_tokenizer=name))
    with pytest.raises(UserError, match=rf"{name}.*sacrebleu\[{extra}\]"):
        score("bleu", "a", "a", bleu_tokenizer=name)
    params.require_tokenizer(chosen("chrf", bleu_tokenizer=name))  # nothing asks for it


@pytest.mark.parametrize("name", ["flores101", "flores200"])
def test_without_a_network_a_missing_model_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer_spm, "download_file", offline)
    for ask in (
        lambda: score("bleu", "a", "a", bleu_tokenizer=name),
        lambda: metrics.signature(chosen("bleu", bleu_tokenizer=name), [["a"]]),
        lambda: metrics.tokenizers("bleu", chosen("bleu", bleu_tokenizer=name)),
    ):
        with pytest.raises(UserError, match=rf"{name}.*downloads once .*name resolution.*with a network"):
            ask()


def test_pieces_of_a_model_are_the_words_of_bleu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sentencepiece

    place = tmp_path / "models" / Path(tokenizer_spm.SPM_MODELS["flores200"]["url"]).name
    place.parent.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([one for pair in PAIRS.values() for one in pair]),
        model_prefix=str(tmp_path / "tiny"),
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tiny.model").rename(place)
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    for text, reference in PAIRS.values():
        expected = sacrebleu.BLEU(tokenize="flores200", effective_order=True).sentence_score(text, [reference]).score
        assert 0 < expected < 100
        assert score("bleu", text, reference, bleu_tokenizer="flores200") == pytest.approx(expected)
    assert "|tok:flores200|" in metrics.signature(chosen("bleu", bleu_tokenizer="flores200"), [["a"]])


def test_bleu_tokenizes_as_asked() -> None:
    pair = ("猫在睡觉很久", "猫在睡觉很久了")
    assert score("bleu", *pair, bleu_tokenizer="zh") > score("bleu", *pair) == 0


ONE = [["a"], ["b"]]


def test_signature_names_what_the_figures_depend_on() -> None:
    rouge = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    assert metrics.signature(chosen(*rouge, use_stemmer=True), ONE) == (
        "form:NFC|rouge-score 0.1.2|rouge1+rouge2+rougeL+rougeLsum|F1x100|stem:yes|tokenizer:default [a-z0-9]|"
        f"sentences:rules {SENTENCES}|nrefs:1|refs:max|mean:examples"
    )
    assert "|stem:no|" in metrics.signature(chosen(*rouge), ONE)
    assert "sentences" not in metrics.signature(chosen("rouge1"), ONE)
    assert metrics.signature(chosen("rouge1", normal_form="NFKC"), ONE).startswith("form:NFKC|")
    assert metrics.signature(chosen("token_f1", "exact_match"), ONE) == (
        "form:NFC|SQuAD|exact_match+token_f1|x100|case:lower|no punctuation, no articles|"
        "tokenizer:letters, marks and digits of any script in NFKC|nrefs:1|refs:max|mean:examples"
    )


@pytest.mark.parametrize(
    ("references", "nrefs"), [(ONE, "1"), ([["a", "b"], ["c", "d"]], "2"), ([["a"], ["b", "c"]], "var")]
)
def test_signature_has_sacrebleus_own_in_whole(references: list[list[str]], nrefs: str) -> None:
    found = metrics.signature(chosen("rouge1", "chrf", "bleu", bleu_tokenizer="intl"), references)
    assert found.count(f"nrefs:{nrefs}|") == 3
    most = max(map(len, references))
    streams: list[Any] = [[some[i] if i < len(some) else None for some in references] for i in range(most)]
    for public in (sacrebleu.CHRF(), sacrebleu.BLEU(tokenize="intl")):
        name = public.corpus_score(["a", "b"], streams).name
        assert f"|{name}|{public.get_signature()}" in found
