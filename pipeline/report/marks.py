"""Which words of a text and its reference the metric counts as shared, and where they stand.

The words are those of the metric's own tokenizer, stemmed where it stems: of ROUGE and of BLEU. chrF counts characters,
so there the words are runs of letters and digits, as written. A word that occurs twice here and once there is shared
once, as in ROUGE (Lin 2004, section 2): as many words are marked as ROUGE-1 counts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.core.params import Evaluate
from pipeline.score import metrics

WORD, PAIR = 1, 2
"""Levels of a mark: a shared word, and shared words side by side in both texts (ROUGE-2 counts such pairs)."""
FAR_SEARCHES = 100
"""After so many words that were not found, only the text close by is searched, which keeps time linear."""
NEAR = 1000
"""Characters."""


@dataclass(frozen=True, slots=True)
class Word:
    """A token at text[start:end]; `key` is what is compared."""

    start: int
    end: int
    key: str


@dataclass(frozen=True, slots=True)
class Mark:
    """text[start:end] is shared, at level `WORD` or `PAIR`."""

    start: int
    end: int
    level: int


Splitter = Callable[[str], list[Word]]


def splitter(name: str, evaluate: Evaluate) -> Splitter:
    """How the metric `name` splits a text into words."""
    tokenize, keys, fold = metrics.tokenizers(name, evaluate)

    def split(text: str) -> list[Word]:
        tokens = tokenize(text)
        found = zip(_places(text, tokens, fold), tokens if keys is tokenize else keys(text), strict=True)
        return [Word(*place, key) for place, key in found if place]

    return split


def shared(text: Sequence[Word], reference: Sequence[Word]) -> tuple[list[Mark], list[Mark]]:
    """The marks of a text and of its reference."""
    common = Counter(word.key for word in text) & Counter(word.key for word in reference)
    pairs = Counter(_pairs(text)) & Counter(_pairs(reference))
    return _marks(text, common, pairs), _marks(reference, common, pairs)


def closest(text: Sequence[Word], references: Sequence[Sequence[Word]]) -> int:
    """Index of the reference with which `text` shares most: the best F1 of single words, the first of equals."""

    counts = Counter(word.key for word in text)

    def f1(reference: Sequence[Word]) -> float:
        common = (Counter(word.key for word in reference) & counts).total()
        return 2 * common / max(1, len(text) + len(reference))

    return max(range(len(references)), key=lambda i: f1(references[i]))


def _pairs(words: Sequence[Word]) -> list[tuple[str, str]]:
    return [(one.key, other.key) for one, other in pairwise(words)]


def _marks(words: Sequence[Word], common: Counter[str], pairs: Counter[tuple[str, str]]) -> list[Mark]:
    """The marks: for each key as many words as are common, those in shared pairs first.

    Neighbours in a pair become one mark.
    """
    paired, left = set(), pairs.copy()
    for i, pair in enumerate(_pairs(words)):
        if left[pair] > 0:
            left[pair] -= 1
            paired.add(i)
    in_pair = {i for first in paired for i in (first, first + 1)}
    chosen, budget = set(), common.copy()
    for i in sorted(range(len(words)), key=lambda i: (i not in in_pair, i)):
        if budget[words[i].key] > 0:
            budget[words[i].key] -= 1
            chosen.add(i)
    marks: list[Mark] = []
    for i in sorted(chosen):
        word = words[i]
        if i - 1 in paired and i - 1 in chosen:
            marks[-1] = Mark(marks[-1].start, word.end, PAIR)
        else:
            marks.append(Mark(word.start, word.end, WORD))
    return marks


def _places(text: str, tokens: Sequence[str], fold: bool) -> list[tuple[int, int] | None]:
    """Where each token stands in `text`, in order; None for one that the tokenizer has changed beyond recognition."""
    # The lower case of a character may be several: `at` leads from the searched text back.
    searched = text.lower() if fold else text
    at = [i for i, character in enumerate(text) for _ in (character.lower() if fold else character)]
    places: list[tuple[int, int] | None] = []
    position = missing = 0
    for token in tokens:
        # A search for what is not there goes to the end of the text: of many such, only the first few do.
        found = searched.find(token, position, None if missing < FAR_SEARCHES else position + len(token) + NEAR)
        if found < 0:
            missing += 1
            places.append(None)
            continue
        position = found + len(token)
        places.append((at[found], at[position - 1] + 1))
    return places
