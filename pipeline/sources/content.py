"""The content of one file of a source: what its first bytes say that it is, and its text, decoded."""

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.records import is_lfs_pointer, opened

# UTF-32's little-endian mark begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MARK = "\ufeff"
"""The byte order mark as a character: within a file it shows that files were joined."""
_OTHERS = (
    (rb"\x1f\x8b", "compressed with gzip", "unpack it"),
    (rb"BZh[1-9]1AY&SY", "compressed with bzip2", "unpack it"),
    (rb"\xfd7zXZ\0", "compressed with xz", "unpack it"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it"),
    (rb"\x04\x22\x4d\x18", "compressed with lz4", "unpack it"),
    (rb"PK\x03\x04", "a zip archive, as Excel's workbooks are", "unpack it, or save the sheet as CSV"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (rb".{257}ustar", "a tar archive", "unpack it"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of Microsoft Office", "save the sheet as CSV"),
    (rb"PAR1[\x00-\x1f]", "Parquet", "name it .parquet"),
    (rb"ARROW1\0\0", "an Arrow file", "save it as Parquet"),
    (rb"SQLite format 3\0", "a database of SQLite", "save the table as CSV"),
    (rb"%PDF-\d", "a PDF document", "save its text"),
)
"""How files of other kinds begin, what they are, and what to do."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """The codec of text without a byte order mark, and what names it: a parameter, or the file's header."""

    codec: str
    named_by: str


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source: its path from the root down, the name of the source, and its path on this disk."""

    name: str
    source: str
    path: Path


def require_kind(file: File) -> None:
    """UserError for a file that is known to be something else than its name says: compressed, a pointer of Git LFS."""
    if is_lfs_pointer(file.path):
        raise UserError(
            f"{file.name} is a pointer of Git LFS, not the content: run `git lfs pull` where it comes from, and pin "
            "the content anew"
        )
    with opened(file.path) as open_file:
        start = open_file.read(512)
    for pattern, what, remedy in _OTHERS:
        its_own = what == "Parquet" and file.path.suffix.lower() == ".parquet"
        if not its_own and re.match(pattern, start, re.DOTALL):
            raise UserError(f"{file.name} is {what}: {remedy}")


def decoded(content: bytes, file: File, given: Encoding) -> str:
    """The text of a file; a byte order mark wins over the encoding that was given.

    UserError, with the line, for bytes that the encoding does not have, and for NUL.
    """
    mark, encoding = next((pair for pair in MARKS if content.startswith(pair[0])), (b"", given.codec))
    content = content.removeprefix(mark)
    try:
        text = content.decode(encoding)
    except UnicodeError as error:
        start = getattr(error, "start", 0)  # a few codecs do not say where
        line = content[:start].decode(encoding, "replace").count("\n") + 1
        remedy = (
            f"set {given.named_by} to the encoding that the file has"
            if not mark
            else "it is what its first bytes announce"
        )
        raise UserError(
            f"{file.name}:{line} is not {encoding.upper()} (byte {len(mark) + start}): {remedy}, or save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"{file.name}:{line} holds NUL, which is in no text: set {given.named_by} to the encoding that the file "
            "has (UTF-16 without a byte order mark looks so), or take it out"
        )
    return text
