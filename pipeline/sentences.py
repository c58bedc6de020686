"""Sentences by rule: for the lead of a source, and for rougeLsum, which scores sentence by sentence.

A sentence ends at a line break, or at [.!?…] with what closes it (quotes, brackets) when white space follows and then
something other than a lower-case letter or more punctuation; never after a common abbreviation, an initial
("J. Smith"), or a bare number that opens the sentence ("1. Introduction"). Text whose tokens are separated already
("a word . Next") is treated alike. Nothing is trained and nothing downloaded, so the split of a text never changes;
a rule this small does miss what needs a dictionary, and scripts that write no space between sentences.
"""

import re
from collections.abc import Iterator

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
