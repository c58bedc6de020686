"""What is counted as beyond the source, case by case."""

import unicodedata

import pytest

from pipeline.core.contracts import Absent
from pipeline.core.records import Example
from pipeline.score.faithfulness import Sources


def row(name: str, source: str) -> Example:
    return Example(name, name, "", source, "target", source)


def beyond(source: str, text: str) -> tuple[Absent, Absent, Absent]:
    found = Sources([row("1", source)]).beyond([[text]])
    return found.numbers, found.names, found.rare_words


@pytest.mark.parametrize(
    ("source", "text", "found", "absent"),
    [
        ("It cost 1,000 in 2019.", "1000 in 2019, not 5", 3, 1),
        ("It cost 3.5.", "3.5 and 35", 2, 1),
        ("BERT2 and 5km", "2 runs of 5 km", 2, 0),  # the source may glue them
        ("a b", "BERT2 and 5km and x_1", 0, 0),
        ("a b", "1. one\n2) two\n 3.5 three", 1, 1),  # the numbers of items are none
        ("a b", "GPT-3 in 3 days", 1, 1),  # each number once
        ("२०१९ में", "2019", 1, 0),
        ("في ٢٠١٩", "٢٠١٩ و ٢٠٢٠", 2, 1),
        ("共２０１９年", "2019年和2020年", 2, 1),
        ("three", "3", 1, 1),
        ("1 2 3", "one", 0, 0),
        ("١٫٥", "1.5", 1, 0),
    ],
)
def test_numbers(source: str, text: str, found: int, absent: int) -> None:
    assert beyond(source, text)[0] == Absent(found, absent)


@pytest.mark.parametrize(
    ("source", "text", "found", "absent"),
    [
        ("We met alice in Paris.", "There Alice saw Bob. Later Paris fell.", 3, 1),
        ("a", "Bob came. Alice left.", 0, 0),  # the start of a sentence says nothing
        ("a", "He said: “We came,” and I left.", 0, 0),
        ("a", "it's O'Neill's LSTM", 2, 2),
        ("a", "в городе Москва", 1, 1),
        ("Ζει στην Αθήνα", "ζει στην Αθήνα", 1, 0),
        ("a", "猫在北京", 0, 0),  # no case, no names
        ("É", "the École and Łódź", 2, 2),
    ],
)
def test_names(source: str, text: str, found: int, absent: int) -> None:
    assert beyond(source, text)[1] == Absent(found, absent)
    assert beyond(source, unicodedata.normalize("NFD", text))[1] == Absent(found, absent)


def test_rare_words_are_those_that_few_sources_hold() -> None:
    rows = [row(str(i), f"the cat sees word{'abcdefghij'[i % 10] * (1 + i // 10)} often") for i in range(300)]
    texts = ["the Worda sees dog often", *["the cat"] * 299]
    found = Sources(rows).beyond([[text] for text in texts]).rare_words
    assert found == Absent(2, 1)  # worda stands in its source, dog in none; the others are in all sources
    elsewhere = Sources(rows).beyond([["wordb"], *[[""]] * 299]).rare_words
    assert elsewhere == Absent(1, 1)  # another source's word


def test_rows_that_share_a_source_count_it_once() -> None:
    rows = [row("1", "alpha beta"), row("2", "alpha beta"), row("3", "gamma")]
    assert Sources(rows).beyond([["alpha"], ["gamma"], ["gamma"]]).rare_words == Absent(3, 1)


def test_the_history_of_a_conversation_belongs_to_its_source() -> None:
    one = Example("1", "1", "", "and now?", "t", "l", ["t"], [{"role": "user", "content": "Ask Alice about 42."}])
    found = Sources([one]).beyond([["so Alice has 42"]])
    assert (found.numbers, found.names) == (Absent(1, 0), Absent(1, 0))


def test_nothing_found_has_no_share() -> None:
    numbers, names, _ = beyond("a", "")
    assert (numbers.share, names.share) == (None, None)
    assert Absent(4, 1).share == 0.25
