"""From the records of one file to examples: ACLSum's papers, tables by column names, and conversations.

ACLSum's line for a paper becomes three rows, one for each aspect. One of them, as in `out/data/train.jsonl`:

    {"id": "2021.eacl-main.84/approach", "group": "2021.eacl-main.84", "aspect": "approach",
     "source": "Identifying named entities in written text is ... in multiple languages .",
     "target": "They propose an experimental setup where systems are evaluated in an online fashion ...",
     "lead": "Identifying named entities in written text is an essential component ...",
     "references": ["They propose an experimental setup ..."], "history": []}

UserError names the place of a record that does not fit.
"""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core import params
from pipeline.core.errors import LONGEST_LABEL, UserError, label_fault, listing
from pipeline.core.records import Example
from pipeline.core.text import lead
from pipeline.sources import tables
from pipeline.sources.tables import ABSENT, Located, Record

ASPECTS = ("challenge", "approach", "outcome")
LONGEST_ID = 1000
"""Characters of an id or a group, which may be an address. An aspect has fewer, since charts show it."""
# How transcripts name the speakers: {role, content} of the chat templates, {from, value} of ShareGPT.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def papers(found: Sequence[Located]) -> list[Example]:
    """ACLSum (arXiv 2403.05303): the abstract of each paper, and one summary for each of three aspects."""
    rows = []
    for where, paper in found:
        name, abstract, summary = paper.get("id"), _in(paper.get("sentences"), "abstract"), paper.get("summary")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: id must be a string; is this ACLSum's format? Else use data.format: table")
        name = _name(name, f"{where}: id")
        if not isinstance(abstract, list) or not all(isinstance(sentence, str) for sentence in abstract):
            raise UserError(f"{where}: sentences.abstract must be a list of strings")
        source = _string(" ".join(abstract), f"{where}: sentences.abstract")
        for aspect in ASPECTS:
            target = _string(_in(summary, aspect), f"{where}: summary.{aspect}")
            rows.append(Example(f"{name}/{aspect}", name, aspect, source, target, "".join(abstract[:1]).strip()))
    return rows


def _in(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def table(found: Sequence[Located], columns: params.Columns, file: str, split: str, before: int) -> list[Example]:
    """Rows by column names. Rows without ids are numbered, after the `before` rows of earlier files of the split.

    The group stays empty where no column names it. `file` is named by the error for columns that are not there.
    """
    _require_columns(columns, found, file)
    rows = []
    for number, (where, record) in enumerate(found, start=before + 1):
        source = _string(_cell(record, columns.source), f"{where}: {columns.source}")
        targets = _targets(_cell(record, columns.target), f"{where}: {columns.target}")
        name = f"{split}-{number}" if columns.id is None else _label(record, columns.id, where)
        group = "" if columns.group is None else _label(record, columns.group, where)
        aspect = "default" if columns.aspect is None else _label(record, columns.aspect, where, LONGEST_LABEL)
        rows.append(Example(name, group, aspect, source, targets[0], lead(source), targets))
    return rows


def _require_columns(columns: params.Columns, found: Sequence[Located], file: str) -> None:
    missing = {
        role: column
        for role, column in columns.model_dump().items()
        if column is not None and all(tables.value(record, column) is ABSENT for _, record in found)
    }
    if missing and found:
        there = tables.columns(found)
        problems = []
        for role, column in missing.items():
            close = difflib.get_close_matches(column, there, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"data.columns.{role} = '{column}': no such column{hint}")
        if {"messages", "conversations"} & set(there):
            problems.append("these are conversations: data.format: chat makes source and target of them")
        raise listing(problems, f"{file} has the columns {', '.join(map(repr, there))}")


def conversations(found: Sequence[Located], split: str, before: int) -> list[Example]:
    """The last answer of each conversation, with the message before it as source; earlier messages are the history.

    If one record of a file has an id or a group, all must. Records without ids are numbered as in `table`.
    """
    has_id, has_group = (any(record.get(name) is not None for _, record in found) for name in ("id", "group"))
    rows = []
    for number, (where, record) in enumerate(found, start=before + 1):
        *history, question, answer = _turns(record, where)
        name = _label(record, "id", where) if has_id else f"{split}-{number}"
        group = _label(record, "group", where) if has_group else ""
        source, target = question["content"], answer["content"]
        rows.append(Example(name, group, "default", source, target, lead(source), [target], history))
    return rows


def _turns(record: Record, where: str) -> list[dict[str, str]]:
    """The messages, at least two; the last two are the user's and the assistant's."""
    key = next((key for key in ("messages", "conversations") if record.get(key) is not None), None)
    if key is None:
        there = ", ".join(name for name in record if not name.startswith("__"))
        raise UserError(f"{where}: has neither messages nor conversations, but {there or 'nothing'}")
    if not isinstance(record[key], list):
        raise UserError(f"{where}: {key} must be a list of messages, not {type(record[key]).__name__}")
    turns = []
    for number, message in enumerate(record[key], start=1):
        at = f"{where}: {key}, item {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{at}: must be an object with role and content, or from and value")
        by, text = ("role", "content") if "role" in message else ("from", "value")
        role = message.get(by)
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{at}: {by} = {reprlib.repr(role)}: must be {', '.join(ROLES)}")
        turns.append({"role": ROLES[role], "content": _string(message.get(text), f"{at}: {text}")})
    if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        ends = ", ".join(turn["role"] for turn in turns[-2:]) or "nothing"
        raise UserError(f"{where}: must end in a message of the user and the assistant's answer, but ends in {ends}")
    return turns


# Cells


def _cell(record: Record, column: str) -> Any:
    """A record's value in a column; null where it has none."""
    found = tables.value(record, column)
    return None if found is ABSENT else found


def _string(value: Any, where: str) -> str:
    """A text without the white space around it; null is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where} = {reprlib.repr(value)}: must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} = {reprlib.repr(value)}: holds half of a surrogate pair, which is not a character"
        ) from None
    return value.strip()


def _targets(value: Any, where: str) -> list[str]:
    """The right answers, at least one; from a list, each that is not empty once."""
    if not isinstance(value, list):
        return [_string(value, where)]
    texts = [_string(text, f"{where}, item {number}") for number, text in enumerate(value, start=1)]
    return list(dict.fromkeys(text for text in texts if text)) or [""]


def _label(record: Record, column: str, where: str, longest: int = LONGEST_ID) -> str:
    """An id, a group or an aspect: a string, or an integer in digits."""
    value = _cell(record, column)
    name = _name(str(value) if type(value) is int else value, f"{where}: {column}", longest)
    if not name:
        raise UserError(f"{where}: {column} is empty: fill it in every row, or do without the column")
    return name


def _name(value: Any, where: str, longest: int = LONGEST_ID) -> str:
    name = _string(value, where)
    if fault := label_fault(name, longest):
        raise UserError(f"{where} = {reprlib.repr(name)} {fault}; charts and tables show it as it is")
    return name
