"""The sentence splitter: its rules one by one, and what holds for every text."""

import random
import re

import pytest

from pipeline.core.text import (
    _ABBREVIATION,
    _INITIAL,
    foreign_share,
    holds_thought,
    lead,
    opens_thought,
    sentences,
    words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("a word . Next words . Last .", ["a word .", "Next words .", "Last ."]),
        ('He said "go." Then (quietly.) He left.', ['He said "go."', "Then (quietly.)", "He left."]),
        ("He said : “ go . ” Then he left .", ["He said : “ go . ”", "Then he left ."]),
        ("It cost 3.5 million. 200 people paid.", ["It cost 3.5 million.", "200 people paid."]),
        ("Really?! Yes... Or not . . . Well", ["Really?!", "Yes...", "Or not . . .", "Well"]),
        ("one line\nanother line\n\n  a third ", ["one line", "another line", "a third"]),
        ("Élan vital. École. Über uns.", ["Élan vital.", "École.", "Über uns."]),
        ("In 2018. Then 2019. Now.", ["In 2018.", "Then 2019.", "Now."]),
        (".NET is used. Yes", [".NET is used.", "Yes"]),
        ("", []),
        (" \n ", []),
        ("...", ["..."]),
    ],
)
def test_splits(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected
    assert lead(text) == "".join(expected[:1])


@pytest.mark.parametrize(
    "text",
    [
        "We use models, e.g. BERT, and others, i.e. GPT.",
        "Devlin et al. (2019) agree.",
        "Devlin et al . ( 2019 ) agree .",
        "See Fig. 3 and Eq. (4), cf. Sec. 5.",
        "Man vs. Machine by J. R. R. Tolkien and Dr. Who.",
        "The U.S. Senate voted.",
        "They went to approx. two places. and then home.",
        "We love Yahoo! , a firm.",
        "1. Introduction",
    ],
)
def test_keeps_together(text: str) -> None:
    assert sentences(text) == [text]


@pytest.mark.parametrize(
    "text", ["A b. C d.\u2028E f . G", "  x.  Y!\t(Z.)  'Q' R.\r\nS. T. Uvw. X", "No end", "? ! . A"]
)
def test_loses_nothing_but_white_space_and_splits_no_further(text: str) -> None:
    found = sentences(text)
    assert " ".join(found).split() == text.split()
    assert all(sentence == sentence.strip() != "" for sentence in found)


_END = re.compile(r"""[.!?…](?:\s?[.!?…])*["']*(?:\s?(?:''|[”’»)\]]))*\s+""")
PIECES = (
    ".", "!", "…", "?", " ", "  ", "\t", "\n", "\u2028", "\xa0", "\x1c", "\x1f", "'", "''", '"', "”", "’", "»", ")",
    "]", "a", "B", "é", "1", "e.g.", "i. e.", "et al", "Fig", "J.", "Dr", "U.S", ",", ";", "猫", "word", "Word", "-",
    "_", ":",
)  # fmt: skip


def one_by_one(text: str) -> list[str]:
    """The rule as one expression that tries every end of every run: short, and slow for long runs."""
    found = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            before, following = line[start : end.end()].rstrip(), line[end.end() : end.end() + 1]
            closes = following and not (following.islower() or following in ",;:)]}")
            initial = _INITIAL.search(before[-12:]) and before[-2].isupper()
            opened = initial or _ABBREVIATION.search(before[-12:]) or not any(map(str.isalpha, before))
            if closes and not opened:
                found.append(before.lstrip())
                start = end.end()
        found += [line[start:].strip()] if line[start:].strip() else []
    return found


def test_the_sentences_are_those_of_the_plain_expression() -> None:
    draw = random.Random(0)
    several = 0
    for _ in range(50_000):
        text = "".join(draw.choices(PIECES, k=draw.randrange(16)))
        assert sentences(text) == one_by_one(text), text
        several += len(sentences(text)) > 1
    assert several > 10_000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a b\u2003c\x1fd", ["a", "b", "c", "d"]),
        ("état-major, déjà", ["état-major,", "déjà"]),
        ("кошка поёт.", ["кошка", "поёт."]),
        ("猫在 GPU上跑。", ["猫", "在", "GPU", "上", "跑", "。"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("", []),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_the_share_of_letters_that_rouge_does_not_see() -> None:
    assert foreign_share(["Ab 12 яЯ!"]) == 0.5
    assert foreign_share(["12", ""]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think> b", "<think>\n\n</think>\n\nb", "<think> a thought that never ends", "its end</think> b",
        "<THINK>a", "<thinking>a", "<thought>a", "</thought>", "<reasoning>a", "[THINK]a[/THINK]b",
        "\u25c1think\u25b7a", "<|channel|>analysis<|message|>a", "<|channel>thought\na", "<|begin_of_thought|>a",
        "<|START_THINKING|>a",
        "<seed:think>a",
    ],
)  # fmt: skip
def test_a_thought_is_known_by_its_mark(text: str) -> None:
    assert holds_thought(text)
    assert holds_thought(f"before {text} behind")


@pytest.mark.parametrize(
    "text",
    ["", "I think", "think>", "<thin", "a < think > b", "[think]", "[thinking]", "channel analysis", "<reason>", "<b>",
     "<|channel|>final<|message|>a", "thought"],
)  # fmt: skip
def test_what_is_no_mark_is_no_thought(text: str) -> None:
    assert not holds_thought(text)
    assert not opens_thought(text)


def test_only_a_mark_at_the_end_begins_a_thought_there() -> None:
    assert [opens_thought(text) for text in ("a<think>\n", "[THINK]", "<|channel|>analysis", "\u25c1think\u25b7")] == [
        True
    ] * 4
    assert not any(map(opens_thought, ("<think>a", "<think>\n\n</think>\n", "[/THINK]", "<|end_thinking|>")))
