"""Files of records: found in the sources by path or pattern, decoded, and read, each record with its place.

The suffix says whether a file is JSONL, JSON, CSV, TSV, Parquet or a gettext catalogue (.po, .mo). Every record also
has the columns `__file__`, the file's path, and `__source__`, the name of the source it comes from.
"""

import codecs
import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.records import files as files_within

SHOWN = 20  # files or columns that an error lists at most
SUFFIXES = ".jsonl, .json, .csv, .tsv, .parquet, .po or .mo"
# UTF-32's little-endian mark begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
ABSENT: Final = object()
"""What `value` returns for a column that a record does not have; null is a value."""

Record = Mapping[str, Any]
Located = tuple[str, Record]  # where a record stands (`train.jsonl:3`), and the record

_CHARSET = re.compile(rb"Content-Type:[^\n]{0,200}?charset=([\w.:-]+)", re.IGNORECASE)
_PO_LINE = re.compile(r'(?:(?:msgctxt|msgid|msgid_plural|msgstr|msgstr\[\d+\])\s+)?"(?:[^"\\]|\\.)*"')


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


# Finding


def files(places: Mapping[str, Path], several: bool) -> dict[str, File]:
    """The files in the sources, by path from the root down; hidden ones are left out, as the sources' digests do.

    `places`: each source's local path by its name. The root is the folder of the one source. With `several`, the root
    holds a folder for each source, under its name; a source that is a file lies at the top.
    """
    found = []
    for source, place in places.items():
        if place.is_file():
            found.append(File(source if place.name == source else f"{source}/{place.name}", source, place))
            continue
        # A digest goes through a folder by the same function: what is read is what was pinned.
        for name, path in files_within(place).items():
            found.append(File(f"{source}/{name}" if several else name, source, path))
    return {file.name: file for file in sorted(found, key=lambda file: file.name)}


def select(there: Mapping[str, File], wanted: str | list[str], key: str) -> list[File]:
    """The files that paths or patterns name, sorted, each once; `**` stands for any folders, `*` for none.

    UserError, naming `key`, for what leads out of the sources or is hidden, and for what no file matches.
    """
    chosen: set[str] = set()
    section = key.partition(".")[0]
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        path = PurePosixPath(pattern)
        # The digest of a folder covers what lies in it and is not hidden: nothing else is pinned.
        if path.is_absolute() or any(part.startswith(".") for part in path.parts):
            raise UserError(
                f"{key} = '{pattern}': must lie in {section}.source, and not be hidden: only that content is pinned"
            )
        # A file may have [ or * in its name.
        names = [path.as_posix()] if path.as_posix() in there else _matching(there, path)
        if not names:
            raise UserError(f"{key} = '{pattern}': {section}.source has no such file; it has {_near(there, path)}")
        chosen |= set(names)
    return [there[name] for name in sorted(chosen)]


def _matching(there: Mapping[str, File], pattern: PurePosixPath) -> list[str]:
    return [name for name in there if _matches(PurePosixPath(name).parts, pattern.parts)]


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    # The numbers of leading parts that the pattern matches so far. Trying every way to divide the parts among several
    # `**` would take exponential time.
    ends = {0}
    for wanted in pattern:
        if wanted == "**":
            ends = set(range(min(ends, default=len(parts) + 1), len(parts) + 1))
        else:
            ends = {end + 1 for end in ends if end < len(parts) and fnmatchcase(parts[end], wanted)}
    return len(parts) in ends


def _near(there: Mapping[str, File], wanted: PurePosixPath) -> str:
    below = [name for name in there if name.startswith(f"{wanted}/")]
    alike = below or difflib.get_close_matches(str(wanted), there, n=3) or list(there)
    return ", ".join(alike[:SHOWN]) + (", ..." if len(alike) > SHOWN else "") or "no files"


# Reading


def records(file: File, encoding: str, section: str = "data") -> Iterator[Located]:
    """The records of a file, each with its place; UserError says where the file is broken.

    `encoding` holds for text without a byte order mark, and comes from the `section` of the parameters; a gettext
    catalogue may name its own.
    """
    readers: dict[str, Callable[[File, Encoding], Iterator[Located]]] = {
        ".jsonl": _json,
        ".json": _json,
        ".csv": _delimited,
        ".tsv": _delimited,
        ".parquet": _parquet,
        ".po": _catalogue,
        ".mo": _compiled_catalogue,
    }
    suffix = file.path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{file.name}: '{suffix}' files cannot be read; use {SUFFIXES}")
    for where, record in readers[suffix](file, Encoding(encoding, f"{section}.encoding")):
        yield where, {**record, "__file__": file.name, "__source__": file.source}


def value(record: Record, column: str) -> Any:
    """A record's value in a column, or ABSENT; `a.b` is a column so named, else column b of the object in column a."""
    if column in record:
        return record[column]
    inner: Any = record
    for part in column.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return ABSENT
        inner = inner[part]
    return inner


def columns(found: Iterable[Located]) -> list[str]:
    """The names of all columns of some records; the columns of an object in column a are `a.b`."""
    return list(dict.fromkeys(name for _, record in found for name in _names(record)))


def _names(record: Record, prefix: str = "") -> Iterator[str]:
    for name, inner in record.items():
        if isinstance(inner, Mapping) and inner:
            yield from _names(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def plain(file: File, encoding: str, section: str) -> str:
    """The whole content of a file of plain text."""
    return _text(file.path.read_bytes(), file, Encoding(encoding, f"{section}.encoding"))


def _text(content: bytes, file: File, given: Encoding) -> str:
    """The decoded content; a byte order mark wins over the encoding that was given."""
    mark, encoding = next((pair for pair in MARKS if content.startswith(pair[0])), (b"", given.codec))
    content = content.removeprefix(mark)
    try:
        return content.decode(encoding)
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


def _json(file: File, encoding: Encoding) -> Iterator[Located]:
    """One object a line, one array of objects, or (.json) one object over several lines.

    Read without a table library, which would turn strings that look like dates into dates.
    """
    text = _text(file.path.read_bytes(), file, encoding)
    start = text.lstrip()
    located: list[tuple[str, Any]]
    if start.startswith("["):
        items = _parsed(text, f"{file.name} is not JSON")
        located = [(f"{file.name}, item {number}", item) for number, item in enumerate(items, start=1)]
    elif file.path.suffix.lower() == ".json" and start.split("\n", 1)[0].rstrip() == "{":
        located = [(file.name, _parsed(text, f"{file.name} is not JSON"))]
    else:
        located = [
            (f"{file.name}:{number}", _parsed(line, f"{file.name}:{number} is not a line of JSON"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for where, item in located:
        if not isinstance(item, dict):
            raise UserError(f"{where}: must be an object with the columns as keys, not {type(item).__name__}")
        yield where, item


def _parsed(text: str, fault: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{fault}: {error}") from None


def _delimited(file: File, encoding: Encoding) -> Iterator[Located]:
    """Fields stay strings ("007"), quoted as in CSV. A row with too many or too few fields is an error."""
    text = _text(file.path.read_bytes(), file, encoding)
    delimiter = "\t" if file.path.suffix.lower() == ".tsv" else _delimiter(text)
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{file.name}:1: column names repeat: {', '.join(header)}")
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise UserError(
                    f"{file.name}:{line}: {len(fields)} fields for {len(header)} columns; quote what holds "
                    f"{delimiter!r}"
                )
            if fields:
                yield f"{file.name}:{line}", dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file.name}:{line}: {error}") from None


def _delimiter(text: str) -> str:
    """The header's first of comma, semicolon (spreadsheets where numbers have a comma), tab and bar; else a comma.

    With a delimiter that the header lacks, the file would have one column, too few for source and target.
    """
    header = text.split("\n", 1)[0]
    return next((mark for mark in ",;\t|" if mark in header), ",")


def _parquet(file: File, _: Encoding) -> Iterator[Located]:
    """The rows as Arrow holds them. `datasets` itself would open files and addresses that a column of images names."""
    import datasets

    datasets.disable_progress_bars()
    with TemporaryDirectory(prefix="lora-repro-") as cache:  # an earlier reading must not enter a result
        try:
            table = datasets.Dataset.from_parquet(str(file.path), cache_dir=cache, keep_in_memory=True)
            found: list[Record] = table.data.to_pylist()
        except Exception as error:  # `datasets` wraps whatever Arrow raises
            raise UserError(f"{file.name} is not Parquet: {error.__cause__ or error}") from None
    for number, record in enumerate(found, start=1):
        yield f"{file.name}, row {number}", record


# Gettext


def _catalogue(file: File, encoding: Encoding) -> Iterator[Located]:
    """The translated entries of a .po file, without those that are fuzzy, obsolete or have a plural."""
    import polib

    content = file.path.read_bytes()
    charset = _charset(content, file)
    text = _text(content, file, Encoding(charset, "the charset of its header") if charset else encoding)
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        bare = line.strip()
        # polib drops the last character of a string, in the belief that it is a quotation mark.
        if bare and not bare.startswith("#") and not _PO_LINE.fullmatch(bare):
            raise UserError(
                f"{file.name}:{number} is not a line of a gettext catalogue: it must be a comment, or a string in "
                "quotation marks, the first string of each after msgid, msgstr or msgctxt"
            )
    with TemporaryDirectory(prefix="lora-repro-") as folder:
        # From a file, since polib would read the file whose path a text happens to be.
        decoded = Path(folder) / "decoded.po"
        decoded.write_text(text, encoding="utf-8")
        try:
            entries = polib.pofile(str(decoded), encoding="utf-8")
        except Exception as error:  # polib raises OSError for a syntax error, and anything for other faults
            named = re.search(r"\(line (\d+)\)", str(error))
            place = f"{file.name}:{named[1]}" if named else file.name
            raise UserError(
                f"{place}: an entry of this gettext catalogue is incomplete: a msgid must come before its msgstr"
            ) from None
    for entry in entries:
        if not (entry.obsolete or "fuzzy" in entry.flags):
            yield from _translated(f"{file.name}:{entry.linenum}", entry)


def _compiled_catalogue(file: File, encoding: Encoding) -> Iterator[Located]:
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
        yield from _translated(f"{file.name}, entry {number}", entry)


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


def _translated(where: str, entry: Any) -> Iterator[Located]:
    if entry.msgid and entry.msgstr and not entry.msgid_plural:
        yield where, {"msgid": entry.msgid, "msgstr": entry.msgstr, "msgctxt": entry.msgctxt}
