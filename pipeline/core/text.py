"""Sentences, words and marks of thoughts by rule. Sentences serve the lead of a source and ROUGE-Lsum, words serve
lengths and cuts.

A sentence ends at a line break. It also ends at [.!?…], with any closing quotes and brackets, if white space follows
and the next character is neither a lower-case letter nor punctuation. It never ends after a common abbreviation, an
initial ("J. Smith"), or a bare number that opens the sentence ("1. Introduction"). The same holds for text whose tokens
are separated already ("a word . Next"). Nothing is trained or downloaded, so the split of a text never changes. A rule
this small misses sentences that need a dictionary, and scripts without a space between sentences.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts without spaces between words, as members of a character class of `regex`. Each character counts as a word."""
MAX_FOREIGN_SHARE = 0.5
"""Above this share of letters outside a-z, ROUGE's own tokenizer sees too little of a text to score it."""

# A run of full stops, then closing quotes and brackets, then white space. The quantifiers are possessive, which keeps
# time linear; if no white space follows, `_ends` looks for an earlier end. Quotes that can also open a quotation count
# as closing only if they touch the full stop.
_STOPS = re.compile(r"""[.!?…](?:\s?[.!?…])*+["']*+(?:\s?(?:''|[”’»)\]]))*+\s*+""")
_ABBREVIATION = re.compile(
    r"""(?:^|[^\w.])
        (?:e\.\s?g|i\.\s?e|et\s?al|cf|vs|approx|resp|ca|viz|pp|figs?|eqs?|secs?|sects?|tabs?|refs?|chap|vol
          |dr|prof|mrs?|ms|st)
        \s?\.$""",
    re.IGNORECASE | re.VERBOSE,
)
_INITIAL = re.compile(r"(?:^|[^\w'’-])(?:[^\W\d_]\.)+$")
# Qwen, SmolLM, DeepSeek and others write tags, Mistral [THINK], Kimi triangles, gpt-oss and Gemma channels.
_THOUGHT = re.compile(
    r"""(?i:<\|?/?(?:seed:)?(?:begin_of_|end_of_|start_|end_)?(?:think(?:ing)?|thoughts?|reasoning|reflection)\|?>)
        |\[/?THINK\]
        |◁/?think▷
        |(?i:<\|?channel\|?>\s*(?:analysis|thought))""",
    re.VERBOSE,
)
_LONGEST_ABBREVIATION = 12  # characters: all that the patterns above need to see


def words(text: str) -> list[str]:
    """The words of `text`, split at white space; in `WITHOUT_SPACES`, each character with its marks is a word."""
    parts = text.split()
    return parts if text.isascii() else [word for part in parts for word in _words().findall(part)]


@cache
def _words() -> Any:
    import regex

    return regex.compile(rf"[{WITHOUT_SPACES}]\p{{M}}*|[^{WITHOUT_SPACES}]+")


def holds_thought(text: str) -> bool:
    """Whether a text holds the mark that begins or ends what a model thinks before it answers, such as `<think>`."""
    return _THOUGHT.search(text) is not None


def opens_thought(text: str) -> bool:
    """Whether a text ends in a mark that begins a thought."""
    marks = list(_THOUGHT.finditer(text))
    if not marks or text[marks[-1].end() :].strip():
        return False
    return "/" not in marks[-1][0] and "end" not in marks[-1][0].lower()


def foreign_share(texts: Iterable[str]) -> float:
    """The share of the texts' letters that lie outside a-z; 0 if there are no letters."""
    letters = [letter for text in texts for letter in text.lower() if letter.isalpha()]
    return sum(not "a" <= letter <= "z" for letter in letters) / max(1, len(letters))


def sentences(text: str) -> list[str]:
    """The sentences of `text` in order, stripped, none empty. Only white space between them is lost."""
    return list(_each(text))


def lead(text: str) -> str:
    """The first sentence of `text`, or an empty string."""
    return next(_each(text), "")


def _each(text: str) -> Iterator[str]:
    for line in text.splitlines():
        start = seen = 0  # the part of the sentence before `seen` has been searched for letters
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
    """Where sentences may end: the places before and after the white space behind the closing marks.

    If no white space follows a run of marks, the last white space inside it counts: "a . .b" may end after the first
    full stop.
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
    """Whether the sentence goes on after the full stop at the end of `tail`, its last characters."""
    initial = _INITIAL.search(tail) and tail[-2].isupper()
    return bool(initial or _ABBREVIATION.search(tail))
