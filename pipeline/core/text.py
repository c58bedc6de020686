"""Sentences, words and marks of thoughts by rule, and the forms in which texts are compared.

Sentences serve the lead of a source and ROUGE-Lsum, words serve lengths and cuts.

A sentence ends at a line break. It also ends at [.!?…] and the marks that Unicode calls `Sentence_Terminal`, with any
closing quotes and brackets, if white space follows and the next character is neither a lower-case letter nor
punctuation. It never ends after a common abbreviation, an initial ("J. Smith"), or a bare number that opens the
sentence ("1. Introduction"). The same holds for text whose tokens are separated already ("a word . Next").

Marks that stand nowhere within a word, such as 。 । ؟ ።, need no white space behind them, and neither do ! and ? behind
scripts without spaces, nor a full stop between two characters of Chinese or Japanese. Thai and Lao have no marks: their
spaces part sentences, clauses and names alike, so only line breaks end a sentence there.

Nothing is trained or downloaded, so the split of a text never changes. A rule this small misses sentences that need a
dictionary.

The same text can be written in several ways (Unicode Standard Annex 15): é as one character or as two, a word with soft
hyphens or without. Whoever asks whether texts are the same compares their `canonical` forms; whoever asks whether they
read alike, as the leak guard and ROUGE do, compares their `compatible` forms. The texts themselves stay as they are.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal

WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts without spaces between words, as members of a character class of `regex`. Each character counts as a word."""
LETTERS = r"\p{L}\p{M}\p{N}"
"""What words consist of, as members of a character class of `regex`. The `\\w` of `re` lacks marks, so it cuts
words at the vowel signs of Hindi."""
SOUND_MARKS = r"\uff9e\uff9f"
"""Half-width marks of Japanese, which become combining marks under NFKC, as members of a character class."""
SENTENCES = 2
"""The version of the rules for sentences, which scores by sentence depend on. A change of the rules raises it."""
MAX_FOREIGN_SHARE = 0.5
"""Above this share of letters outside a-z, ROUGE's own tokenizer sees too little of a text to score it. BLEU's
tokenizers have the same bound for scripts that they cannot cut into words."""

# A run of full stops, then closing quotes and brackets, then white space. The quantifiers are possessive, which keeps
# time linear; if no white space follows, `_ends` looks for an earlier end. Quotes that can also open a quotation count
# as closing only if they touch the full stop.
_STOPS = re.compile(r"""([.!?](?:\s?[.!?])*+)["']*+(?:\s?(?:''|[)\]]))*+\s*+""")
# The same in any script. The white space of `re` has four controls more than that of `regex`. The comma of Burmese is
# no end although Unicode counts it, and the question mark of Greek is one although its normal form is a semicolon.
# Brackets of titles close no sentence.
_WHITE = r"[\s\x1c-\x1f]"
_MARK = r"(?:[\p{Sentence_Terminal}…\u037e--\u104a]|(?<=\p{Greek}\p{M}?\p{Greek}\p{M}?);)[\ufe0e\ufe0f]?"
_ANY_STOPS = (
    rf"""(?V1)({_MARK}(?:{_WHITE}?{_MARK})*+)["'＂＇]*+"""
    rf"""(?:{_WHITE}?(?:''|[\p{{Pe}}\p{{Pf}}--[}}》〉]]))*+{_WHITE}*+"""
)
_WITHIN_WORDS = r".…!?․．﹒։۔‼⁇⁈⁉‽⸮⸼⹓⹔;\u037e"
"""Marks that also stand within words and numbers, or in scripts where a space follows every end."""
_NEED_NO_SPACE = rf"(?V1)[\p{{Sentence_Terminal}}--[{_WITHIN_WORDS}]]"
_BEHIND = rf"[{WITHOUT_SPACES}]\p{{M}}*$"
_CALLED = r"[!?‼⁇⁈⁉‽]"
_DOT_BEHIND, _DOT_BEFORE = r"[\p{Han}\p{Hiragana}\p{Katakana}]\p{M}*$", r"[\p{Han}\p{Hiragana}\p{Katakana}「『“‘（《]"
_QUOTED = r"(?:と|って)(?!\p{M})"
"""Japanese goes on behind a quotation with the particle of what is said or thought."""
_GOES_ON = r"(?V1)[[\p{Terminal_Punctuation}\p{Pe}--\p{Sentence_Terminal}]--\p{ASCII}]"
_ABBREVIATION = re.compile(
    r"""(?:^|[^\w.])
        (?:e\.\s?g|i\.\s?e|et\s?al|cf|vs|approx|resp|ca|viz|pp|figs?|eqs?|secs?|sects?|tabs?|refs?|chap|vol
          |dr|prof|mrs?|ms|st)
        \s?\.$""",
    re.IGNORECASE | re.VERBOSE,
)
_INITIAL = re.compile(r"(?:^|[^\w'’-])(?:[^\W\d_]\.)+$")
# Initials of scripts without case, titles of Hindi, and the full stop of Thai and its neighbours, which marks
# abbreviations alone.
_OTHER_ABBREVIATION = rf"""(?V1)(?:^|[^{LETTERS}_'’-])
        (?:(?:[\p{{Lo}}--[\p{{Latin}}\p{{Han}}\p{{Hiragana}}\p{{Katakana}}\p{{Hangul}}\p{{Ethiopic}}]]\.)+
          |(?:डॉ|प्रो|पं|श्री|श्रीमती|सुश्री)\s?\.)$
        |[\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}]\p{{M}}*\s?\.$"""
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
    """The words of `text`, split at white space; in `WITHOUT_SPACES`, each character with its marks is a word.

    Characters that cannot be seen make no word, but belong to the one before them.
    """
    parts = text.split()
    if text.isascii():
        return parts
    found = _compiled(rf"[{WITHOUT_SPACES}][\p{{M}}\p{{DI}}]*|[^{WITHOUT_SPACES}]+")
    return [word for part in parts for word in found.findall(part) if not _compiled(r"\p{DI}+").fullmatch(word)]


def runs(text: str) -> list[str]:
    """The runs of letters, marks, digits and underscores in `text`."""
    return re.findall(r"\w+", text) if text.isascii() else _compiled(rf"[{LETTERS}_]+").findall(text)


@cache
def _compiled(pattern: str, verbose: bool = False) -> Any:
    import regex  # plain English does not need it, and should not pay for the import

    return regex.compile(pattern, regex.VERBOSE if verbose else 0)


def canonical(text: str) -> str:
    """The one form of all ways to write the same text: NFC, without soft hyphens and zero-width spaces and joins.

    The joiners U+200C and U+200D stay: in Persian and Indic scripts they are part of the spelling.
    """
    return text if text.isascii() else _normal("NFC", _compiled(r"[\u00ad\u200b\u2060\ufeff]+").sub("", text))


def compatible(text: str) -> str:
    """The one form of all texts that read alike: NFKC, without any character that has no shape of its own.

    Full-width letters and ligatures become plain ones. The joiners of Persian and Indic scripts go: writers and models
    often leave them out. With `casefold` before and after, this is NFKC_Casefold (Unicode Standard, section 3.13).
    """
    return text if text.isascii() else _normal("NFKC", _compiled(r"\p{DI}+").sub("", text))


def alike(text: str) -> str:
    """`compatible`, without case."""
    return text.casefold() if text.isascii() else compatible(compatible(text).casefold())


def in_form(text: str, form: Literal["NFC", "NFKC", "none"]) -> str:
    """A text in a normal form; `none` leaves it as it is."""
    if form == "none" or text.isascii() or (form == "NFC" and is_nfc(text)):
        return text
    return _normal(form, text)


def is_visible(text: str) -> bool:
    """Whether `text` has more than white space and characters without a shape of their own."""
    return bool(compatible(text).strip())


def is_nfc(text: str) -> bool:
    """Whether `text` is in the normal form NFC, as nearly all texts are."""
    return text.isascii() or unicodedata.is_normalized("NFC", _stream_safe(text))


def not_nfc(rows: Iterable[Iterable[str]]) -> int:
    """How many of the rows have a text that is not in the normal form NFC."""
    return sum(not all(map(is_nfc, texts)) for texts in rows)


def _normal(form: Literal["NFC", "NFKC"], text: str) -> str:
    return unicodedata.normalize(form, _stream_safe(text))


def _stream_safe(text: str) -> str:
    """`text` with its runs of marks cut, since putting a run of n marks in order takes n² time.

    The cuts are those of the Stream-Safe Text Format (Annex 15, section 13). No word reaches its limit of 30 marks.
    """
    marks = rf"[\p{{M}}{SOUND_MARKS}]"
    return _compiled(rf"({marks}{{30}})(?={marks})").sub("\\1\u034f", text)  # type: ignore[no-any-return]


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
    """The share of the texts' letters that lie outside a-z, in whatever normal form; 0 if there are no letters."""
    letters = [letter for text in texts for letter in canonical(text).lower() if letter.isalpha()]
    return sum(not "a" <= letter <= "z" for letter in letters) / max(1, len(letters))


def unspaced_share(texts: Iterable[str], known: str = "") -> float:
    """The share of the texts' letters in scripts without spaces between words; 0 if there are no letters.

    `known` names scripts that do not count, as members of a character class of `regex`.
    """
    counted = _compiled(rf"(?V1)[{WITHOUT_SPACES}--[{known}]]" if known else rf"[{WITHOUT_SPACES}]")
    letters = found = 0
    for text in texts:
        letters += sum(map(str.isalpha, text))
        found += 0 if text.isascii() else sum(one.isalpha() for one in counted.findall(text))
    return found / max(1, letters)


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
            if _goes_on(line[end : end + 1]):
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

    If no white space follows a run of marks that needs some, the last white space inside it counts: "a . .b" may end
    after the first full stop.
    """
    stops = _STOPS if line.isascii() else _compiled(_ANY_STOPS)
    position = 0
    while found := stops.search(line, position):
        text = found[0]
        spaced = text[-1].isspace() or (not line.isascii() and _needs_no_space(line, found))
        end = found.end() if spaced else found.end() - len(text.split()[-1])
        position = found.end()
        if end > found.start():
            yield found.start() + len(line[found.start() : end].rstrip()), end
            position = end


def _needs_no_space(line: str, found: Any) -> bool:
    """Whether a run of marks and what closes behind it can end a sentence although no white space follows."""
    marks, end = found[1], found.end()
    if found.end(1) < end and _compiled(_QUOTED).match(line, end):
        return False
    if _compiled(_NEED_NO_SPACE).search(marks):
        return True
    before = line[max(0, found.start() - _LONGEST_ABBREVIATION) : found.start()]
    if _compiled(_CALLED).search(marks):
        return _compiled(_BEHIND).search(before) is not None
    stop = (
        marks in (".", "．", "﹒") and _compiled(_DOT_BEHIND).search(before) and _compiled(_DOT_BEFORE).match(line, end)
    )
    return bool(stop)


def _goes_on(following: str) -> bool:
    """Whether a sentence cannot end before this character, the first behind the marks, or the end of the line."""
    if not following or following.islower() or following in ",;:)]}":
        return True
    return not following.isascii() and _compiled(_GOES_ON).match(following) is not None


def _is_open(tail: str) -> bool:
    """Whether the sentence goes on after the full stop at the end of `tail`, its last characters."""
    tail = canonical(tail)
    initial = _INITIAL.search(tail) and tail[-2].isupper()
    if initial or _ABBREVIATION.search(tail):
        return True
    return not tail.isascii() and bool(_compiled(_OTHER_ABBREVIATION, verbose=True).search(tail))
