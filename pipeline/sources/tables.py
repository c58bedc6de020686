"""Files of records: found in the sources by path or pattern, decoded, and read, each record with its place.

The suffix says whether a file is JSONL, JSON, YAML, CSV, TSV, Parquet or a gettext catalogue (.po, .mo). Every record
also has the columns `__file__`, the file's path, and `__source__`, the name of the source it comes from. A reader takes
each record whole, or says where it cannot; entries that are no record are counted.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final

from pipeline.core import yaml12
from pipeline.core.errors import UserError
from pipeline.core.records import files as files_within
from pipeline.sources import catalogues, delimited
from pipeline.sources.account import SHOWN as SHOWN
from pipeline.sources.account import Account
from pipeline.sources.content import MARK, Encoding, decoded, require_kind
from pipeline.sources.content import File as File

SUFFIXES = ".jsonl, .json, .yaml, .yml, .csv, .tsv, .parquet, .po or .mo"
BUILT_IN = ("__file__", "__source__")
"""The columns that every table has."""
ABSENT: Final = object()
"""What `value` returns for a column that a record does not have; null is a value."""

Record = Mapping[str, Any]
Located = tuple[str, Record]  # where a record stands (`train.jsonl:3`), and the record


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
    section = key.partition(".files")[0]
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


def records(file: File, encoding: str, section: str = "data", account: Account | None = None) -> Iterator[Located]:
    """The records of a file, each with its place; UserError says where the file is broken.

    `encoding` holds for text without a byte order mark, and comes from the `section` of the parameters; a gettext
    catalogue may name its own. `account` counts the entries of the file that are no record.
    """
    readers: dict[str, Callable[[File, Encoding, Account], Iterator[Located]]] = {
        ".jsonl": _json,
        ".json": _json,
        ".yaml": _yaml,
        ".yml": _yaml,
        ".csv": delimited.rows,
        ".tsv": delimited.rows,
        ".parquet": _parquet,
        ".po": catalogues.source,
        ".mo": catalogues.compiled,
    }
    require_kind(file)
    suffix = file.path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{file.name}: '{suffix}' files cannot be read; use {SUFFIXES}")
    counts = Account() if account is None else account
    for where, record in readers[suffix](file, Encoding(encoding, f"{section}.encoding"), counts):
        if taken := [name for name in BUILT_IN if name in record]:
            raise UserError(
                f"{where}: has a column {taken[0]}, which is the name of one that every table has: rename it"
            )
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


def named(names: Iterable[str]) -> str:
    """Names of columns for an error: quoted, at most `SHOWN` of them, then their number."""
    everything = list(names)
    shown = ", ".join(map(repr, everything[:SHOWN]))
    return f"{shown}, ... ({len(everything):,} in all)" if len(everything) > SHOWN else shown


def shape(found: list[Located]) -> str | None:
    """What to do about a file whose one record is a whole table in another shape; None if it is a record."""
    if len(found) != 1:
        return None
    held = {name: inner for name, inner in found[0][1].items() if name not in BUILT_IN}
    for name, inner in held.items():
        if isinstance(inner, list) and inner and all(isinstance(one, Mapping) for one in inner):
            return f"{name!r} is a list of records: save that list alone, as a JSON file of its own"
    if held and all(isinstance(inner, Mapping) for inner in held.values()):
        return "the file is one object of objects: save a record a line (pandas: to_json(orient='records', lines=True))"
    return None


def _names(record: Record, prefix: str = "") -> Iterator[str]:
    for name, inner in record.items():
        if isinstance(inner, Mapping) and inner:
            yield from _names(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def plain(file: File, encoding: str, section: str) -> str:
    """The whole content of a file of plain text. UserError for what is no text in this encoding."""
    require_kind(file)
    return decoded(file.path.read_bytes(), file, Encoding(encoding, f"{section}.encoding"))


# JSON


def _json(file: File, encoding: Encoding, account: Account) -> Iterator[Located]:
    """One object a line, one array of objects, or (.json) one object over several lines.

    Read without a table library, which would turn strings that look like dates into dates.
    """
    text = decoded(file.path.read_bytes(), file, encoding)
    start = text.lstrip()
    located: Iterable[tuple[str, Any]]
    if start.startswith("["):
        items = _parsed(text, f"{file.name} is not JSON")
        located = [(f"{file.name}, item {number}", item) for number, item in enumerate(items, start=1)]
    elif file.path.suffix.lower() == ".json" and (whole := _whole(start, file)):
        located = whole
    else:
        located = _json_lines(text, file, account)
    for where, item in located:
        if not isinstance(item, dict):
            raise UserError(f"{where}: must be an object with the columns as keys, not {type(item).__name__}")
        yield where, item


def _whole(start: str, file: File) -> list[tuple[str, Any]]:
    """The one value of a .json file; empty if it has a value a line."""
    try:
        _, end = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        several = "\n" in start and not start.split("\n", 1)[0].rstrip().endswith(("{", ","))
        return [] if several else [(file.name, _parsed(start, f"{file.name} is not JSON"))]
    over_lines = "\n" in start[:end]
    if not start[end:].strip():
        return [(file.name, _parsed(start, f"{file.name} is not JSON"))] if over_lines else []
    if over_lines:
        raise UserError(
            f"{file.name} is not JSON: it has several values, one after another over several lines: put each on a line "
            "of its own, or all in one list"
        )
    return []


def _json_lines(text: str, file: File, account: Account) -> Iterator[tuple[str, Any]]:
    blank = 0
    # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may contain.
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), start=1):
        if not line.strip():
            blank += 1
            continue
        account.blank_lines += blank
        blank = 0
        if line.startswith(MARK):
            raise UserError(f"{file.name}:{number} begins with a byte order mark, as joined files do: take it out")
        yield f"{file.name}:{number}", _parsed(line, f"{file.name}:{number} is not a line of JSON")


def _parsed(text: str, fault: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        several = ": write one value a line" if error.msg == "Extra data" else ""
        raise UserError(f"{fault}: {error}{several}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{fault}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a key that repeats, whose first value would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} repeats in one object: keep one of them")
    return made


# YAML


def _yaml(file: File, encoding: Encoding, _: Account) -> Iterator[Located]:
    """One list of mappings, or one mapping; as YAML 1.2 reads it, in which 1963 is a number and no is a text."""
    found = yaml12.load(decoded(file.path.read_bytes(), file, encoding), file.name)
    items = [(file.name, found)]
    if isinstance(found, list):
        items = [(f"{file.name}, item {number}", one) for number, one in enumerate(found, start=1)]
    for where, item in items:
        if not isinstance(item, dict):
            raise UserError(f"{where}: must be a mapping with the columns as keys, not {type(item).__name__}")
        if other := [key for key in item if not isinstance(key, str)]:
            raise UserError(f"{where}: the key {other[0]!r} is not a text: put it in quotation marks")
        yield where, item


# Parquet


def _parquet(file: File, _: Encoding, __: Account) -> Iterator[Located]:
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
