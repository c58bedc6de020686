"""What the probes of forgetting read: documents and conversations, each once, and what is left out is counted."""

import html
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import probes
from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.sources.account import Account
from tests import ROOT
from tests.made.parameters import probe_of

# Texts


def texts(folder: Path, files: str | list[str], **change: Any) -> list[str]:
    return [text.content for text in probes.texts(probe_of(folder, files, **change))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("One text.\nOf two lines.\n")
    (tmp_path / "own" / "b.txt").write_text("Another.")
    (tmp_path / "own" / "again.txt").write_text("Another.")
    (tmp_path / "own" / "empty.txt").write_text(" \n")
    rows = [{"body": {"text": "<p>Caf&eacute; &amp; bar<br>open</p>"}}, {"body": {"text": ""}}, {"body": {}}]
    (tmp_path / "own" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own" / "whole.json").write_text(json.dumps({"body": {"text": "Whole."}}, indent=2))
    return tmp_path / "own"


def test_plain_text_is_a_document_a_file_once_and_in_an_order_of_its_own(folder: Path) -> None:
    found = texts(folder, "*.txt")
    assert sorted(found) == ["Another.", "One text.\nOf two lines.\n"]
    (folder / "a.txt").rename(folder / "z.txt")
    assert texts(folder, "*.txt") == found


def test_a_column_is_a_document_a_record_and_html_is_read_as_text(folder: Path) -> None:
    files = ["rows.jsonl", "whole.json"]
    assert sorted(texts(folder, files, column="body.text")) == ["<p>Caf&eacute; &amp; bar<br>open</p>", "Whole."]
    assert sorted(texts(folder, files, column="body.text", html=True)) == ["Caf\u00e9 & bar\nopen", "Whole."]


def test_what_gives_no_text_of_its_own_is_counted(folder: Path) -> None:
    def left_out(files: str | list[str], **change: Any) -> dict[str, int]:
        account = Account()
        probes.texts(probe_of(folder, files, **change), account)
        return dict(+account.left_out)

    assert left_out("*.txt") == {"empty texts": 1, "repeated texts": 1}
    assert left_out("*.jsonl", column="body.text") == {"empty texts": 1, "records without a text": 1}
    assert left_out("a.txt") == {}
    (folder / "de.po").write_text('#, fuzzy\nmsgid "a"\nmsgstr "b"\n\nmsgid "c"\nmsgstr "d"\n')
    assert left_out("de.po", column="msgid") == {"fuzzy entries": 1}


@pytest.mark.parametrize(
    ("files", "column", "told"),
    [
        ("*.txt", "body", r"forget.probes.own.column = 'body', but a.txt is plain text: set it to null"),
        ("*.jsonl", None, r"forget.probes.own.column is null, but rows.jsonl holds records: name the column"),
        ("*.jsonl", "text", r"forget.probes.own.column = 'text': rows.jsonl has no such column; it has body.text"),
        ("*.jsonl", "body", r"forget.probes.own.column = 'body': at rows.jsonl:1 it is dict, not text"),
        ("*.csv", None, r"forget.probes.own.files = '\*.csv': forget.probes.own.source has no such file"),
        ("../*.txt", None, r"forget.probes.own.files = '../\*.txt': must lie in forget.probes.own.source"),
    ],
)
def test_what_does_not_fit_is_told(folder: Path, files: str, column: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        texts(folder, files, column=column)


def test_another_encoding_is_told_by_the_key_that_sets_it(folder: Path) -> None:
    (folder / "a.txt").write_bytes("caf\u00e9".encode("cp1252"))
    with pytest.raises(UserError, match=r"a.txt:1 is not UTF-8 .*: set forget.probes.own.encoding to the encoding"):
        texts(folder, "a.txt")
    assert texts(folder, "a.txt", encoding="cp1252") == ["caf\u00e9"]


TAGS = (
    "<", "<p", "</p", "<BR", "<br/", "p", "a", "<a", " href='x'", ">", "/", ">", " ", "  ", "\t", "\n", "\xa0",
    "\u2028", "\x0c", "\x1c", "&", "&lt;", "&lt", "&gt;", "&#", "&#x", "0", "00000", "1", "65", "6", "123456789",
    "&#65;", ";", "&#0000000000065;", "&#99999999;", "&#1114112;", "&#0;", "&#x41;", "x", "&nbsp;", "&amp;lt;", "é",
)  # fmt: skip


def test_the_text_of_html_is_that_of_the_plain_expressions() -> None:
    def plain(text: str) -> str:
        text = re.sub(r"(?i)<(br|/?p)\b[^>]*>", "\n", text)
        text = html.unescape(re.sub(r"</?[A-Za-z][^>]*>", "", text))
        return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\xa0]+", " ", text)).strip()

    draw = random.Random(0)
    for _ in range(50_000):
        text = "".join(draw.choices(TAGS, k=draw.randrange(16)))
        assert probes.without_tags(text) == plain(text), text


def test_a_character_of_thousands_of_digits_is_none() -> None:
    assert probes.without_tags("a&#" + "9" * 10_000 + ";b") == "a\ufffdb"
    assert probes.without_tags("a&#" + "0" * 10_000 + "65;b") == "aAb"


def test_code_is_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    assert texts(tmp_path, "*.py") == ["x = 1\n"]


# Conversations


def talks(
    folder: Path, content: Any, name: str = "talks.json", **change: Any
) -> tuple[list[list[str]], dict[str, int]]:
    """Who says what in the conversations that are read, and what was left out."""
    (folder / "own").mkdir(exist_ok=True)
    (folder / "own" / name).write_text(content if isinstance(content, str) else json.dumps(content))
    account = Account()
    given = probe_of(folder / "own", name, style="chat", **({"column": "talks"} | change))
    found = [
        [
            *(f"{one['role']}: {one['content']}" for one in talk.history),
            f"user: {talk.source}",
            f"assistant: {talk.target}",
        ]
        for talk in probes.conversations(given, account)
    ]
    return sorted(found), {why: count for why, count in account.left_out.items() if count}


HELLO = ["user: Hello", "assistant: Hi"]


def test_texts_are_by_user_and_assistant_in_turn_and_a_list_of_conversations_is_taken_apart(tmp_path: Path) -> None:
    several = [["Hello", "Hi"], ["How?", "So.", "And then?", "Then so."], ["Hello", "Hi"], ["Who?"], ["", "Nobody"]]
    longer = ["user: How?", "assistant: So.", "user: And then?", "assistant: Then so."]
    left_out = {
        "repeated conversations": 1,
        "conversations that end in a question": 1,
        "conversations with an empty message": 1,
    }
    assert talks(tmp_path, [{"talks": several}]) == ([HELLO, longer], left_out)
    yaml = "categories: [own]\ntalks:\n- - Hello\n  - Hi\n- - When?\n  - '1963'\n"
    assert talks(tmp_path, yaml, "talks.yml")[0] == [HELLO, ["user: When?", "assistant: 1963"]]
    assert talks(tmp_path, [{"talks": ["Hello", "Hi"]}, {"talks": None}, {"talks": []}]) == (
        [HELLO],
        {"records without a conversation": 2},
    )


def test_messages_are_read_as_a_format_of_chats_is(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    other.append({"role": "assistant", "content": "Me."})
    rows = [{"talks": said, "id": "a"}, {"talks": other}, {"talks": said, "tools": '[{"name": "f"}]'}]
    found, left_out = talks(tmp_path, rows)
    assert found == [["system: Be brief.", "user: Who?", "assistant: Me."], HELLO]
    assert left_out == {"conversation with tools": 1}
    assert talks(tmp_path, [{"conversations": said}], column="conversations")[0] == [HELLO]


def test_the_place_of_a_conversation_is_its_name(tmp_path: Path) -> None:
    talks(tmp_path, [{"talks": [["Hello", "Hi"], ["Who?", "Me."]]}])
    given = probe_of(tmp_path / "own", "talks.json", style="chat", column="talks")
    places = sorted(one.id for one in probes.conversations(given))
    assert places == ["talks.json, item 1, conversation 1", "talks.json, item 1, conversation 2"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"talk": []}], r"forget.probes.own.column = 'talks': talks.json has no such column; it has talk"),
        ([{"talks": "a"}], r"forget.probes.own.column = 'talks': at talks.json, item 1 it is str, not a list of mess"),
        ([{"talks": [["a", 1]]}], r"talks.json, item 1, conversation 1: messages, item 2: content = 1: must be a str"),
        ([{"talks": [{"role": "user", "content": "a"}]}], r"talks.json, item 1: must end in a message of the user and"),
        ([{"talks": [{"role": "bot", "content": "a"}]}], r"item 1: messages, item 1: role = 'bot': must be"),
    ],
)
def test_what_makes_no_conversation_is_told(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        talks(tmp_path, content)


def test_plain_text_holds_no_conversations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"forget.probes.own.style = 'chat', but a.txt is plain text: name a table"):
        talks(tmp_path, "Hello", "a.txt")


def test_the_default_names_probes_of_each_style() -> None:
    default = params.load(ROOT / "params.yaml").forget
    assert [(one.name, one.style) for one in default.probes] == [
        ("encyclopedia", "plain"), ("dialogue", "chat"), ("code", "plain")
    ]  # fmt: skip
