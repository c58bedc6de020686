"""Gettext catalogues: the translated entries of .po and .mo files, with a count of those that are no pair of texts."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.sources.account import Account
from pipeline.sources.content import Encoding, File, decoded

Located = tuple[str, dict[str, Any]]

_CHARSET = re.compile(rb"Content-Type:[^\n]{0,200}?charset=([\w.:-]+)", re.IGNORECASE)
_PO_LINE = re.compile(r'(?:(?:msgctxt|msgid|msgid_plural|msgstr|msgstr\[\d+\])\s+)?"(?:[^"\\]|\\.)*"')
# polib would keep the backslash of any other, where gettext makes a character of it.
_UNKNOWN_ESCAPE = re.compile(r'(?<!\\)(?:\\\\)*(\\[^\\ntrvbf"])')


def source(file: File, encoding: Encoding, account: Account) -> Iterator[Located]:
    """The translated entries of a .po file, without those that are fuzzy, obsolete or have a plural."""
    import polib

    content = file.path.read_bytes()
    charset = _charset(content, file)
    text = decoded(content, file, Encoding(charset, "the charset of its header") if charset else encoding)
    _require_lines(text, file)
    with TemporaryDirectory(prefix="lora-repro-") as folder:
        # From a file, since polib would read the file whose path a text happens to be.
        copy = Path(folder) / "decoded.po"
        copy.write_text(text, encoding="utf-8")
        try:
            entries = polib.pofile(str(copy), encoding="utf-8")
        except Exception as error:  # polib raises OSError for a syntax error, and anything for other faults
            named = re.search(r"\(line (\d+)\)", str(error))
            place = f"{file.name}:{named[1]}" if named else file.name
            raise UserError(
                f"{place}: an entry of this gettext catalogue is incomplete: a msgid must come before its msgstr"
            ) from None
    for entry in entries:
        yield from _translated(f"{file.name}:{entry.linenum}", entry, account)


def _require_lines(text: str, file: File) -> None:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        # polib drops the last character of a string, in the belief that it is a quotation mark.
        if not _PO_LINE.fullmatch(bare):
            raise UserError(
                f"{file.name}:{number} is not a line of a gettext catalogue: it must be a comment, or a string in "
                "quotation marks, the first string of each after msgid, msgstr or msgctxt"
            )
        if escape := _UNKNOWN_ESCAPE.search(bare):
            raise UserError(
                f"{file.name}:{number}: the escape {escape[1]} is not read: write the character itself, or two "
                "backslashes for one"
            )


def compiled(file: File, encoding: Encoding, account: Account) -> Iterator[Located]:
    """The entries of a .mo file, without those that have a plural; msgfmt has left out fuzzy ones."""
    import polib

    charset = _charset(file.path.read_bytes(), file) or encoding.codec
    try:
        entries = polib.mofile(str(file.path), encoding=charset)
    except Exception as error:  # offsets that lead out of the file raise anything
        raise UserError(
            f"{file.name} is not a compiled gettext catalogue in {charset.upper()} ({type(error).__name__}: {error}): "
            "compile it anew with msgfmt, or use the .po file"
        ) from None
    for number, entry in enumerate(entries, start=1):
        yield from _translated(f"{file.name}, entry {number}", entry, account)


def _charset(content: bytes, file: File) -> str | None:
    """The encoding that a catalogue's header names; None for none, or for the template's placeholder."""
    named = _CHARSET.search(content)
    if named is None or named[1] == b"CHARSET":
        return None
    charset = named[1].decode("ascii", "replace")
    try:
        params.codec(charset)
    except ValueError:
        line = content.count(b"\n", 0, named.start()) + 1
        raise UserError(
            f"{file.name}:{line}: the header names the charset '{charset}', which is not an encoding: correct it"
        ) from None
    return charset


def _translated(where: str, entry: Any, account: Account) -> Iterator[Located]:
    if why := _no_pair(entry):
        account.left_out[why] += 1
    else:
        yield where, {"msgid": entry.msgid, "msgstr": entry.msgstr, "msgctxt": entry.msgctxt}


def _no_pair(entry: Any) -> str | None:
    """Why an entry is not a text with its translation; None if it is."""
    if entry.obsolete:
        return "obsolete entries"
    if entry.msgid_plural:
        return "entries with a plural"
    if "fuzzy" in entry.flags:
        return "fuzzy entries"
    if not entry.msgid:
        return "entries without a msgid"
    return None if entry.msgstr else "untranslated entries"
