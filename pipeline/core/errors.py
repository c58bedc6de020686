"""The one error a user is meant to see: what is wrong, with which value, and what to do about it."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_LABEL = 200
"""Characters. An instruction is a parameter `prompt.instructions.<aspect>` in MLflow, whose names have 250 at most."""


class UserError(Exception):
    """A mistake in the parameters, the data, the model or the environment that the user can mend.

    Entry points print it without a traceback and exit with code 1. Any other exception that escapes is a defect of
    ours. A message may quote text of strangers, so it is made `printable` here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` as it may be printed and logged: without passwords, and with U+FFFD for what a terminal would obey.

    A terminal obeys control characters (line feeds and tabs stay) and characters that turn the direction of writing,
    with which a name could hide the text before it. `text` may have several lines.
    """
    return _OBEYED.sub("\ufffd", without_passwords(text))


_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def without_passwords(text: str) -> str:
    """`text`, its addresses without the user name and password that they may hold, and without values that may be keys.

    Of "?name=value&name=value", and the same behind "#", only values stay whose names are known to be of no secret:
    what services call their tokens, keys and signatures has no end. The user name of a login by ssh stays.
    """
    text = _UNQUOTED.sub(r"\1", _LOGIN.sub(_without_login, text))
    return _VALUE.sub(_without_value, text)


# `pathlib` makes one slash of two, JSON may write "\/".
_LOGIN = re.compile(r"(//|(?<=\w\w:)/|\\/\\/)([^\s/?#]*)@")
# A password that was to be percent-encoded and is not, as in "//me:a/b c@host"; a number is a port instead.
_UNQUOTED = re.compile(
    r"""(?<!/)(//|(?<=\w\w:)/)(?!/)[^\s/?#@:\[]*:(?!\d+(?:[/?#\s,;:)\]}>'"]|$))\S[^\n@]{0,2000}@(?:\S*@)?"""
)
_VALUE = re.compile(r"([?&#])([^\s=?&#]*)=([^\s&#]*)")
_HARMLESS = re.compile(
    r"""user|username|host|port|database|dbname|schema|warehouse|region|driver|plugin|charset|collation|encoding
        |ssl|ssl_?mode|ssl_?root_?cert|encrypt|trust_?server_?certificate|trusted_connection|mode|cache|uri|timeout
        |\w+_timeout|application_name|options|unix_socket|local_infile|isolation_level|check_same_thread
        |revision|ref|branch|page|limit|format|version""",
    re.IGNORECASE | re.VERBOSE,
)
"""Names that databases, their drivers and hubs give to what is no secret."""


def _without_login(found: re.Match[str]) -> str:
    by_ssh = found.string[max(0, found.start() - 4) : found.start()].lower() == "ssh:" and ":" not in found[2]
    return found[0] if by_ssh else found[1]


def _without_value(found: re.Match[str]) -> str:
    mark, name, value = found.groups()
    plain = value.rstrip("'\")]}>,.;:")
    if not plain or (_HARMLESS.fullmatch(name) and re.fullmatch(r"[\w.:/%+,=~-]*", plain)):
        return found[0]
    return f"{mark}{name}=...{value[len(plain) :]}"


def label_fault(text: str, longest: int = LONGEST_LABEL) -> str | None:
    """Why a text cannot be a label (an id, a group, an aspect, a name), None where it can.

    Labels stand in charts, tables, file formats and terminals. Some of these end the process at a control character or
    a noncharacter, and half of a surrogate pair cannot be written; line breaks and bidirectional controls show a label
    as what it is not.
    """
    if len(text) > longest:
        return f"has {len(text):,} characters, more than {longest:,}: shorten it"
    for character in text:
        code, category = ord(character), unicodedata.category(character)
        if category in _NO_LABEL:
            what = _NO_LABEL[category]
        elif 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
            what = "a bidirectional control"
        elif 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
            what = "which is no character"
        else:
            continue
        return f"holds U+{code:04X}, {what}: take it out"
    return None


_NO_LABEL = {
    "Cc": "a control character",
    "Cs": "half of a surrogate pair, which is no character",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
"""The reason that a message gives, by the general category of the character."""


def listing(problems: Iterable[str], headline: str) -> UserError:
    """All problems at once, one line each, under one headline."""
    return UserError("\n".join([headline, *(f"  - {problem}" for problem in problems)]))


@contextmanager
def panics_told() -> Iterator[None]:
    """UserError in place of a panic in a library that is written in Rust, such as tokenizers.

    A panic reaches Python as a `BaseException` that is no `Exception`.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(
            f"a library broke off ({type(error).__name__}: {str(error).partition(chr(10))[0][:500]}): the model's "
            "tokenizer is damaged, or does not fit the text; name another model"
        ) from None
