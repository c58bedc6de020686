"""The values of a record as texts and labels; a text loses the white space around it, which is counted.

UserError names the place of a value that is neither.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import UserError, label_fault
from pipeline.sources import tables
from pipeline.sources.account import Account
from pipeline.sources.tables import ABSENT, Record

LONGEST_ID = 1000
"""Characters of an id or a group, which may be an address. An aspect has fewer, since charts show it."""
STRIPPED = "white space around texts"
NOTHING = ("", "[]", "{}", "null")
"""Texts that hold nothing: some data sets keep lists and objects as JSON."""


def cell(record: Record, column: str) -> Any:
    """A record's value in a column; null where it has none."""
    found = tables.value(record, column)
    return None if found is ABSENT else found


def string(value: Any, where: str, account: Account) -> str:
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
    text = value.strip()
    account.changed[STRIPPED] += text != value
    return text


def targets(value: Any, where: str, account: Account) -> list[str]:
    """The right answers, at least one; from a list, each that is not empty once."""
    if not isinstance(value, list):
        return [string(value, where, account)]
    texts = [string(text, f"{where}, item {number}", account) for number, text in enumerate(value, start=1)]
    given = [text for text in texts if text]
    different = list(dict.fromkeys(given))
    if not different:  # the row is dropped
        return [""]
    account.changed["empty right answers left out"] += len(texts) - len(given)
    account.changed["repeated right answers left out"] += len(given) - len(different)
    return different


def label(record: Record, column: str, where: str, account: Account, longest: int = LONGEST_ID) -> str:
    """An id, a group or an aspect: a string, or an integer in digits."""
    value = cell(record, column)
    found = name(str(value) if type(value) is int else value, f"{where}: {column}", account, longest)
    if not found:
        raise UserError(f"{where}: {column} is empty: fill it in every row, or do without the column")
    return found


def name(value: Any, where: str, account: Account, longest: int = LONGEST_ID) -> str:
    """A text that charts and tables show as it is; it may be empty."""
    found = string(value, where, account)
    if fault := label_fault(found, longest):
        raise UserError(f"{where} = {reprlib.repr(found)} {fault}; charts and tables show it as it is")
    return found


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, false, no text, or a list or object of what holds nothing."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif not (one is None or one is False or (isinstance(one, str) and one.strip() in NOTHING)):
            return False
    return True
