"""What texts say that their sources do not: numbers, names and rare words, counted without a model.

A number, a name or a word that stands nowhere in the source is not always wrong: a writer rounds, inflects and knows
things. So the figures of the references stand beside, as a yardstick. What is wrong and stands in the source is not
seen. Maynez et al. (2020) call such content extrinsic.

- Numbers: digits of any script with their decimal and grouping marks, unless letters touch them ("BERT2", "5km") or
  they number the items of a list. "1,000" and "1000" are the same; "three" is no number, and "50" is not "half".
- Names: words with a capital first letter and at least two letters, not at the start of a sentence or of a quotation.
  Only scripts with case have them, and in German they are all nouns. Case does not count in the comparison.
- Rare words: words that at most 1 % of the different sources of the test split hold (at least one source), as they are
  inflected. In scripts without spaces each character is one.

The history of a conversation belongs to its source. Texts are compared in their `compatible` form.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from pipeline.core.contracts import Absent, NotInSource
from pipeline.core.records import Example
from pipeline.core.text import LETTERS, WITHOUT_SPACES, alike, compatible, sentences

RARE = 0.01
"""A word is rare if at most this share of the test split's different sources hold it."""


class Sources:
    """The sources of the test split, each read once."""

    def __init__(self, test: Sequence[Example]) -> None:
        texts = ["\n".join([*(str(one["content"]) for one in row.history), row.source]) for row in test]
        self._read = {text: (_numbers(text, touched=True), frozenset(_words(text))) for text in texts}
        self._rows = [self._read[text] for text in texts]
        self._counts = Counter(word for _, known in self._read.values() for word in known)
        self._most = max(1, int(RARE * len(self._read)))

    def beyond(self, texts: Sequence[Sequence[str]]) -> NotInSource:
        """What the texts, some for each row of the split in its order, say beyond their sources."""
        found = {"numbers": [0, 0], "names": [0, 0], "rare_words": [0, 0]}
        pairs = ((text, row) for some, row in zip(texts, self._rows, strict=True) for text in some)
        for text, (numbers, known) in pairs:
            rare = {word for word in _words(text) if self._counts[word] <= self._most}
            for key, some, there in (
                ("numbers", _numbers(text), numbers),
                ("names", _names(text), known),
                ("rare_words", rare, known),
            ):
                found[key][0] += len(some)
                found[key][1] += len(some - there)
        return NotInSource(**{key: Absent(*counts) for key, counts in found.items()})


def _numbers(text: str, touched: bool = False) -> frozenset[str]:
    """The different numbers of a text in ASCII digits; with `touched`, those that letters touch or number items too."""
    pattern, text = _patterns()["touched" if touched else "number"], compatible(text)
    if not touched:
        text = _patterns()["item"].sub("", text)
    return frozenset(
        "".join(str(unicodedata.digit(one)) if one.isdigit() else one for one in found if one not in ",٬'’").replace(
            "٫", "."
        )
        for found in pattern.findall(text)
    )


def _words(text: str) -> set[str]:
    """The different words of letters in a text."""
    return set(_patterns()["word"].findall(alike(text)))


def _names(text: str) -> set[str]:
    """The different capitalised words of a text that begin neither a sentence nor a quotation, without case."""
    return {
        name
        for sentence in sentences(compatible(text))
        for found in _patterns()["name"].findall(sentence)
        for name in _words(found)
    }


@cache
def _patterns() -> dict[str, Any]:
    import regex  # nothing else of the package's start should pay for it

    letter = rf"[\p{{L}}--[{WITHOUT_SPACES}]]"
    number = r"\p{Nd}+(?:[.,٫٬'’]\p{Nd}+)*"
    return {
        "touched": regex.compile(number),
        "item": regex.compile(r"(?m)^\s*\p{Nd}+[.)](?!\p{Nd})"),
        "number": regex.compile(rf"(?V1)(?<![{letter}\p{{M}}_\p{{Nd}}]|\p{{Nd}}[.,٫٬]){number}(?![{letter}\p{{Nd}}_])"),
        "word": regex.compile(rf"(?V1)[{WITHOUT_SPACES}]\p{{M}}*|(?:[[{LETTERS}]--[{WITHOUT_SPACES}\p{{N}}]])+"),
        "name": regex.compile(
            rf"(?<=[{LETTERS}]\P{{L}}*)(?<![{LETTERS}])(?<![\"“„‘«»:]\s*)[\p{{Lu}}\p{{Lt}}][{LETTERS}]+"
        ),
    }
