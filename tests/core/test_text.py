"""The sentence splitter: its rules one by one, and what holds for every text."""

import random
import re
import unicodedata
from typing import Literal

import pytest

from pipeline.core import text as texts
from pipeline.core.text import (
    _ABBREVIATION,
    _INITIAL,
    alike,
    canonical,
    compatible,
    foreign_share,
    holds_thought,
    is_nfc,
    is_visible,
    lead,
    opens_thought,
    runs,
    sentences,
    words,
)
from tests.limits import soon


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
    "]", "a", "B", "é", "1", "e.g.", "i. e.", "et al", "Fig", "J.", "Dr", "U.S", ",", ";", "ß", "word", "Word", "-",
    "_", ":", "“", "‘", "–", "}", "(", "«", "½", "€",
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


OTHER_SCRIPTS = {
    "Chinese": ["你好。", "我很好！", "你呢？！", "他说：“走吧。”", "（真的！）", "《你是谁？》是一本书。", "涨3.5%。"],
    "Chinese, marks of English": ["你好!", "我很好.", "使用Node.js开发?", "是的"],
    "Japanese": ["「行こう！」と彼は言った。", "「はい。」", "彼は答えた。", "１．はじめに｡", "がくせい!", "か"],
    "Urdu, no space": ["کیا؟", "ہاں۔"],
    "Amharic": ["ሰላም።", "እንዴት ነህ።", "ደህና"],
    "Khmer": ["ខ្ញុំទៅ។", "គាត់មក។"],
}  # fmt: skip
SPACED = {
    "Hindi": ["यह किताब है।", "डॉ. राम आए।", "क्या है?", "हाँ॥", "अंत"],
    "Arabic": ["هل أنت بخير؟", "نعم.", "قال د. أحمد ذلك!", "ثم ذهب"],
    "Urdu": ["یہ کتاب ہے۔", "پی۔ایچ۔ڈی ہے۔", "کیا؟"],
    "Greek": ["Τι κάνεις;", "Είμαι καλά.", "Ναι"],
    "Armenian": ["Բարեւ։", "Ինչպես ես։"],
    "Burmese": ["သူ၊ သွားသည်။", "ပြန်လာသည်။"],
    "Russian": ["Он пришёл.", "А. С. Пушкин писал!", "Да…", "Нет"],
}


@pytest.mark.parametrize("name", OTHER_SCRIPTS | SPACED)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_sentences_of_other_scripts(name: str, form: Literal["NFC", "NFD"]) -> None:
    expected = [unicodedata.normalize(form, one) for one in (OTHER_SCRIPTS | SPACED)[name]]
    for between in ("", " ", "\n") if name in OTHER_SCRIPTS else (" ", "\n", "  "):
        text = between.join(expected)
        assert sentences(text) == expected
        assert lead(text) == expected[0]


def test_a_text_without_marks_of_sentences_is_its_own_lead() -> None:
    assert lead("แมวกำลังนอน หมากำลังวิ่ง") == "แมวกำลังนอน หมากำลังวิ่ง"
    assert lead("แมวกำลังนอน\nหมากำลังวิ่ง") == "แมวกำลังนอน"


@pytest.mark.parametrize("mark", "。｡！？।॥؟۔።։။។՞")
def test_a_mark_ends_a_sentence_only_behind_its_letters(mark: str) -> None:
    """Neither at the end of the text nor behind a mere number."""
    assert sentences(f"1{mark}") == [f"1{mark}"]
    assert sentences(mark) == [mark]
    assert sentences(f"猫{mark}") == [f"猫{mark}"]


@pytest.mark.parametrize(
    "text",
    [
        "他说“你好！”，然后走了",  # a comma behind the quotation
        "「行こう！」って彼は言った",
        "《你是谁？》很好看",  # the mark is the title's
        "我不知道……也许吧",
        "第3.章",
        "百度.com很好",
        "วันนี้ พ.ศ. 2560 อากาศดี ดร. สมชาย มา",  # spaces part sentences, clauses and names alike
        "پی۔ایچ۔ڈی",
        "सन् 3.5 है",
        "α; The",
    ],
)
def test_keeps_together_in_other_scripts(text: str) -> None:
    assert sentences(text) == [text]


OTHER_PIECES = (
    *"。！？｡।॥؟۔።…!?.;",
    *"」』”’)》】«“「",
    *"猫かกकعअλ1aB、，",
    "\u3099",
    "\u0301",
    "と",
    " ",
    "\u3000",
    "\u200b",
    "\ufe0f",
)


def test_whatever_stands_in_a_text_nothing_is_lost() -> None:
    draw = random.Random(0)
    several = 0
    for _ in range(20_000):
        text = "".join(draw.choices(OTHER_PIECES, k=draw.randrange(20)))
        found = sentences(text)
        assert "".join("".join(found).split()) == "".join(text.split())
        assert all(one == one.strip() != "" for one in found)
        assert [sentences(one) for one in found] == [[one] for one in found], text
        several += len(found) > 1
    assert several > 5_000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a b\u2003c\x1fd", ["a", "b", "c", "d"]),
        ("état-major, déjà", ["état-major,", "déjà"]),
        ("кошка поёт.", ["кошка", "поёт."]),
        ("猫在 GPU上跑。", ["猫", "在", "GPU", "上", "跑", "。"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ที่\u200bนี่", ["ที่\u200b", "นี่"]),  # a place for a line to break is no word
        ("\u200bก a \u2060 b\xad", ["ก", "a", "b\xad"]),
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


# Forms in which texts are compared

WRITTEN = (
    "Le café crème, naïf.", "हिन्दी की किताब", "தமிழ் மொழி", "বাংলা কোন", "العَرَبِيَّةُ", "ภาษาที่นี่", "한국어 문장",
    "Tiếng Việt ở", "がぎぐ", "É. Zola est né. Il écrit.", "İstanbul", "ΛΌΓΟΣ ᾴ", "Å",
)  # fmt: skip


@pytest.mark.parametrize("text", WRITTEN)
def test_all_normal_forms_of_a_text_are_the_same_text(text: str) -> None:
    composed, apart = unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)
    for form in (canonical, compatible, alike):
        assert form(apart) == form(composed) == form(form(text))
    assert canonical(apart) == composed
    assert len(words(apart)) == len(words(composed))
    assert foreign_share([apart]) == foreign_share([composed])
    assert runs(alike(apart)) == runs(alike(composed))
    assert [canonical(one) for one in sentences(apart)] == sentences(composed)
    assert is_nfc(composed)
    assert is_nfc(apart) == (apart == composed)


@pytest.mark.parametrize(
    ("one", "other", "same", "reads_alike"),
    [
        ("Wör\xadter", "Wörter", True, True),
        ("data\u200bbase\ufeff", "data\u2060base", True, True),
        ("می\u200cخواهم", "میخواهم", False, True),  # part of the spelling, and often left out
        ("क्\u200dष", "क्ष", False, True),
        ("Ｆｕｌｌ１", "full1", False, True),
        ("oﬃce", "Office", False, True),
        ("Straße", "STRASSE", False, True),
        ("کتاب", "كتاب", False, False),
        ("की", "कि", False, False),  # vowels differ
        ("résumé", "resume", False, False),
        ("a b", "ab", False, False),
    ],
)
def test_what_is_the_same_and_what_reads_alike(one: str, other: str, same: bool, reads_alike: bool) -> None:
    assert (canonical(one) == canonical(other)) is same
    assert (alike(one) == alike(other)) is reads_alike


def test_plain_english_is_its_own_form() -> None:
    text = "A plain  text.\n\tIt's 100 % ASCII, e.g. x_1."
    assert canonical(text) == compatible(text) == text
    assert alike(text) == text.lower()
    assert runs(text) == re.findall(r"\w+", text)


def test_marks_belong_to_the_words_of_their_letters() -> None:
    for text in WRITTEN:
        assert "".join(runs(text)) == "".join(character for character in text if character not in " ,."), text


@pytest.mark.parametrize("text", ["", " \n", "\u200b", " \xad\u200d ", "\u3164", "\ufeff\u2028"])
def test_what_cannot_be_seen(text: str) -> None:
    assert not is_visible(text)
    assert not words(text)
    assert is_visible(f"{text}a")


def test_marks_out_of_order_take_no_square_of_time() -> None:
    """The standard order of a run of marks is a sort, which the interpreter does by insertion."""
    with soon():
        for unit in (
            "。\u3000",
            "。」",
            "!",
            "猫!",
            ";",
            "λ;",
            "\u0301\u0327",
            "a\u0301\u0327",
            "\u0327",
            "\xad",
            "\u200b",
            "\uff9e\u0334",
        ):
            text = unit * (1_000_000 // len(unit))
            for read in (canonical, compatible, alike, is_nfc, is_visible, words, runs, texts.lead):
                read(text)
