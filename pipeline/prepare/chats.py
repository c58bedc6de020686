"""Conversations: the last answer is the target, the message before it the source, all earlier ones the history.

A field that changes what a conversation means is used or makes it unusable: `system` becomes the first message, and a
conversation with tools, reasoning, images and the like (`BESIDE`, `WITHIN`) is dropped and counted, since a model that
reads texts alone would learn from half of it. All other fields are counted as not used.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.core.text import lead
from pipeline.prepare.cells import is_empty, label, string
from pipeline.sources import tables
from pipeline.sources.account import Account
from pipeline.sources.tables import Located, Record

# How transcripts name the speakers: {role, content} of the chat templates, {from, value} of ShareGPT.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
LISTS = ("messages", "conversations")
SYSTEM = ("system", "system_prompt")
"""Columns that hold the first system message: of ShareGPT's and OpenOrca's files, and of OpenHermes'."""
FORMS = (("role", "content"), ("from", "value"))
MEDIA = ("image", "images", "audio", "audios", "video", "videos", "documents")
BESIDE = (
    *MEDIA, "tools", "functions", "tool_choice", "function_call", "tool_calls", "history", "chat_template_kwargs",
)  # fmt: skip
"""Fields beside the messages that change what the conversation means: chat templates put them into the prompt."""
WITHIN = (
    *MEDIA, "tools", "functions", "function_call", "tool_calls", "tool_call_id", "name", "reasoning",
    "reasoning_content", "thinking", "channel", "recipient", "refusal", "prefix", "train_detail", "training_detail",
)  # fmt: skip
"""Fields of a message likewise, of the interfaces of OpenAI, Mistral and DeepSeek, and of axolotl."""
NOT_WANTED = ("label", "kto_tag")
"""false there marks an answer as a bad example (KTO, arXiv 2402.01306)."""
LEARN = ("train", "training", "trainable", "loss")
"""false there means that a message is not learnt, as `weight: 0` does (axolotl, ms-swift)."""
TEXT_PARTS = (None, "text", "input_text", "output_text")
NO_WEIGHT = "answer with weight 0"


def conversations(found: Sequence[Located], split: str, before: int, account: Account) -> list[Example]:
    """The rows of a file of conversations, and in `account` those that are dropped.

    If one record of a file has an id or a group, all must. Records without ids are numbered, after the `before` records
    of earlier files of the split.
    """
    has_id, has_group = (any(record.get(name) is not None for _, record in found) for name in ("id", "group"))
    rows = []
    for number, (where, record) in enumerate(found, start=before + 1):
        name = label(record, "id", where, account) if has_id else f"{split}-{number}"
        group = label(record, "group", where, account) if has_group else ""
        key, messages = _messages(record, where)
        if why := _unusable(record, messages):
            account.drop(why, name)
            continue
        *history, question, answer = _turns(record, key, messages, where, account)
        _count_unused(record, key, account)
        source, target = question["content"], answer["content"]
        rows.append(Example(name, group, "default", source, target, lead(source), [target], history))
    return rows


def _messages(record: Record, where: str) -> tuple[str, list[Mapping[str, Any]]]:
    """The messages of a record, and the name of their column."""
    given = [key for key in LISTS if record.get(key) is not None]
    if len(held := [key for key in given if not is_empty(record[key])]) > 1:
        raise UserError(f"{where}: has both {' and '.join(held)}: leave one of them out")
    if not given:
        there = [name for name in record if name not in tables.BUILT_IN][: tables.SHOWN]
        shape = tables.shape([(where, record)])
        raise UserError(
            f"{where}: has neither messages nor conversations, but {', '.join(there) or 'nothing'}"
            + (f"; {shape}" if shape else "")
        )
    key = (held or given)[0]
    if not isinstance(record[key], list):
        raise UserError(f"{where}: {key} must be a list of messages, not {type(record[key]).__name__}")
    for number, message in enumerate(record[key], start=1):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{where}: {key}, item {number}: must be an object with role and content, or from and value"
            )
    return key, record[key]


# What makes a conversation unusable


def _unusable(record: Record, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a conversation cannot be used, though nothing is wrong with it; None if it can."""
    for name in BESIDE:
        if not is_empty(record.get(name)):
            return f"conversation with {name}"
    for name in NOT_WANTED:
        if record.get(name) is False:
            return f"answer with {name} false"
    for message in messages:
        for name in WITHIN:
            if not is_empty(message.get(name)):
                return f"message with {name}"
        for part in (part for text in ("content", "value") for part in _parts(message.get(text))):
            if part.get("type") not in TEXT_PARTS:
                return "message with parts other than text"
    return NO_WEIGHT if messages and _is_not_learnt(messages[-1]) else None


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _is_not_learnt(message: Mapping[str, Any]) -> bool:
    weight = message.get("weight")
    return any(message.get(name) is False for name in LEARN) or (type(weight) in (int, float) and weight == 0)


# Messages


def _turns(
    record: Record, key: str, messages: Sequence[Mapping[str, Any]], where: str, account: Account
) -> list[dict[str, str]]:
    """The messages with the system message of the record, at least two; the last two are user's and assistant's."""
    turns = []
    for number, message in enumerate(messages, start=1):
        at = f"{where}: {key}, item {number}"
        by, text = _form(message, at)
        role = message.get(by)
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(
                f"{at}: {by} = {reprlib.repr(role)}: must be {', '.join(ROLES)}; correct it, or take the record out"
            )
        if text not in message:
            raise UserError(f"{at}: has no {text}: write one, or take the record out")
        _require_weight(message, at)
        turn = {"role": ROLES[role], "content": _content(message[text], f"{at}: {text}", account)}
        if turn["role"] == "assistant" and _is_not_learnt(message):
            turn["weight"] = "0"  # read by `train.turns: all`
        turns.append(turn)
    turns = _after_system(record, turns, where, account)
    if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        ends = ", ".join(turn["role"] for turn in turns[-2:]) or "nothing"
        raise UserError(f"{where}: must end in a message of the user and the assistant's answer, but ends in {ends}")
    return turns


def _form(message: Mapping[str, Any], at: str) -> tuple[str, str]:
    """The names of a message's speaker and text. In Parquet a message may have all four, two of them null."""
    chosen, other = FORMS if message.get("role") is not None else FORMS[::-1]
    mixed = [name for name in other if not is_empty(message.get(name))]
    if mixed and message.get(chosen[0]) is not None:
        raise UserError(f"{at}: has {chosen[0]} and {mixed[0]}: write role and content, or from and value")
    return chosen


def _require_weight(message: Mapping[str, Any], at: str) -> None:
    weight = message.get("weight")
    if weight is not None and (type(weight) not in (int, float) or weight not in (0, 1)):
        raise UserError(
            f"{at}: weight = {reprlib.repr(weight)}: must be 0 or 1, since the last answer is learnt whole or "
            "not at all"
        )


def _content(value: Any, at: str, account: Account) -> str:
    """The text of a message: a string, or a list of one part of text."""
    if not _parts(value):
        return string(value, at, account)
    if len(value) > 1:
        raise UserError(f"{at}: has {len(value)} parts: join them to one text, as they are meant to be read")
    return string(value[0].get("text"), f"{at}, item 1: text", account)


def _after_system(record: Record, turns: list[dict[str, str]], where: str, account: Account) -> list[dict[str, str]]:
    """The messages after the system message that stands beside them, if one does."""
    beside = {name: string(record.get(name), f"{where}: {name}", account) for name in SYSTEM}
    texts = list(dict.fromkeys(text for text in beside.values() if text))
    if not texts:
        return turns
    first, *rest = turns or [{"role": "", "content": ""}]
    if first["role"] == "system":
        texts += [first["content"]] if first["content"] not in ("", texts[0]) else []
    if len(texts) > 1:
        raise UserError(
            f"{where}: has several system messages: {', '.join(map(reprlib.repr, texts))}: leave one, in "
            f"{SYSTEM[0]} or as the first message"
        )
    system = {"role": "system", "content": texts[0]}
    return [system, *(rest if first["role"] == "system" else turns)]


def _count_unused(record: Record, key: str, account: Account) -> None:
    """Count the fields that hold something and are not used: they cannot change what the conversation means."""
    used = {key, "id", "group", *SYSTEM, *tables.BUILT_IN}
    account.unused.update(name for name, value in record.items() if name not in used and not is_empty(value))
    used = {"weight", *LEARN, *(name for form in FORMS for name in form)}
    for message in record[key]:
        account.unused.update(
            f"{key}.{name}" for name, value in message.items() if name not in used and not is_empty(value)
        )
