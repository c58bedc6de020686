"""Sentences by rule, for the lead of a source and for rougeLsum, which scores sentence by sentence; words, for lengths.

A sentence ends at a line break, or at [.!?…] with what closes it (quotes, brackets) when white space follows and then
something other than a lower-case letter or more punctuation; never after a common abbreviation, an initial
("J. Smith"), or a bare number that opens the sentence ("1. Introduction"). Text whose tokens are separated already
("a word . Next") is treated alike. Nothing is trained and nothing downloaded, so the split of a text never changes;
a rule this small does miss what needs a dictionary, and scripts that write no space between sentences.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""The scripts that put no space between words, as members of a character class of the package `regex`: there each
character counts as a word."""
MAX_FOREIGN_SHARE = 0.5
"""Share of letters outside a-z above which ROUGE's own tokenizer sees too little of a text to score."""

# A run of full stops, what closes the sentence behind them, and white space: as much of each as there is. Possessive,
# so that time is linear; `_ends` looks for an earlier end where no white space follows. Quotes that also open are taken
# as closing only where they touch the full stop.
_STOPS = re.compile(r"""[.!?…](?:\s?[.!?…])*+["']*+(?:\s?(?:''|[”’»)\]]))*+\s*+""")
_ABBREVIATION = re.compile(
    r"""(?:^|[^\w.])
        (?:e\.\s?g|i\.\s?e|et\s?al|cf|vs|approx|resp|ca|viz|pp|figs?|eqs?|secs?|sects?|tabs?|refs?|chap|vol
          |dr|prof|mrs?|ms|st)
        \s?\.$""",
    re.IGNORECASE | re.VERBOSE,
)
_INITIAL = re.compile(r"(?:^|[^\w'’-])(?:[^\W\d_]\.)+$")
_LONGEST_ABBREVIATION = 12  # characters: all that the patterns above need to see


def words(text: str) -> list[str]:
    """The words of `text`: separated by white space; in scripts without it, each character with its marks."""
    parts = text.split()
    return parts if text.isascii() else [word for part in parts for word in _words().findall(part)]


@cache
def _words() -> Any:
    import regex

    return regex.compile(rf"[{WITHOUT_SPACES}]\p{{M}}*|[^{WITHOUT_SPACES}]+")


def foreign_share(texts: Iterable[str]) -> float:
    """The share of letters outside a-z in some texts; 0 if they have no letters."""
    letters = [letter for text in texts for letter in text.lower() if letter.isalpha()]
    return sum(not "a" <= letter <= "z" for letter in letters) / max(1, len(letters))


def sentences(text: str) -> list[str]:
    """The sentences of `text` in order, stripped, none empty; white space between them is all that is lost."""
    return list(_each(text))


def lead(text: str) -> str:
    """The first sentence of `text`; empty where there is none."""
    return next(_each(text), "")


def _each(text: str) -> Iterator[str]:
    for line in text.splitlines():
        start = seen = 0  # of the sentence, the part before `seen` is searched for letters
        letters = False
        for stop, end in _ends(line):
            following = line[end : end + 1]
            if not following or following.islower() or following in ",;:)]}":
                continue
            letters = letters or any(map(str.isalpha, line[seen:stop]))
            seen = stop
            if letters and not _is_open(line[max(start, stop - _LONGEST_ABBREVIATION) : stop]):
                yield line[start:stop].lstrip()
                start = seen = end
                letters = False
        if rest := line[start:].strip():
            yield rest


def _ends(line: str) -> Iterator[tuple[int, int]]:
    """Where sentences may end: the place behind the last full stop and what closes it, and behind the white space.

    Where no white space follows, the last within them is taken: "a . .b" may end behind its first full stop.
    """
    position = 0
    while found := _STOPS.search(line, position):
        text = found[0]
        end = found.end() if text[-1].isspace() else found.end() - len(text.split()[-1])
        position = found.end()
        if end > found.start():
            yield found.start() + len(line[found.start() : end].rstrip()), end
            position = end


def _is_open(tail: str) -> bool:
    """Whether the full stop at the end of `tail`, the last characters of a sentence, closes none."""
    initial = _INITIAL.search(tail) and tail[-2].isupper()
    return bool(initial or _ABBREVIATION.search(tail))
