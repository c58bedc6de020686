"""The examples: read from the source, cleaned, freed of leaks, and written as three splits with a card.

One row of `out/data/train.jsonl`, made from ACLSum's line for a paper (`format: aclsum`; three such rows a paper):

    {"id": "2021.eacl-main.84/approach", "group": "2021.eacl-main.84", "aspect": "approach",
     "source": "Identifying named entities in written text is ... in multiple languages .",
     "target": "They propose an experimental setup where systems are evaluated in an online fashion ...",
     "lead": "Identifying named entities in written text is an essential component ..."}

`format: table` reads JSONL, JSON, CSV, TSV or Parquet, by the file's suffix. What is dropped is counted with its reason
in `card.json`. A row of train whose source is, or nearly is, one of validation or test is dropped as leaked, and so is
one of validation in test: n-gram containment, as in the contamination studies of large models, over 8 words.
"""

import csv
import difflib
import hashlib
import io
import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import params, paths, progress, records
from pipeline.errors import UserError, listing
from pipeline.records import Example
from pipeline.sentences import lead
from pipeline.source import resolved

ASPECTS = ("challenge", "approach", "outcome")
SHINGLE_WORDS = 8
EXAMPLES_SHOWN = 5

Record = Mapping[str, Any]
Located = tuple[str, Record]  # where a record stands (`train.jsonl:3`), and the record


@dataclass
class Split:
    """A split on its way: the rows still in, and the ids of those dropped, by reason."""

    name: str
    rows: list[Example]
    read: int
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: Callable[[Example], str | None]) -> None:
        """Drop the rows for which `reason` has a name."""
        kept = []
        for row in self.rows:
            if why := reason(row):
                self.dropped.setdefault(why, []).append(row.id)
            else:
                kept.append(row)
        self.rows = kept

    @property
    def dropped_rows(self) -> int:
        return sum(map(len, self.dropped.values()))

    def reasons(self) -> str:
        return ", ".join(f"{len(ids)} {why}" for why, ids in sorted(self.dropped.items()))


def prepare(data: params.Data) -> None:
    """Write `out/data/<split>.jsonl` and `out/data/card.json`.

    UserError, with nothing written, for a source that cannot be read, ids that repeat, a split left empty, or more than
    `data.max_dropped_share` of the training rows dropped.
    """
    ((source, sha256),) = data.pinned
    with resolved(source, sha256, kind="dataset", key="data") as root:
        splits = {name: _read(data, root, name) for name in paths.SPLITS}
    for split in splits.values():
        _clean(split)
    overlap = _drop_leaks(splits, data.overlap_threshold)
    _judge(splits, data)

    for split in splits.values():
        records.write_rows(paths.split(split.name), split.rows)
    card = {name: _describe(split) for name, split in splits.items()}
    records.write_json(
        paths.DATA_CARD, {"source": data.source, "sha256": data.sha256, "splits": card, "overlap": overlap}
    )
    for split in splits.values():
        groups = len({row.group for row in split.rows})
        gone = f"{split.dropped_rows} dropped" + (f" ({split.reasons()})" if split.dropped else "")
        progress.say(f"{split.name}: {len(split.rows)} rows in {groups} groups, {gone}")


# Reading


def _read(data: params.Data, root: Path, split: str) -> Split:
    file: str = getattr(data.files, split)
    path = _locate(root, file, f"data.files.{split}")
    to_examples = _papers if data.columns is None else _table
    rows = to_examples(data, split, _records(path, file))
    if not rows:
        raise UserError(f"data.files.{split}: {file} holds no rows")
    rows = _limit(rows, getattr(data.limits, split), split)
    if repeated := [name for name, times in Counter(row.id for row in rows).items() if times > 1]:
        raise UserError(
            f"{file}: ids repeat: {', '.join(repeated[:EXAMPLES_SHOWN])} ({len(repeated)} in all); make each id "
            "unique (in a table, data.columns.id: null numbers the rows)"
        )
    return Split(split, rows, len(rows))


def _locate(root: Path, file: str, key: str) -> Path:
    if not root.is_dir():
        raise UserError(f"data.source must lead to the folder of the files of {key}, not to the file {root.name}")
    # The digest of a folder is over what lies in it and is not hidden: nothing else is pinned.
    if Path(file).is_absolute() or any(part.startswith(".") for part in Path(file).parts):
        raise UserError(f"{key} = '{file}': must lie in data.source, and not be hidden: only that content is pinned")
    path = root / file
    if not path.is_file():
        there = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        shown = ", ".join(difflib.get_close_matches(file, there, n=3) or there[:20]) or "no files"
        raise UserError(f"{key} = '{file}': data.source has no such file; it has {shown}")
    return path


def _records(path: Path, file: str) -> Iterator[Located]:
    """The records of a file, each with its place; `file` is the name that messages give it."""
    match path.suffix.lower():
        case ".jsonl" | ".json":
            return _json(_text(path, file), file)
        case ".csv":
            return _delimited(_text(path, file), file, ",")
        case ".tsv":
            return _delimited(_text(path, file), file, "\t")
        case ".parquet":
            return _parquet(path, file)
        case suffix:
            raise UserError(f"{file}: '{suffix}' files cannot be read; use .jsonl, .json, .csv, .tsv or .parquet")


def _text(path: Path, file: str) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line} is not UTF-8 (byte {error.start}): save the file as UTF-8") from None


def _json(text: str, file: str) -> Iterator[Located]:
    """One object a line, or one array of objects; by hand: a table reader makes dates of date-like strings."""
    if text.lstrip().startswith("["):
        try:
            located = [(f"{file}, item {number}", item) for number, item in enumerate(json.loads(text), start=1)]
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}") from None
    else:
        located = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    located.append((f"{file}:{number}", json.loads(line)))
                except ValueError as error:
                    raise UserError(f"{file}:{number} is not a line of JSON: {error}") from None
    for where, item in located:
        if not isinstance(item, dict):
            raise UserError(f"{where}: must be an object with the columns as keys, not {type(item).__name__}")
        yield where, item


def _delimited(text: str, file: str, delimiter: str) -> Iterator[Located]:
    """Fields stay strings ("007"), quoted as in CSV; a row with a field too many or too few is an error, not padded."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{file}:1: column names repeat: {', '.join(header)}")
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise UserError(
                    f"{file}:{line}: {len(fields)} fields for {len(header)} columns; quote what holds {delimiter!r}"
                )
            if fields:
                yield f"{file}:{line}", dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{line}: {error}") from None


def _parquet(path: Path, file: str) -> Iterator[Located]:
    import datasets

    datasets.disable_progress_bars()
    with TemporaryDirectory(prefix="lora-repro-") as cache:  # a result must not rest on an earlier reading
        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # whatever Arrow raises, `datasets` wraps
            raise UserError(f"{file} is not Parquet: {error.__cause__ or error}") from None
        for number, record in enumerate(table, start=1):
            yield f"{file}, row {number}", record


# From records to examples


def _papers(_: params.Data, __: str, located: Iterable[Located]) -> list[Example]:
    """ACLSum: of each paper the abstract, and one summary for each of three aspects."""
    rows = []
    for where, paper in located:
        name, abstract, summary = paper.get("id"), _in(paper.get("sentences"), "abstract"), paper.get("summary")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: id must be a string; is this ACLSum's format? Else use data.format: table")
        if not isinstance(abstract, list) or not all(isinstance(sentence, str) for sentence in abstract):
            raise UserError(f"{where}: sentences.abstract must be a list of strings")
        source = _string(" ".join(abstract), f"{where}: sentences.abstract")
        for aspect in ASPECTS:
            target = _string(_in(summary, aspect), f"{where}: summary.{aspect}")
            rows.append(Example(f"{name}/{aspect}", name, aspect, source, target, "".join(abstract[:1]).strip()))
    return rows


def _in(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _table(data: params.Data, split: str, located: Iterable[Located]) -> list[Example]:
    """Rows by column names. Without ids they are numbered from 1; without groups, equal sources share one."""
    columns = data.columns
    assert columns is not None
    found = list(located)
    _check_columns(columns, found, getattr(data.files, split))
    first_with: dict[str, str] = {}
    rows = []
    for number, (where, record) in enumerate(found, start=1):
        source, target = (
            _string(record.get(column), f"{where}: {column}") for column in (columns.source, columns.target)
        )
        name = f"{split}-{number}" if columns.id is None else _name(record, columns.id, where)
        group = first_with.setdefault(source, name) if columns.group is None else _name(record, columns.group, where)
        aspect = "default" if columns.aspect is None else _name(record, columns.aspect, where)
        rows.append(Example(name, group, aspect, source, target, lead(source)))
    return rows


def _check_columns(columns: params.Columns, found: Sequence[Located], file: str) -> None:
    there = list(dict.fromkeys(column for _, record in found for column in record))
    problems = []
    for role, column in columns.model_dump().items():
        if found and column is not None and column not in there:
            close = difflib.get_close_matches(column, there, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"data.columns.{role} = '{column}': no such column{hint}")
    if problems:
        raise listing(problems, f"{file} has the columns {', '.join(there)}")


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
            f"{where} = {reprlib.repr(value)}: holds half of a surrogate pair, which is no character"
        ) from None
    return value.strip()


def _name(record: Record, column: str, where: str) -> str:
    """An id, a group or an aspect: a string, or an integer in digits."""
    value = record.get(column)
    name = str(value) if type(value) is int else _string(value, f"{where}: {column}")
    if not name:
        raise UserError(f"{where}: {column} is empty: fill it, or set the column to null in data.columns")
    return name


def _limit(rows: list[Example], limit: int | None, split: str) -> list[Example]:
    """The groups that fit into `limit` rows, in the order of the file up to the first that does not: none is split."""
    if limit is None:
        return rows
    sizes = Counter(row.group for row in rows)  # in the order of first appearance
    total = 0

    def fits(group: str) -> bool:
        nonlocal total
        total += sizes[group]
        return total <= limit

    kept = set(takewhile(fits, sizes))
    if not kept:
        first = rows[0].group
        raise UserError(
            f"data.limits.{split} = {limit}: the first group, {first}, has {sizes[first]} rows; allow as many"
        )
    return [row for row in rows if row.group in kept]


# Cleaning


def _clean(split: Split) -> None:
    seen: set[tuple[str, str, str]] = set()

    def fault(row: Example) -> str | None:
        if not row.source:
            return "empty source"
        if not row.target:
            return "empty target"
        content = (row.source, row.aspect, row.target)
        if content in seen:
            return "duplicate"
        seen.add(content)
        return None

    split.drop(fault)


class Overlap:
    """Finds which texts are, exactly or nearly, among given ones.

    Exactly: equal but for case and white space. Nearly: a share of at least `threshold` of the text's distinct 8-word
    shingles lies in a single one of the given; words are runs of letters and digits, without case. A text of fewer than
    8 words, or in a script without spaces, has no shingle to share and is compared exactly only.

    Shingles are 64-bit hashes that depend on the words alone. Memory: 12 bytes a shingle of the given texts; time: a
    binary search a shingle of the other.
    """

    def __init__(self, texts: Iterable[str], threshold: float) -> None:
        self.threshold = threshold
        self.words: dict[str, int] = {}
        unique = list(dict.fromkeys(texts))
        self.exact = {_plain(text) for text in unique}
        hashes = [self._shingles(text) for text in unique]
        owners = np.repeat(np.arange(len(unique), dtype=np.int32), [len(some) for some in hashes])
        joined = np.concatenate([np.empty(0, np.uint64), *hashes])
        order = np.argsort(joined, kind="stable")
        self.hashes, self.owners = joined[order], owners[order]

    def kind(self, text: str) -> str | None:
        """ "exact", "near" or None."""
        if _plain(text) in self.exact:
            return "exact"
        shingles = self._shingles(text)
        start = np.searchsorted(self.hashes, shingles, side="left")
        end = np.searchsorted(self.hashes, shingles, side="right")
        if not len(shingles) or np.count_nonzero(end > start) / len(shingles) < self.threshold:
            return None
        owners = np.concatenate([self.owners[a:b] for a, b in zip(start, end, strict=True) if b > a])
        return "near" if np.bincount(owners).max() / len(shingles) >= self.threshold else None

    def _shingles(self, text: str) -> NDArray[np.uint64]:
        words = re.findall(r"\w+", text.casefold())
        if len(words) < SHINGLE_WORDS:
            return np.empty(0, np.uint64)
        hashes = np.fromiter(map(self._word, words), np.uint64, len(words))
        rolled = np.zeros(len(words) - SHINGLE_WORDS + 1, np.uint64)
        for offset in range(SHINGLE_WORDS):  # a polynomial in an odd number, modulo 2**64
            rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(rolled)]
        return np.unique(rolled)

    def _word(self, word: str) -> int:
        # Not hash(): it differs between processes.
        if (known := self.words.get(word)) is None:
            known = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
            self.words[word] = known
        return known


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _drop_leaks(splits: Mapping[str, Split], threshold: float) -> dict[str, dict[str, int]]:
    """Drop from train what validation or test holds, and from validation what test holds; count rows for each pair.

    A training row that both hold is counted in both pairs, and dropped for test.
    """
    pairs = [("train", "test"), ("train", "validation"), ("validation", "test")]
    held_out = {name: Overlap((row.source for row in splits[name].rows), threshold) for name in ("validation", "test")}
    found: dict[tuple[str, str], dict[str, str | None]] = {}
    with progress.bar("checking overlap", sum(len(splits[suspect].rows) for suspect, _ in pairs), "rows") as advance:
        for suspect, other in pairs:
            kinds = found[suspect, other] = {}
            for row in splits[suspect].rows:
                if row.source not in kinds:
                    kinds[row.source] = held_out[other].kind(row.source)
                advance(1)
    counts = {}
    for suspect, other in pairs:
        tally = Counter(found[suspect, other][row.source] for row in splits[suspect].rows)
        counts[f"{suspect} in {other}"] = {"exact": tally["exact"], "near": tally["near"]}

    def leak(row: Example, suspect: str) -> str | None:
        return next((f"overlaps {b}" for a, b in pairs if a == suspect and found[a, b][row.source]), None)

    for suspect in ("train", "validation"):
        splits[suspect].drop(partial(leak, suspect=suspect))
    return counts


def _judge(splits: Mapping[str, Split], data: params.Data) -> None:
    train = splits["train"]
    if train.dropped_rows / train.read > data.max_dropped_share:
        problems = [
            f"{len(ids)} {why}, such as {', '.join(ids[:EXAMPLES_SHOWN])}" for why, ids in sorted(train.dropped.items())
        ]
        raise listing(
            [*problems, "mend the data, or raise data.max_dropped_share if these losses are meant"],
            f"{train.dropped_rows} of {train.read} training rows are unusable, more than the share "
            f"data.max_dropped_share = {data.max_dropped_share}",
        )
    for split in splits.values():
        if not split.rows:
            raise UserError(f"no row of {split.name} is left: {split.reasons()}; mend data.files.{split.name}")


# The card


def _describe(split: Split) -> dict[str, Any]:
    return {
        "read": split.read,
        "rows": len(split.rows),
        "groups": len({row.group for row in split.rows}),
        "aspects": Counter(row.aspect for row in split.rows),
        "source_words": _lengths(row.source for row in split.rows),
        "target_words": _lengths(row.target for row in split.rows),
        "dropped": {why: {"rows": len(ids), "examples": ids[:EXAMPLES_SHOWN]} for why, ids in split.dropped.items()},
    }


def _lengths(texts: Iterable[str]) -> dict[str, float]:
    """Words between white space."""
    words = [len(text.split()) for text in texts]
    return {"min": min(words), "median": median(words), "max": max(words)}
