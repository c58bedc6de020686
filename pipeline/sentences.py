"""Sentences by rule: for the lead of a source, and for rougeLsum, which scores sentence by sentence. And words: for
lengths, and where a text is cut to a length.

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

# Quotes that also open are taken as closing only where they touch the full stop.
_END = re.compile(r"""[.!?…](?:\s?[.!?…])*["']*(?:\s?(?:''|[”’»)\]]))*\s+""")
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
    """What white space separates; in scripts without it each character by itself, with its marks."""
    parts = text.split()
    return parts if text.isascii() else [word for part in parts for word in _words().findall(part)]


@cache
def _words() -> Any:
    import regex

    return regex.compile(rf"[{WITHOUT_SPACES}]\p{{M}}*|[^{WITHOUT_SPACES}]+")


def foreign_share(texts: Iterable[str]) -> float:
    """Which share of the letters of some texts lies outside a-z; 0 where there are no letters."""
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
        start = 0
        for end in _END.finditer(line):
            before, following = line[start : end.end()].rstrip(), line[end.end() : end.end() + 1]
            if following and not (following.islower() or following in ",;:)]}") and not _is_open(before):
                yield before.lstrip()
                start = end.end()
        if rest := line[start:].strip():
            yield rest


def _is_open(before: str) -> bool:
    """Whether the full stop at the end of `before` closes no sentence."""
    tail = before[-_LONGEST_ABBREVIATION:]
    initial = _INITIAL.search(tail) and tail[-2].isupper()
    return bool(initial or _ABBREVIATION.search(tail)) or not any(map(str.isalpha, before))
