"""Conversations: every field that changes what one means is used, drops it with a count, or is refused by its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.prepare import chats
from pipeline.sources.account import Account
from pipeline.sources.tables import File
from tests.made.files import read

Chat = dict[str, Any]
ANSWER = {"role": "assistant", "content": "answer"}
BRIEF = {"role": "system", "content": "Be brief."}


def chat(*before: Chat, answer: Chat | None = None, **beside: Any) -> Chat:
    """A record of earlier messages, a question and its answer, with fields beside them."""
    turns = [*before, {"role": "user", "content": "question"}, ANSWER | (answer or {})]
    return {"messages": turns, **beside}


def sharegpt(*texts: str, **beside: Any) -> Chat:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"conversations": turns, **beside}


def rows(*records: Chat, account: Account | None = None) -> list[Example]:
    found = [(f"a.jsonl:{number}", record | {"__file__": "a.jsonl"}) for number, record in enumerate(records, start=1)]
    return chats.conversations(found, "train", 0, Account() if account is None else account)


def in_both_forms(**beside: Any) -> Iterator[Chat]:
    yield chat(**beside)
    yield sharegpt("question", "answer", **beside)


# The system message beside the messages


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_messages_is_the_first_message(name: str) -> None:
    for record in in_both_forms(**{name: " Be brief.\n"}):
        account = Account()
        [row] = rows(record, account=account)
        assert (row.history, row.source, row.target) == ([BRIEF], "question", "answer")
        assert account.changed == {"white space around texts": 1}
        assert not account.unused
    [row] = rows(sharegpt("one", "two", "three", "four", **{name: "Be brief."}))
    assert [turn["role"] for turn in row.history] == ["system", "user", "assistant"]


def test_a_system_prompt_that_is_there_already_stays_one_message() -> None:
    assert rows(chat(BRIEF, system="Be brief.", system_prompt="Be brief."))[0].history == [BRIEF]
    assert rows(chat(BRIEF | {"content": ""}, system="Be brief."))[0].history == [BRIEF]
    for nothing in (None, "", " "):
        assert rows(chat(BRIEF, system=nothing))[0].history == [BRIEF]
        assert rows(chat(system=nothing))[0].history == []


@pytest.mark.parametrize(
    "record",
    [chat(BRIEF, system="Answer in French."), chat(system="Be brief.", system_prompt="Answer in French.")],
)
def test_two_system_prompts_are_refused(record: Chat) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: has several system messages: .*Answer in French.*: leave one"):
        rows(record)


def test_a_system_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:1: system = \['a'\]: must be a string, not list"):
        rows(chat(system=["a"]))


# What is dropped and counted


def dropped(record: Chat) -> dict[str, list[str]]:
    account = Account()
    assert [row.id for row in rows(record, chat(), account=account)] == ["train-2"]
    return account.dropped


@pytest.mark.parametrize("name", chats.BESIDE)
def test_a_conversation_with_more_than_messages_is_dropped_and_counted(name: str) -> None:
    for value in ("x", ["x"], [{"a": "x"}], {"a": 0}):
        for record in in_both_forms(**{name: value}):
            assert dropped(record) == {f"conversation with {name}": ["train-1"]}


@pytest.mark.parametrize("name", chats.WITHIN)
def test_a_message_with_more_than_text_drops_its_conversation(name: str) -> None:
    why = {f"message with {name}": ["train-1"]}
    assert dropped(chat(answer={name: "x"})) == why
    assert dropped(chat({"role": "user", "content": "u"}, {"role": "assistant", "content": None, name: ["x"]})) == why
    # Also where what follows could not be read: a tool's message, say.
    assert dropped({"messages": [{"role": "assistant", name: {"a": "x"}}, {"role": "tool", "content": "t"}]}) == why


@pytest.mark.parametrize("nothing", [None, "", " ", "[]", "{}", "null", [], {}, [None], {"a": None}, [{}], False])
def test_a_field_that_holds_nothing_changes_nothing(nothing: Any) -> None:
    account = Account()
    beside, within = dict.fromkeys((*chats.BESIDE, "more"), nothing), dict.fromkeys((*chats.WITHIN, "more"), nothing)
    assert len(rows(chat(answer=within, **beside), account=account)) == 1
    assert account == Account()


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_a_last_answer_that_is_not_to_be_learnt_is_dropped_and_counted(mark: Chat) -> None:
    assert dropped(chat(answer=mark)) == {"answer with weight 0": ["train-1"]}
    record = sharegpt("question", "answer")
    record["conversations"][-1] |= mark
    assert dropped(record) == {"answer with weight 0": ["train-1"]}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0, "loss": False}])
def test_an_earlier_answer_that_is_not_to_be_learnt_keeps_its_mark_and_other_messages_have_none(mark: Chat) -> None:
    user = {"role": "user", "content": "u"}
    account = Account()
    earlier: list[Chat] = [user | mark, ANSWER | mark, user, ANSWER | {"weight": 1}]
    [row] = rows(chat(*earlier, answer={"weight": 1, "train": True}), account=account)
    assert row.history == [user, ANSWER | {"weight": "0"}, user, ANSWER]
    assert account == Account()


@pytest.mark.parametrize("weight", [0.5, 2, -1, "0", True, [0], float("nan")])
def test_another_weight_is_refused(weight: Any) -> None:
    for record in (chat(answer={"weight": weight}), chat(ANSWER | {"weight": weight})):
        with pytest.raises(UserError, match=r"a\.jsonl:1: messages, item \d: weight = .*: must be 0 or 1"):
            rows(record)


@pytest.mark.parametrize("name", chats.NOT_WANTED)
def test_an_answer_marked_as_a_bad_example_is_dropped(name: str) -> None:
    marked: Chat = {name: False}
    assert dropped(chat(**marked)) == {f"answer with {name} false": ["train-1"]}
    assert len(rows(chat() | {name: True})) == 1


# Content in parts


def test_one_part_of_text_is_the_text() -> None:
    for part in ({"type": "text", "text": "answer"}, {"type": "text", "text": "answer", "image": None}):
        assert rows(chat(answer={"content": [part]}))[0].target == "answer"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], r": content: has 2 parts: join them"),
        ([{"type": "text", "text": 1}], r": content, item 1: text = 1: must be a string"),
        (["a"], r": content = \['a'\]: must be a string, not list"),
        ([], r": content = \[\]: must be a string, not list"),
        ({"text": "a"}, r": content = .*: must be a string, not dict"),
        (1, r": content = 1: must be a string, not int"),
    ],
)
def test_content_of_another_shape_is_refused(content: Any, told: str) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl:1: messages, item 2{told}"):
        rows(chat(answer={"content": content}))


def test_parts_other_than_text_drop_the_conversation() -> None:
    image = {"type": "image_url", "image_url": {"url": "a"}}
    for parts in ([image], [{"type": "text", "text": "a"}, image], [{"type": "image"}]):
        assert dropped(chat({"role": "user", "content": parts})) == {"message with parts other than text": ["train-1"]}


# Messages that could be read in two ways, and fields that are not used


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (chat(conversations=[{"from": "human", "value": "x"}]), "has both messages and conversations: leave one"),
        (chat(answer={"value": "other"}), "messages, item 2: has role and value: write role and content"),
        (chat(answer={"from": "gpt"}), "messages, item 2: has role and from"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages, item 1: has no content: write one, or take the record"),
        ({"messages": [{"from": "human", "content": "x"}, ANSWER]}, "messages, item 1: has from and content"),
        (chat({"role": "developer", "content": "x"}), "messages, item 1: role = 'developer': must be .*; correct it"),
        ({"data": [{"messages": []}]}, "has neither messages .*, but data; 'data' is a list of records: save that"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(record: Chat, told: str) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl:1: {told}"):
        rows(record)


def test_one_of_two_lists_may_be_empty() -> None:
    nothings: list[Any] = [[], None]
    for nothing in nothings:
        assert len(rows(chat(conversations=nothing), sharegpt("q", "a", messages=nothing))) == 2


def test_fields_that_are_not_used_are_counted_by_name() -> None:
    account = Account()
    first = chat(answer={"mood": "fine"}, source="s", score=0, id=1, group="g", empty=[])
    rows(first, chat(source="s", id=2, group="g") | {"__source__": "x"}, account=account)
    assert account.unused == {"source": 2, "score": 1, "messages.mood": 1}
    assert account.lines() == ["fields that are not used: messages.mood (1), score (1), source (2)"]
    assert not account.dropped


def test_numbers_go_on_over_dropped_records() -> None:
    account = Account()
    found = [("a.jsonl:1", chat(answer={"weight": 0})), ("a.jsonl:2", chat())]
    assert [row.id for row in chats.conversations(found, "train", 5, account)] == ["train-7"]
    assert account.dropped == {"answer with weight 0": ["train-6"]}
    assert account.dropped_records == 1


def test_parquet_gives_the_same_where_its_columns_are_unions(tmp_path: Path) -> None:
    """A column of messages has all fields of all messages, null where a message has none."""
    import pyarrow as pa
    from pyarrow import parquet

    records: list[Chat] = [
        chat(system="Be brief.", source="s"),
        chat(answer={"tool_calls": [{"name": "f"}]}),
        chat(answer={"weight": 0}),
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        chat(tools="[]"),
    ]
    names = sorted({name for record in records for name in record})
    fields = sorted({name for record in records for message in record["messages"] for name in message})
    filled: list[Chat] = [{name: record.get(name) for name in names} for record in records]
    for record in filled:
        record["messages"] = [{name: message.get(name) for name in fields} for message in record["messages"]]
    parquet.write_table(pa.Table.from_pylist(filled), tmp_path / "a.parquet")
    whole, plain = Account(), Account()
    found = read(File("a.parquet", "some", tmp_path / "a.parquet"))
    assert chats.conversations(found, "train", 0, whole) == rows(*records, account=plain)
    assert whole == plain
    assert whole.dropped_records == 2
    assert json.dumps(whole.unused) == '{"source": 1}'
