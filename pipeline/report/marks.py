"""The words that a text shares with its reference, as the metric counts them, and their positions.

For ROUGE and BLEU, words come from the metric's own tokenizer, with its stemming. chrF counts characters, so its words
are runs of letters and digits, as written. A word that occurs twice in one text and once in the other is shared once,
as in ROUGE (Lin 2004, section 2), so as many words are marked as ROUGE-1 counts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.core.params import Evaluate
from pipeline.score import metrics

WORD, PAIR = 1, 2
"""Levels of a mark: a shared word, and shared words that are neighbours in both texts (ROUGE-2 counts such pairs)."""
FAR_SEARCHES = 100
"""After this many words that were not found, only the next `NEAR` characters are searched, which keeps time linear."""
NEAR = 1000


@dataclass(frozen=True, slots=True)
class Word:
    """A token at text[start:end]. Its `key` is compared, for example the stem."""

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
    """A function that splits a text into words as the metric `name` does."""
    tokenize, keys, form = metrics.tokenizers(name, evaluate)

    def split(text: str) -> list[Word]:
        tokens = tokenize(text)
        found = zip(_places(text, tokens, form), tokens if keys is tokenize else keys(text), strict=True)
        return [Word(*place, key) for place, key in found if place]

    return split


def shared(text: Sequence[Word], reference: Sequence[Word]) -> tuple[list[Mark], list[Mark]]:
    """The marks of a text and of its reference."""
    common = Counter(word.key for word in text) & Counter(word.key for word in reference)
    pairs = Counter(_pairs(text)) & Counter(_pairs(reference))
    return _marks(text, common, pairs), _marks(reference, common, pairs)


def closest(text: Sequence[Word], references: Sequence[Sequence[Word]]) -> int:
    """The index of the reference with the best F1 of single words, the first of equal ones."""
    counts = Counter(word.key for word in text)

    def f1(reference: Sequence[Word]) -> float:
        common = (Counter(word.key for word in reference) & counts).total()
        return 2 * common / max(1, len(text) + len(reference))

    return max(range(len(references)), key=lambda i: f1(references[i]))


def _pairs(words: Sequence[Word]) -> list[tuple[str, str]]:
    return [(one.key, other.key) for one, other in pairwise(words)]


def _marks(words: Sequence[Word], common: Counter[str], pairs: Counter[tuple[str, str]]) -> list[Mark]:
    """Mark as many words of each key as are common, preferring shared pairs. Each pair becomes one mark."""
    # 1. The numbers of the words that begin a shared pair.
    paired, left = set(), pairs.copy()
    for i, pair in enumerate(_pairs(words)):
        if left[pair] > 0:
            left[pair] -= 1
            paired.add(i)
    # 2. The words to mark.
    in_pair = {i for first in paired for i in (first, first + 1)}
    chosen, budget = set(), common.copy()
    for i in sorted(range(len(words)), key=lambda i: (i not in in_pair, i)):
        if budget[words[i].key] > 0:
            budget[words[i].key] -= 1
            chosen.add(i)
    # 3. Their marks, joined within pairs.
    marks: list[Mark] = []
    for i in sorted(chosen):
        word = words[i]
        if i - 1 in paired and i - 1 in chosen:
            marks[-1] = Mark(marks[-1].start, word.end, PAIR)
        else:
            marks.append(Mark(word.start, word.end, WORD))
    return marks


def _places(text: str, tokens: Sequence[str], form: Callable[[str], str]) -> list[tuple[int, int] | None]:
    """The position of each token in `text`; None for a token that the tokenizer changed too much to be found.

    The tokens stand in `form(text)`, which may have more or fewer characters than `text`. A place begins and ends where
    a character as readers see it does, so no mark is parted from its letter.
    """
    searched, at = form(text), _origins(text, form)
    if len(searched) != len(at):  # the form of one character depends on another
        return [None for _ in tokens]
    places: list[tuple[int, int] | None] = []
    position = missing = 0
    for token in tokens:
        # A failing search runs to the end of the text, so only the first `FAR_SEARCHES` may.
        found = searched.find(token, position, None if missing < FAR_SEARCHES else position + len(token) + NEAR)
        if found < 0:
            missing += 1
            places.append(None)
            continue
        position = found + len(token)
        places.append((at[found][0], at[position - 1][1]))
    return places


def _origins(text: str, form: Callable[[str], str]) -> list[tuple[int, int]]:
    """For each character of `form(text)`, the start and end in `text` of the character that it comes from."""
    if text.isascii() and len(form(text)) == len(text):
        return [(i, i + 1) for i in range(len(text))]
    import regex

    clusters = [found.span() for found in regex.finditer(r"\X", text)]
    return [(start, end) for start, end in clusters for _ in form(text[start:end])]
