"""The one error that users are meant to see: it says what is wrong, with which value, and what to do about it."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_LABEL = 200
"""Characters. MLflow allows 250 in a parameter's name, and `prompt.instructions.<aspect>` is one."""

CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
"""Control characters except tab and line feed, as members of a character class of `re`."""
BIDIRECTIONAL = r"\u202a-\u202e\u2066-\u2069"
"""The characters that turn the direction of writing, likewise."""


class UserError(Exception):
    """A mistake in the parameters, the data, the model or the environment that the user can correct.

    Entry points print it without a traceback and exit with code 1. Any other exception that escapes is our defect. The
    message may quote text of strangers, so it is made `printable` here.

    `problems` are the mistakes that the message tells of, each a text of its own; see `listing`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
        self.problems = [str(self)]


def printable(text: str) -> str:
    """`text`, of one or more lines, made safe for a terminal and a log.

    Passwords are removed. U+FFFD replaces the characters that a terminal would obey (`CONTROLS`, `BIDIRECTIONAL`): with
    them a name could hide the text before it.
    """
    return re.sub(f"[{CONTROLS}{BIDIRECTIONAL}]", "\ufffd", without_passwords(text))


def without_passwords(text: str) -> str:
    """`text` whose addresses have lost user names, passwords and values that may be keys.

    In "?name=value&name=value", also behind "#", a value stays only if its name is known to hold no secret: services
    have countless names for tokens, keys and signatures. The user name of an ssh login stays.
    """
    text = _UNQUOTED.sub(r"\1", _LOGIN.sub(_without_login, text))
    return _VALUE.sub(_without_value, text)


# One slash may stand for two, since `pathlib` joins them; JSON may write "\/".
_LOGIN = re.compile(r"(//|(?<=\w\w:)/|\\/\\/)([^\s/?#]*)@")
# A password that should be percent-encoded but is not, as in "//me:a/b c@host". A number there is a port.
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
"""Names that databases, their drivers and hubs give to values that are not secret."""


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
    """Why a text cannot be a label (an id, a group, an aspect, a name); None if it can.

    Labels appear in charts, tables, file formats and terminals. Some of these end the process at a control character or
    a noncharacter, and half of a surrogate pair cannot be written. Line breaks and bidirectional controls make one
    label look like another.
    """
    if len(text) > longest:
        return f"has {len(text):,} characters, more than {longest:,}: shorten it"
    for character in text:
        code, category = ord(character), unicodedata.category(character)
        if category in _NO_LABEL:
            what = _NO_LABEL[category]
        elif re.match(f"[{BIDIRECTIONAL}]", character):
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
"""Unicode's general categories that no label may contain, and how messages name their characters."""


def listing(problems: Iterable[str], headline: str) -> UserError:
    """One error that lists all problems under a headline. Further lines of a problem are indented."""
    problems = list(problems)
    error = UserError("\n".join([headline, *("  - " + problem.replace("\n", "\n    ") for problem in problems)]))
    error.problems = [printable(problem) for problem in problems]
    return error


@contextmanager
def panics_told() -> Iterator[None]:
    """Turn a panic of a Rust library, such as tokenizers, into a UserError.

    Python sees a panic as a `BaseException` that is not an `Exception`.
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
