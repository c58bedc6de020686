"""Scores of texts against references, in points, [0, 100].

ROUGE-1, -2, -L and -Lsum (Lin 2004, sections 2, 3.1 and 3.2) come from `rouge-score`; chrF (Popović 2015) and BLEU
(Papineni et al. 2002) come from `sacrebleu`. Exact match and token F1 are those of answers to questions (Rajpurkar et
al. 2016, section 6.1). BERTScore comes from an encoder of the user's (`pipeline.score.bertscore`).

Both texts of a pair are brought to the normal form `evaluate.normal_form` first. A corpus' score follows from sums over
its rows: of n-gram counts for chrF and BLEU, of each row's score for all others. So a resample of the rows is scored by
addition. With several references BLEU takes the n-grams of all, chrF the best one's counts, and the others the best
one's score. rouge-score's own bootstrap draws from NumPy's global, unseeded generator and is never used.

Dimensions: n rows, k statistics of a row, b sums of rows.
"""

import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.core.params import Evaluate
from pipeline.core.text import LETTERS, SENTENCES, WITHOUT_SPACES, compatible, in_form, runs, sentences
from pipeline.score import bertscore

Floats = NDArray[np.float64]
Tokenize = Callable[[str], list[str]]

LABELS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "chrf": "chrF",
    "bleu": "BLEU",
    "exact_match": "Exact match",
    "token_f1": "Token F1",
    "bertscore": "BERTScore",
}
ANSWERS = ("exact_match", "token_f1")
ARTICLES = ("a", "an", "the")


class Metric(Protocol):
    """One metric. `width` is k. `counted` says that the corpus score is not the mean of the rows' scores."""

    name: str
    width: int
    counted: bool

    def statistics(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """What each text adds to the corpus score, nxk. Each has at least one reference."""

    def corpus(self, sums_bxk: Floats, rows_b: Floats) -> Floats:
        """The scores of b corpora, from the sums of their rows' statistics and their numbers of rows."""

    def each(self, statistics_nxk: Floats) -> Floats:
        """The score of each row by itself."""


def chosen(evaluate: Evaluate) -> list[Metric]:
    """The metrics of `evaluate`, in its order."""
    return [_metric(name, evaluate) for name in evaluate.metrics]


def _metric(name: str, evaluate: Evaluate) -> Metric:
    if name.startswith("rouge"):
        return _Rouge(name, evaluate)
    if name == "bertscore":
        return _Embedded(name, evaluate)
    return _Answer(name, evaluate) if name in ANSWERS else _Counted(name, evaluate)


def signature(evaluate: Evaluate, references: Sequence[Sequence[str]]) -> str:
    """Everything besides the texts that scores depend on, in the format of sacrebleu's signatures.

    `references` are those of each row, of which the number counts.
    """
    numbers = {len(some) for some in references}
    nrefs = numbers.pop() if len(numbers) == 1 else None
    best = [f"nrefs:{nrefs or 'var'}", "refs:max", "mean:examples"]
    parts = [f"form:{evaluate.normal_form}"]
    if rouge := [name for name in evaluate.metrics if name.startswith("rouge")]:
        tokenizer = (
            "default [a-z0-9]"
            if evaluate.rouge_tokenizer == "latin"
            else "letters, marks and digits of any script in NFKC"
        )
        parts += [
            f"rouge-score {version('rouge-score')}",
            "+".join(rouge),
            "F1x100",
            f"stem:{'yes' if evaluate.use_stemmer else 'no'}",
            f"tokenizer:{tokenizer}",
            *([f"sentences:rules {SENTENCES}"] if "rougeLsum" in rouge else []),
            *best,
        ]
    if answers := [name for name in ANSWERS if name in evaluate.metrics]:
        parts += ["SQuAD", "+".join(answers), "x100", "case:lower", "no punctuation, no articles"]
        parts += ["tokenizer:letters, marks and digits of any script in NFKC", *best]
    if (encoder := evaluate.bertscore) is not None:
        parts += [f"BERTScore|F1x100|encoder:{encoder.sha256[:12]}|layer:{encoder.layer}|idf:no|rescaled:no", *best]
    counted = [name for name in ("chrf", "bleu") if name in evaluate.metrics]
    return "|".join([*parts, *(_Counted(name, evaluate).signature(nrefs) for name in counted)])


def sees_code_points(evaluate: Evaluate) -> bool:
    """Whether a metric takes é in one normal form and é in another for different letters."""
    latin = evaluate.rouge_tokenizer == "latin"
    seen = [name in ("chrf", "bleu") or (latin and name.startswith("rouge")) for name in evaluate.metrics]
    return evaluate.normal_form == "none" and any(seen)


def tokenizers(name: str, evaluate: Evaluate) -> tuple[Tokenize, Tokenize, Callable[[str], str]]:
    """How the metric `name` splits a text.

    Returns a function to the tokens, one to the tokens as they are compared (for example stemmed), and one to the form
    of the text in which the tokens stand as they are. chrF and BERTScore compare no words, so runs of letters and
    digits stand in.
    """

    def formed(text: str) -> str:
        return in_form(text, evaluate.normal_form)

    if name in ("chrf", "bertscore"):
        return lambda text: runs(formed(text)), lambda text: runs(formed(text)), formed
    if name == "bleu":
        bleu = _bleu(evaluate, effective_order=False)
        split: Tokenize = lambda text: bleu.tokenizer(formed(text).rstrip()).split()  # noqa: E731
        return split, split, formed
    if name in ANSWERS:
        return answer_tokens, answer_tokens, lambda text: compatible(_unpunctuated(text)).lower()
    if evaluate.rouge_tokenizer == "unicode":
        return _Letters().tokenize, _Letters().tokenize, lambda text: compatible(text).lower()
    plain, keys = (_rouge_tokenizer("latin", stemmed).tokenize for stemmed in (False, evaluate.use_stemmer))
    return lambda text: plain(formed(text)), lambda text: keys(formed(text)), lambda text: formed(text).lower()


class _Mean:
    """A metric whose corpus score is the mean of its rows' scores."""

    width, counted = 1, False

    def __init__(self, name: str, evaluate: Evaluate) -> None:
        self.name, self.evaluate = name, evaluate

    def corpus(self, sums_bxk: Floats, rows_b: Floats) -> Floats:
        return sums_bxk[:, 0] / rows_b

    def each(self, statistics_nxk: Floats) -> Floats:
        return statistics_nxk[:, 0]


class _Rouge(_Mean):
    """F1 of one ROUGE variant. A text without tokens scores 0. ROUGE-Lsum compares sentence by sentence."""

    def statistics(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        from rouge_score.rouge_scorer import RougeScorer  # imports nltk: a second that nothing else should pay

        scorer = RougeScorer([self.name], tokenizer=_Once(self.evaluate))
        found = [
            scorer.score_multi([self._prepared(one) for one in some], self._prepared(text))[self.name].fmeasure
            for text, some in zip(texts, references, strict=True)
        ]
        return 100.0 * np.array(found, np.float64).reshape(-1, 1)

    def _prepared(self, text: str) -> str:
        text = in_form(text, self.evaluate.normal_form)
        return "\n".join(sentences(text)) if self.name == "rougeLsum" else text


class _Once:
    """ROUGE's tokens of each text, made once: stemming takes nearly all the time, and texts are compared many times."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.kind = evaluate.rouge_tokenizer, evaluate.use_stemmer

    def tokenize(self, text: str) -> list[str]:
        return list(_rouge_tokens(*self.kind, text))


@lru_cache(200_000)
def _rouge_tokens(tokenizer: str, stemmed: bool, text: str) -> tuple[str, ...]:
    return tuple(_rouge_tokenizer(tokenizer, stemmed).tokenize(text))


@cache
def _rouge_tokenizer(tokenizer: str, stemmed: bool) -> Any:
    from rouge_score.tokenizers import DefaultTokenizer  # imports nltk: a second that nothing else should pay

    return _Letters() if tokenizer == "unicode" else DefaultTokenizer(use_stemmer=stemmed)


class _Letters:
    """ROUGE's tokens in any script: words of letters, marks and digits, or single characters in `WITHOUT_SPACES`.

    They are those of the compatible form, so texts that read alike have the same tokens.
    """

    def tokenize(self, text: str) -> list[str]:
        return _pattern().findall(compatible(text).lower())  # type: ignore[no-any-return]


@cache
def _pattern() -> Any:
    import regex

    alone = WITHOUT_SPACES
    return regex.compile(rf"(?V1)[{alone}]\p{{M}}*|[[{LETTERS}]--[{alone}]]+")


class _Embedded(_Mean):
    """BERTScore."""

    def statistics(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        assert self.evaluate.bertscore is not None
        pairs = [(text, one) for text, some in zip(texts, references, strict=True) for one in some]
        formed = [(self._formed(text), self._formed(one)) for text, one in pairs]
        scores = iter(bertscore.f1(formed, self.evaluate.bertscore))
        best = [max(next(scores) for _ in some) for some in references]
        return 100.0 * np.array(best, np.float64).reshape(-1, 1)

    def _formed(self, text: str) -> str:
        return in_form(text, self.evaluate.normal_form)


class _Answer(_Mean):
    """Whether an answer's tokens equal a reference's, or the F1 of the tokens that both have."""

    def statistics(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        score = _same if self.name == "exact_match" else _f1
        found = [
            max(score(self._tokens(text), self._tokens(one)) for one in some)
            for text, some in zip(texts, references, strict=True)
        ]
        return 100.0 * np.array(found, np.float64).reshape(-1, 1)

    def _tokens(self, text: str) -> list[str]:
        return answer_tokens(in_form(text, self.evaluate.normal_form))


def answer_tokens(text: str) -> list[str]:
    """The tokens of an answer as SQuAD's evaluation has them (v1.1): lower case, no punctuation, no articles.

    For ASCII text they are exactly those, except that an answer of articles or punctuation alone ("A", "!") keeps
    them, and equals no empty one. Other scripts have the tokens of the unicode tokenizer, all of Unicode's punctuation
    goes (as in MLQA, Lewis et al. 2020), and marks that end a clause part words although no space follows.
    """
    tokens = _Letters().tokenize(_unpunctuated(text))
    return [one for one in tokens if one not in ARTICLES] or tokens or compatible(text).lower().split()


def _unpunctuated(text: str) -> str:
    if text.isascii():
        return text.translate(_NO_PUNCTUATION)
    ends, marks = _punctuation()
    return str(marks.sub("", ends.sub(" ", text)))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@cache
def _punctuation() -> tuple[Any, Any]:
    import regex

    ends = regex.compile(r"(?V1)[\p{Terminal_Punctuation}--\p{ASCII}]")
    return ends, regex.compile(rf"[\p{{P}}{regex.escape(string.punctuation)}]")


def _same(tokens: Sequence[str], others: Sequence[str]) -> float:
    return float(tokens == others)


def _f1(tokens: Sequence[str], others: Sequence[str]) -> float:
    common = (Counter(tokens) & Counter(others)).total()
    return 2 * common / (len(tokens) + len(others)) if common else 0.0


class _Counted:
    """chrF or BLEU.

    sacrebleu has no public function for the counts of a row. Its version is pinned, and a test compares the scores from
    these counts with those of its public functions.
    """

    counted = True

    def __init__(self, name: str, evaluate: Evaluate) -> None:
        from sacrebleu import CHRF

        self.name, self.evaluate = name, evaluate
        self.whole: Any
        self.alone: Any
        if name == "bleu":
            self.whole, self.alone = (_bleu(evaluate, effective_order=alone) for alone in (False, True))
            self.width = 2 + 2 * self.whole.max_ngram_order
        else:
            self.whole = self.alone = CHRF()
            self.width = 3 * self.whole.order

    def signature(self, nrefs: int | None) -> str:
        """sacrebleu's own, behind the name of the metric. `nrefs` is the number of references; None if it varies."""
        # It has no signature before its first score, from which it takes the number of references.
        streams: list[list[str | None]] = [["a", "a"]] * nrefs if nrefs else [["a", "a"], ["a", None]]
        name = self.whole.corpus_score(["a", "a"], streams).name
        return f"{name}|{self.whole.get_signature()}"

    def statistics(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        rows = [
            self.whole._extract_corpus_statistics([self._formed(text)], [[self._formed(one)] for one in some])[0]
            for text, some in zip(texts, references, strict=True)
        ]
        return np.array(rows, np.float64).reshape(-1, self.width)

    def corpus(self, sums_bxk: Floats, rows_b: Floats) -> Floats:  # noqa: ARG002
        return self._scores(self.whole, sums_bxk)

    def each(self, statistics_nxk: Floats) -> Floats:
        return self._scores(self.alone, statistics_nxk)

    def _formed(self, text: str) -> str:
        return in_form(text, self.evaluate.normal_form)

    @staticmethod
    def _scores(scorer: Any, sums_bxk: Floats) -> Floats:
        return np.array([scorer._compute_score_from_stats(sums).score for sums in sums_bxk.tolist()], np.float64)


def _bleu(evaluate: Evaluate, effective_order: bool) -> Any:
    """sacrebleu's BLEU. UserError if its tokenizer cannot be made, such as one whose model cannot be downloaded."""
    from sacrebleu import BLEU

    try:
        return BLEU(tokenize=evaluate.bleu_tokenizer, effective_order=effective_order)
    # sacrebleu lets through whatever its packages and its download raise, and exits where a certificate is refused.
    except (Exception, SystemExit) as error:
        from sacrebleu.utils import SACREBLEU_DIR

        name, why = evaluate.bleu_tokenizer, " ".join(str(error).split()) or type(error).__name__
        if name.startswith("flores"):
            raise UserError(
                f"evaluate.bleu_tokenizer = {name!r} needs a model that sacrebleu downloads once into "
                f"{SACREBLEU_DIR}/models, and that failed ({why}): run this once with a network, remove a half file "
                "there, or set evaluate.bleu_tokenizer to char"
            ) from None
        raise UserError(
            f"evaluate.bleu_tokenizer = {name!r} does not work here ({why}): install what it names, or set "
            "evaluate.bleu_tokenizer to char"
        ) from None
