"""Scores of texts against references: ROUGE-1, -2, -L, -Lsum (Lin 2004, sections 2, 3.1 and 3.2) by `rouge-score`,
chrF (Popović 2015) and BLEU (Papineni et al. 2002) by `sacrebleu`. All in points, [0, 100].

The score of a corpus follows from sums over its rows: of ROUGE the rows' own F1, of chrF and BLEU their n-gram counts.
So a resample of the rows is scored by adding up. With several references ROUGE takes the best one's F1, chrF the best
one's counts, BLEU the n-grams of all. rouge-score's own bootstrap draws from the global, unseeded NumPy generator and
is never used.

Dimensions: n rows, k statistics of a row, b sums of rows.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.params import Evaluate
from pipeline.core.text import WITHOUT_SPACES, sentences

Floats = NDArray[np.float64]
Tokenize = Callable[[str], list[str]]

LABELS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "chrf": "chrF",
    "bleu": "BLEU",
}


class Metric(Protocol):
    """One metric. `width` is k; `counted` tells whether its corpus score is more than the mean of the rows' scores."""

    name: str
    width: int
    counted: bool

    def statistics(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """nxk: what each text adds to the corpus score, given its references, of which there is at least one."""

    def corpus(self, sums_bxk: Floats, rows_b: Floats) -> Floats:
        """The scores of b corpora: of the sums of their rows' statistics, and of their numbers of rows."""

    def each(self, statistics_nxk: Floats) -> Floats:
        """The score of each row by itself."""


def chosen(evaluate: Evaluate) -> list[Metric]:
    """The metrics of `evaluate`, in its order."""
    return [
        _Rouge(name, evaluate) if name.startswith("rouge") else _Counted(name, evaluate) for name in evaluate.metrics
    ]


def signature(evaluate: Evaluate) -> str:
    """Everything that a figure depends on besides the texts, in the manner of sacrebleu's signatures."""
    parts = []
    if rouge := [name for name in evaluate.metrics if name.startswith("rouge")]:
        tokenizer = "default [a-z0-9]" if evaluate.rouge_tokenizer == "latin" else "letters and digits of any script"
        parts += [
            f"rouge-score {version('rouge-score')}",
            "+".join(rouge),
            "F1x100",
            f"stem:{'yes' if evaluate.use_stemmer else 'no'}",
            f"tokenizer:{tokenizer}",
            "split:regex",
            "mean:examples",
        ]
    if "chrf" in evaluate.metrics:
        parts += [f"sacrebleu {version('sacrebleu')}", "chrF2", "case:mixed", "eff:yes", "nc:6", "nw:0", "space:no"]
    if "bleu" in evaluate.metrics:
        parts += [f"sacrebleu {version('sacrebleu')}", "BLEU", "case:mixed", "eff:no", f"tok:{evaluate.bleu_tokenizer}"]
        parts += ["smooth:exp"]
    return "|".join(parts)


def tokenizers(name: str, evaluate: Evaluate) -> tuple[Tokenize, Tokenize, bool]:
    """How a metric splits a text: its tokens as they stand there, the same as it compares them (stemmed, say), and
    whether it lowers the case first. chrF has none: runs of letters and digits stand in."""
    if name == "chrf":
        return _runs, _runs, False
    if name == "bleu":
        from sacrebleu import BLEU

        bleu: Any = BLEU(tokenize=evaluate.bleu_tokenizer)
        split: Tokenize = lambda text: bleu.tokenizer(text.rstrip()).split()  # noqa: E731
        return split, split, False
    if evaluate.rouge_tokenizer == "unicode":
        return _Letters().tokenize, _Letters().tokenize, True
    from rouge_score.tokenizers import DefaultTokenizer  # imports nltk: a second that nothing else should pay

    plain = DefaultTokenizer(use_stemmer=False).tokenize
    return plain, DefaultTokenizer(use_stemmer=True).tokenize if evaluate.use_stemmer else plain, True


def _runs(text: str) -> list[str]:
    return re.findall(r"\w+", text)


class _Rouge:
    """F1 of one ROUGE variant; a text without a token scores 0. ROUGE-Lsum is scored sentence by sentence."""

    width, counted = 1, False

    def __init__(self, name: str, evaluate: Evaluate) -> None:
        self.name, self.evaluate = name, evaluate

    def statistics(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        from rouge_score.rouge_scorer import RougeScorer  # imports nltk: a second that nothing else should pay

        scorer = RougeScorer(
            [self.name],
            use_stemmer=self.evaluate.use_stemmer,
            tokenizer=_Letters() if self.evaluate.rouge_tokenizer == "unicode" else None,
        )
        found = [
            scorer.score_multi([self._prepared(one) for one in some], self._prepared(text))[self.name].fmeasure
            for text, some in zip(texts, references, strict=True)
        ]
        return 100.0 * np.array(found, np.float64).reshape(-1, 1)

    def corpus(self, sums_bxk: Floats, rows_b: Floats) -> Floats:
        return sums_bxk[:, 0] / rows_b

    def each(self, statistics_nxk: Floats) -> Floats:
        return statistics_nxk[:, 0]

    def _prepared(self, text: str) -> str:
        return "\n".join(sentences(text)) if self.name == "rougeLsum" else text


class _Letters:
    """Tokens for ROUGE in any script: words of letters, marks and digits; single characters where scripts have no
    spaces between words."""

    def tokenize(self, text: str) -> list[str]:
        return _pattern().findall(text.lower())  # type: ignore[no-any-return]


@cache
def _pattern() -> Any:
    import regex

    alone = WITHOUT_SPACES
    return regex.compile(rf"(?V1)[{alone}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{alone}]]+")


class _Counted:
    """chrF or BLEU. sacrebleu offers no public way to the counts of a row: the version is pinned, and a test holds the
    scores that come of them against those of its public functions."""

    counted = True

    def __init__(self, name: str, evaluate: Evaluate) -> None:
        from sacrebleu import BLEU, CHRF

        self.name = name
        self.whole: Any
        self.alone: Any
        if name == "bleu":
            self.whole, self.alone = (
                BLEU(tokenize=evaluate.bleu_tokenizer, effective_order=alone) for alone in (False, True)
            )
            self.width = 2 + 2 * self.whole.max_ngram_order
        else:
            self.whole = self.alone = CHRF()
            self.width = 3 * self.whole.order

    def statistics(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        rows = [
            self.whole._extract_corpus_statistics([text], [[one] for one in some])[0]
            for text, some in zip(texts, references, strict=True)
        ]
        return np.array(rows, np.float64).reshape(-1, self.width)

    def corpus(self, sums_bxk: Floats, rows_b: Floats) -> Floats:  # noqa: ARG002
        return self._scores(self.whole, sums_bxk)

    def each(self, statistics_nxk: Floats) -> Floats:
        return self._scores(self.alone, statistics_nxk)

    @staticmethod
    def _scores(scorer: Any, sums_bxk: Floats) -> Floats:
        return np.array([scorer._compute_score_from_stats(sums).score for sums in sums_bxk.tolist()], np.float64)
