"""Scores of texts against references, in points, [0, 100].

ROUGE-1, -2, -L and -Lsum (Lin 2004, sections 2, 3.1 and 3.2) come from `rouge-score`; chrF (Popović 2015) and BLEU
(Papineni et al. 2002) come from `sacrebleu`.

A corpus' score follows from sums over its rows: of each row's F1 for ROUGE, of n-gram counts for chrF and BLEU. So a
resample of the rows is scored by addition. With several references ROUGE takes the best one's F1, chrF the best one's
counts, and BLEU the n-grams of all. rouge-score's own bootstrap draws from NumPy's global, unseeded generator and is
never used.

Dimensions: n rows, k statistics of a row, b sums of rows.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.params import Evaluate
from pipeline.core.text import LETTERS, WITHOUT_SPACES, compatible, runs, sentences

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
    return [
        _Rouge(name, evaluate) if name.startswith("rouge") else _Counted(name, evaluate) for name in evaluate.metrics
    ]


def signature(evaluate: Evaluate) -> str:
    """Everything besides the texts that scores depend on, in the format of sacrebleu's signatures."""
    parts = []
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
            "split:regex",
            "mean:examples",
        ]
    counted = [name for name in ("chrf", "bleu") if name in evaluate.metrics]
    return "|".join([*parts, *(_Counted(name, evaluate).signature() for name in counted)])


def sees_code_points(evaluate: Evaluate) -> bool:
    """Whether a metric takes é in one normal form and é in another for different letters."""
    latin = evaluate.rouge_tokenizer == "latin"
    return any(name in ("chrf", "bleu") or latin for name in evaluate.metrics)


def tokenizers(name: str, evaluate: Evaluate) -> tuple[Tokenize, Tokenize, Callable[[str], str]]:
    """How the metric `name` splits a text.

    Returns a function to the tokens, one to the tokens as they are compared (for example stemmed), and one to the form
    of the text in which the tokens stand as they are. chrF has no tokens, so runs of letters and digits stand in.
    """
    if name == "chrf":
        return runs, runs, str
    if name == "bleu":
        from sacrebleu import BLEU

        bleu: Any = BLEU(tokenize=evaluate.bleu_tokenizer)
        split: Tokenize = lambda text: bleu.tokenizer(text.rstrip()).split()  # noqa: E731
        return split, split, str
    if evaluate.rouge_tokenizer == "unicode":
        return _Letters().tokenize, _Letters().tokenize, lambda text: compatible(text).lower()
    from rouge_score.tokenizers import DefaultTokenizer  # imports nltk: a second that nothing else should pay

    plain = DefaultTokenizer(use_stemmer=False).tokenize
    return plain, DefaultTokenizer(use_stemmer=True).tokenize if evaluate.use_stemmer else plain, str.lower


class _Rouge:
    """F1 of one ROUGE variant. A text without tokens scores 0. ROUGE-Lsum compares sentence by sentence."""

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


class _Counted:
    """chrF or BLEU.

    sacrebleu has no public function for the counts of a row. Its version is pinned, and a test compares the scores from
    these counts with those of its public functions.
    """

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

    def signature(self) -> str:
        """sacrebleu's own, with its version first and without the number of references, which differs between rows."""
        name = self.whole.corpus_score(["a"], [["a"]]).name  # it has no signature before its first score
        parts = str(self.whole.get_signature()).split("|")
        kept = [part for part in parts if part.partition(":")[0] not in ("nrefs", "version")]
        return "|".join([f"sacrebleu {version('sacrebleu')}", name, *kept])

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
