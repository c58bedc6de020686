"""The examples: read from the sources, cleaned, freed of leaks, and written as three splits with a card.

One row of `out/data/train.jsonl`, made from ACLSum's line for a paper (`format: aclsum`; three such rows a paper):

    {"id": "2021.eacl-main.84/approach", "group": "2021.eacl-main.84", "aspect": "approach",
     "source": "Identifying named entities in written text is ... in multiple languages .",
     "target": "They propose an experimental setup where systems are evaluated in an online fashion ...",
     "lead": "Identifying named entities in written text is an essential component ...",
     "references": ["They propose an experimental setup ..."], "history": []}

`format: table` takes source and target from columns of files that `pipeline.sources.tables` reads, `format: chat`
from the
messages of conversations. The order of what follows: rows that the parameters do not want are filtered out, groups of
the training files are held out for validation and test, references of one source are merged, limits cut, and what is
then unusable or leaked is dropped. All of it is counted with its reason in `card.json`. A row of train whose source is,
or nearly is, one of validation or test is dropped as leaked, and so is one of validation in test: n-gram containment,
as in the contamination studies of large models, over 8 words.
"""

import difflib
import hashlib
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import params, paths, progress, records
from pipeline.core.errors import LONGEST_LABEL, UserError, label_fault, listing
from pipeline.core.records import Example
from pipeline.core.text import MAX_FOREIGN_SHARE, foreign_share, lead, words
from pipeline.score import significance
from pipeline.sources import tables
from pipeline.sources.source import mounted
from pipeline.sources.tables import ABSENT, File, Located, Record

ASPECTS = ("challenge", "approach", "outcome")
SHINGLE_WORDS = 8
EXAMPLES_SHOWN = 5
LONGEST_ID = 1000
"""Characters of an id or a group, which may be an address; an aspect has fewer, since charts show it."""
MOST_ASPECTS = 500
"""Each is a row of the report with intervals of its own; no chart of 2,000 can be drawn."""
# What transcripts call who speaks: {role, content} of the chat templates, {from, value} of ShareGPT.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass
class Split:
    """A split on its way: the rows still in, and the ids of those that left it, by reason.

    `filtered` are those that the parameters do not want, `dropped` those that cannot be used. `read` counts the rows
    that came through filters and limits, of which `held_out` are from the training files; `merged` those that became
    references of another.
    """

    name: str
    files: list[str]
    rows: list[Example]
    read: int = 0
    held_out: int = 0
    merged: int = 0
    filtered: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def filter(self, reason: Callable[[Example], str | None]) -> None:
        """Take out the rows for which `reason` has a name, as unwanted."""
        self._remove(reason, self.filtered)

    def drop(self, reason: Callable[[Example], str | None]) -> None:
        """Take out the rows for which `reason` has a name, as unusable."""
        self._remove(reason, self.dropped)

    def _remove(self, reason: Callable[[Example], str | None], gone: dict[str, list[str]]) -> None:
        kept = []
        for row in self.rows:
            if why := reason(row):
                gone.setdefault(why, []).append(row.id)
            else:
                kept.append(row)
        self.rows = kept

    @property
    def dropped_rows(self) -> int:
        return sum(map(len, self.dropped.values()))

    def summary(self) -> str:
        """What a person is told about the split, in one line."""
        groups = len({row.group for row in self.rows})
        parts = [f"{self.name}: {len(self.rows)} rows in {groups} groups"]
        parts += [f"{self.dropped_rows} dropped" + (f" ({_told(self.dropped)})" if self.dropped else "")]
        parts += [f"filtered {_told(self.filtered)}"] if self.filtered else []
        parts += [f"{self.merged} merged as references"] if self.merged else []
        parts += [f"{self.held_out} held out of the training files"] if self.held_out else []
        return ", ".join(parts)


def _told(gone: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{len(ids)} {why}" for why, ids in sorted(gone.items()))


def prepare(data: params.Data) -> None:
    """Write `out/data/<split>.jsonl` and `out/data/card.json`.

    UserError, with nothing written, for a source that cannot be read, ids that repeat, a split left empty, or more than
    `data.max_dropped_share` of the training rows dropped.
    """
    with mounted(data.pinned, kind="dataset", key="data") as places:
        there = _files(places, data)
        splits = {name: _read(data, there, name) for name in paths.SPLITS}
    for split in splits.values():
        split.filter(partial(_unwanted, data=data))
    _hold_out(splits, data.holdout)
    for split in splits.values():
        _refuse_repeated_ids(split.rows, f"the {split.name} split, with what it was given of the training files,")
        split.rows = _grouped(split.rows)
        if data.merge_references and split.name != "train":
            _merge(split)
        split.rows = _limit(split.rows, getattr(data.limits, split.name), split.name)
        split.read = len(split.rows)
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
        progress.say(split.summary())
    foreign = foreign_share(text for row in splits["test"].rows for text in row.references)
    if foreign > MAX_FOREIGN_SHARE:
        progress.say(
            f"{foreign:.0%} of the test references' letters lie outside a-z: ROUGE then needs "
            "evaluate.rouge_tokenizer: unicode"
        )
    rows = len(splits["test"].rows)
    progress.say(
        f"{rows} test rows are likely to show a difference of {significance.planned(rows):.1f} points in ROUGE-1, if "
        f"they are independent and vary as in the default experiment; half of that takes {4 * rows:,}"
    )


# Reading


def _files(places: Mapping[str, Path], data: params.Data) -> dict[str, File]:
    several = isinstance(data.source, list)
    if not several and (single := [path.name for path in places.values() if path.is_file()]):
        raise UserError(
            f"data.source must lead to the folder of the files of data.files, not to the file {single[0]}; in a list "
            "of sources a file may stand alone"
        )
    return tables.files(places, several)


def _read(data: params.Data, there: Mapping[str, File], split: str) -> Split:
    """The rows of a split's own files; none where it has no files but a share of the training data."""
    wanted: str | list[str] | None = getattr(data.files, split)
    if wanted is None:
        return Split(split, [], [])
    files = tables.select(there, wanted, f"data.files.{split}")
    to_examples = {"aclsum": _papers, "table": _table, "chat": _conversations}[data.format]
    rows: list[Example] = []
    for file in files:
        if fault := label_fault(file.name, LONGEST_ID):
            raise UserError(f"data.files.{split}: the name of the file {reprlib.repr(file.name)} {fault}")
        rows += to_examples(data, split, list(tables.records(file, data.encoding)), file, len(rows))
    names = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    if not rows:
        raise UserError(f"data.files.{split}: {names} holds no rows")
    _refuse_repeated_ids(rows, names)
    return Split(split, [file.name for file in files], rows)


def _refuse_repeated_ids(rows: Iterable[Example], where: str) -> None:
    if repeated := [name for name, times in Counter(row.id for row in rows).items() if times > 1]:
        raise UserError(
            f"{where}: ids repeat: {', '.join(repeated[:EXAMPLES_SHOWN])} ({len(repeated)} in all); make each id "
            "unique (in a table, data.columns.id: null numbers the rows)"
        )


# From records to examples. Each function gets the records of one file, and how many rows came before them.


def _papers(_: params.Data, __: str, found: Sequence[Located], ___: File, ____: int) -> list[Example]:
    """ACLSum: of each paper the abstract, and one summary for each of three aspects."""
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


def _table(data: params.Data, split: str, found: Sequence[Located], file: File, before: int) -> list[Example]:
    """Rows by column names. Without ids they are numbered from 1; without groups, the group is left empty."""
    columns = data.columns
    assert columns is not None
    _check_columns(columns, found, file.name)
    rows = []
    for number, (where, record) in enumerate(found, start=before + 1):
        source = _string(_cell(record, columns.source), f"{where}: {columns.source}")
        targets = _targets(_cell(record, columns.target), f"{where}: {columns.target}")
        name = f"{split}-{number}" if columns.id is None else _label(record, columns.id, where)
        group = "" if columns.group is None else _label(record, columns.group, where)
        aspect = "default" if columns.aspect is None else _label(record, columns.aspect, where, LONGEST_LABEL)
        rows.append(Example(name, group, aspect, source, targets[0], lead(source), targets))
    return rows


def _check_columns(columns: params.Columns, found: Sequence[Located], file: str) -> None:
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
            problems.append("of conversations data.format: chat makes source and target by itself")
        raise listing(problems, f"{file} has the columns {', '.join(map(repr, there))}")


def _cell(record: Record, column: str) -> Any:
    """What a record has in a column; a missing cell is empty, as null is."""
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
            f"{where} = {reprlib.repr(value)}: holds half of a surrogate pair, which is no character"
        ) from None
    return value.strip()


def _targets(value: Any, where: str) -> list[str]:
    """The answers that are right, at least one: of a list those that are not empty, each once."""
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


def _conversations(_: params.Data, split: str, found: Sequence[Located], __: File, before: int) -> list[Example]:
    """Of each conversation its last answer, to the message before it; what came earlier is the history.

    Where one record of a file has an id or a group, all must.
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
    """The messages, at least two, the last two of which are a user's and the assistant's."""
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


def _context(row: Example) -> str:
    """What the answer rests on: the source, after what user and assistant said before it.

    A system message is no part of it: many conversations share one, and are not alike for that.
    """
    return "\n".join([*(turn["content"] for turn in row.history if turn["role"] != "system"), row.source])


# Choosing


def _unwanted(row: Example, data: params.Data) -> str | None:
    """Why the parameters do not want a row; one without a source or a target is not wanted out, but unusable."""
    lengths = len(words(row.source)), len(words(row.target))
    if not all(lengths):
        return None
    if min(lengths) < data.words.min:
        return "too few words"
    if data.words.max is not None and max(lengths) > data.words.max:
        return "too many words"
    if data.drop_copies and row.source.split() == row.target.split():
        return "target equals source"
    return None


def _hold_out(splits: Mapping[str, Split], holdout: params.Holdout) -> None:
    """Move rows of the training files to test and validation, where their places in [0, 1) are lowest and highest."""
    train = splits["train"]
    sides: dict[str, list[Example]] = {name: [] for name in splits}
    for row, place in zip(train.rows, _places(train.rows), strict=True):
        side = "test" if place < holdout.test else "validation" if place >= 1 - holdout.validation else "train"
        sides[side].append(row)
    train.rows = sides["train"]
    for name in ("validation", "test"):
        splits[name].rows = [*splits[name].rows, *sides[name]]
        splits[name].held_out = len(sides[name])


def _places(rows: Sequence[Example]) -> list[float]:
    """A number in [0, 1) for each row, the same for all of a group and all with one source, case and space aside.

    It depends on the sources of these rows alone: neither on their order nor on other rows.
    """
    parents: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = node = parents[parent]
        return node

    nodes, digests = [], []
    for row in rows:
        text = _plain(_context(row))
        node = ("group", row.group) if row.group else ("text", text)
        if text:  # empty sources have nothing in common
            parents[root(("text", text))] = root(node)
        nodes.append(node)
        digests.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
    least: dict[tuple[str, str], bytes] = {}
    for node, digest in zip(nodes, digests, strict=True):
        least[root(node)] = min(digest, least.get(root(node), digest))
    # Which digest is the least is decided by its first half: the second does not depend on how many there were.
    return [(int.from_bytes(least[root(node)][8:]) >> 11) / 2**53 for node in nodes]


def _grouped(rows: Iterable[Example]) -> list[Example]:
    """Rows without a group are given one with those of the same source, named after the first."""
    first_with: dict[str, str] = {}
    return [row if row.group else replace(row, group=first_with.setdefault(_context(row), row.id)) for row in rows]


def _merge(split: Split) -> None:
    """One example for all rows with one source and aspect: the first, with the targets of all as references."""
    alike: dict[tuple[str, ...], list[Example]] = {}
    for row in split.rows:
        usable = row.source and row.target
        key = (row.source, row.aspect, repr(row.history)) if usable else (row.id,)
        alike.setdefault(key, []).append(row)
    split.merged = len(split.rows) - len(alike)
    split.rows = [
        replace(rows[0], references=list(dict.fromkeys(text for row in rows for text in row.references)))
        for rows in alike.values()
    ]


def _limit(rows: list[Example], limit: int | None, split: str) -> list[Example]:
    """The groups that fit into `limit` rows, in the order of the file up to the first that does not: none is split."""
    if limit is None or not rows:
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
    seen: set[tuple[str, ...]] = set()

    def fault(row: Example) -> str | None:
        if not row.source:
            return "empty source"
        if not row.target:
            return "empty target"
        content = (row.source, row.aspect, row.target, repr(row.history))
        if content in seen:
            return "duplicate"
        seen.add(content)
        return None

    split.drop(fault)


class Overlap:
    """Finds which texts are, exactly or nearly, among given ones.

    Exactly: equal but for case and white space. Nearly: a share of at least `threshold` of the text's distinct 8-word
    shingles lies in a single one of the given; words are runs of letters and digits, without case; in scripts without
    spaces, single characters. A text of fewer than 8 words has no shingle to share and is compared exactly only.

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
        runs = words(" ".join(re.findall(r"\w+", text.casefold())))
        if len(runs) < SHINGLE_WORDS:
            return np.empty(0, np.uint64)
        hashes = np.fromiter(map(self._word, runs), np.uint64, len(runs))
        rolled = np.zeros(len(runs) - SHINGLE_WORDS + 1, np.uint64)
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
    contexts = {name: [_context(row) for row in split.rows] for name, split in splits.items()}
    held_out = {name: Overlap(contexts[name], threshold) for name in ("validation", "test")}
    found: dict[tuple[str, str], dict[str, str | None]] = {}
    with progress.bar("checking overlap", sum(len(splits[suspect].rows) for suspect, _ in pairs), "rows") as advance:
        for suspect, other in pairs:
            kinds = found[suspect, other] = {}
            for text in contexts[suspect]:
                if text not in kinds:
                    kinds[text] = held_out[other].kind(text)
                advance(1)
    counts = {}
    for suspect, other in pairs:
        tally = Counter(found[suspect, other][text] for text in contexts[suspect])
        counts[f"{suspect} in {other}"] = {"exact": tally["exact"], "near": tally["near"]}

    def leak(row: Example, suspect: str) -> str | None:
        return next((f"overlaps {b}" for a, b in pairs if a == suspect and found[a, b][_context(row)]), None)

    for suspect in ("train", "validation"):
        splits[suspect].drop(partial(leak, suspect=suspect))
    return counts


def _judge(splits: Mapping[str, Split], data: params.Data) -> None:
    train = splits["train"]
    if train.read and train.dropped_rows / train.read > data.max_dropped_share:
        problems = [
            f"{len(ids)} {why}, such as {', '.join(ids[:EXAMPLES_SHOWN])}" for why, ids in sorted(train.dropped.items())
        ]
        raise listing(
            [*problems, "mend the data, or raise data.max_dropped_share if these losses are meant"],
            f"{train.dropped_rows} of {train.read} training rows are unusable, more than the share "
            f"data.max_dropped_share = {data.max_dropped_share}",
        )
    aspects = Counter(row.aspect for row in splits["test"].rows)
    if len(aspects) > MOST_ASPECTS:
        raise UserError(
            f"data.columns.aspect: the test split has {len(aspects):,} aspects, such as "
            f"{', '.join(list(aspects)[:EXAMPLES_SHOWN])}, more than {MOST_ASPECTS}: an aspect is a kind of task, "
            "which many rows share"
        )
    for split in splits.values():
        if not split.rows:
            gone = _told(split.dropped | split.filtered) or "none was held out of the training files"
            knob = "files" if split.files else "holdout"
            raise UserError(f"no row of {split.name} is left: {gone}; mend data.{knob}.{split.name}")


# The card


def _describe(split: Split) -> dict[str, Any]:
    return {
        "read": split.read,
        "rows": len(split.rows),
        "groups": len({row.group for row in split.rows}),
        "aspects": Counter(row.aspect for row in split.rows),
        "source_words": _lengths(row.source for row in split.rows),
        "target_words": _lengths(row.target for row in split.rows),
        "files": split.files,
        "held_out": split.held_out,
        "merged": split.merged,
        "filtered": _shown(split.filtered),
        "dropped": _shown(split.dropped),
    }


def _shown(gone: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {why: {"rows": len(ids), "examples": ids[:EXAMPLES_SHOWN]} for why, ids in gone.items()}


def _lengths(texts: Iterable[str]) -> dict[str, float]:
    """Words as of `sentences.words`."""
    counts = [len(words(text)) for text in texts]
    return {"min": min(counts), "median": median(counts), "max": max(counts)}
