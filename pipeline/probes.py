"""What the probes of forgetting read: documents or conversations out of a source, each content once.

A document is a file of plain text, or a text in the column of a table. A conversation is a list of messages in the
column of a table, or a list of texts by user and assistant in turn; the column may also hold a list of conversations.
Its last answer is the one that counts, as in `pipeline.prepare.chats`.
"""

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pipeline.core import params, records
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.model.windows import Text
from pipeline.prepare import chats
from pipeline.sources import source, tables
from pipeline.sources.account import Account

PLAIN = (".txt", ".md", ".rst", ".py")
"""Files that hold one document each."""
ROLES = ("user", "assistant")


def texts(probe: params.Probe, account: Account | None = None) -> list[Text]:
    """The documents of a probe, each content once, ordered by digest: a text's place or file does not matter.

    A file of plain text is one document, and so is a record of a table. `account` counts records without a text, and
    texts that repeat another. UserError if `column` does not fit.
    """
    counts = Account() if account is None else account
    found = [text for file in _files(probe) for text in _texts(file, probe, counts)]
    if probe.html:
        found = [Text(text.place, without_tags(text.content)) for text in found]
    given = [text for text in found if text.content.strip()]
    by_digest = {records.sha256_text(text.content): text for text in given}
    counts.left_out["empty texts"] += len(found) - len(given)
    counts.left_out["repeated texts"] += len(given) - len(by_digest)
    return [by_digest[digest] for digest in sorted(by_digest)]


def conversations(probe: params.Probe, account: Account | None = None) -> list[Example]:
    """The conversations of a probe, each content once, ordered by digest. The id of each is its place in the source.

    `account` counts records without a conversation, conversations that cannot be used, and those that repeat another.
    UserError if `column` does not fit, and for messages that make no conversation.
    """
    counts = Account() if account is None else account
    found = [one for file in _files(probe) for one in _conversations(file, probe, counts)]
    for why, names in counts.dropped.items():
        counts.left_out[why] += len(names)
    given = [one for one in found if one.source and one.target]
    by_digest = {records.sha256_text(json.dumps([one.history, one.source, one.target])): one for one in given}
    counts.left_out["conversations with an empty message"] += len(found) - len(given)
    counts.left_out["repeated conversations"] += len(given) - len(by_digest)
    return [by_digest[digest] for digest in sorted(by_digest)]


# Files and columns


def _files(probe: params.Probe) -> Iterator[tables.File]:
    with source.mounted([(probe.source, probe.sha256)], kind="dataset", key=probe.at) as places:
        yield from tables.select(tables.files(places, several=False), probe.files, f"{probe.at}.files")


def _texts(file: tables.File, probe: params.Probe, account: Account) -> list[Text]:
    """The texts of one file; `account` counts the records without a text."""
    if file.path.suffix.lower() in PLAIN:
        if probe.column is not None:
            raise UserError(f"{probe.at}.column = {probe.column!r}, but {file.name} is plain text: set it to null")
        return [Text(file.name, tables.plain(file, probe.encoding, probe.at))]
    if probe.column is None:
        raise UserError(f"{probe.at}.column is null, but {file.name} holds records: name the column of the text")
    values = [(where, value) for where, value, _ in _values(file, probe, account)]
    for where, value in values:
        if not isinstance(value, str | None):
            raise UserError(f"{probe.at}.column = {probe.column!r}: at {where} it is {type(value).__name__}, not text")
    found = [Text(where, value) for where, value in values if isinstance(value, str)]
    account.left_out["records without a text"] += len(values) - len(found)
    return found


def _values(file: tables.File, probe: params.Probe, account: Account) -> list[tuple[str, Any, tables.Record]]:
    """What the records of a file hold in the probe's column, each with its place and the record; None if nothing.

    UserError if no record has the column.
    """
    assert probe.column is not None
    located = list(tables.records(file, probe.encoding, probe.at, account))
    values = [(where, tables.value(record, probe.column), record) for where, record in located]
    if located and all(value is tables.ABSENT for _, value, _ in values):
        there = [column for column in tables.columns(located) if column not in tables.BUILT_IN]
        shape = tables.shape(located)
        raise UserError(
            f"{probe.at}.column = {probe.column!r}: {file.name} has no such column; it has "
            f"{', '.join(there[: tables.SHOWN])}{', ...' if len(there) > tables.SHOWN else ''}"
            + (f"; {shape}" if shape else "")
        )
    return [(where, None if value is tables.ABSENT else value, record) for where, value, record in values]


# Conversations


def _conversations(file: tables.File, probe: params.Probe, account: Account) -> Iterator[Example]:
    if file.path.suffix.lower() in PLAIN:
        raise UserError(f"{probe.at}.style = 'chat', but {file.name} is plain text: name a table with conversations")
    for where, value, record in _values(file, probe, account):
        if value is None or value == []:
            account.left_out["records without a conversation"] += 1
            continue
        beside = {
            name: held for name, held in record.items() if name not in (*chats.LISTS, probe.column, "id", "group")
        }
        for place, messages in _listed(value, where, probe):
            if len(messages) % 2 and not isinstance(messages[-1], Mapping):
                account.left_out["conversations that end in a question"] += 1
                continue
            made = chats.conversations([(place, beside | {"messages": _by_turns(messages)})], place, 0, account)
            yield from (replace(one, id=place) for one in made)


def _listed(value: Any, where: str, probe: params.Probe) -> Iterator[tuple[str, list[Any]]]:
    """The conversations in one value, each a list of messages or of texts, with its place."""
    if not isinstance(value, list):
        raise UserError(
            f"{probe.at}.column = {probe.column!r}: at {where} it is {type(value).__name__}, not a list of messages, "
            "or of texts"
        )
    if not all(isinstance(one, list) for one in value):
        yield where, value
        return
    for number, one in enumerate(value, start=1):
        yield f"{where}, conversation {number}", one


def _by_turns(messages: list[Any]) -> list[Any]:
    """Messages as they are; texts as messages of user and assistant in turn."""
    if any(isinstance(one, Mapping) for one in messages):
        return messages
    return [{"role": ROLES[number % 2], "content": one} for number, one in enumerate(messages)]


# HTML


def without_tags(text: str) -> str:
    """HTML as plain text: line breaks for paragraphs and breaks, no other tags, and characters for entities."""
    text = _tags(r"(?i)<(?:br|/?p)\b[^>]*>", "\n", text)
    text = _tags(r"</?[A-Za-z][^>]*>", "", text)
    # `html.unescape` fails at thousands of digits. A number of more than eight is not a character.
    text = html.unescape(re.sub(r"&#0*([0-9]{8})[0-9]*", r"&#\1", text))
    text = re.sub(r"[ \t\xa0]+", " ", text)
    return re.sub(r"\s{2,}", lambda found: "\n" if "\n" in found[0] else found[0], text).strip()


def _tags(pattern: str, instead: str, text: str) -> str:
    """`text` with its tags replaced. What follows the last ">" holds no tag, and each "<" there would cost a search."""
    before, last, rest = text.rpartition(">")
    return re.sub(pattern, instead, before + last) + rest
