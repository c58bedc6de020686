"""The examples: read from the sources, cleaned, freed of leaks, and written as three splits with a card.

The steps, in their order: rows that the parameters exclude are filtered out, groups of the training files are held out
for validation and test, references of one source are merged, limits cut, and unusable or leaked rows are dropped.
`card.json` counts all of it by reason.
"""

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.core import contracts, params, paths, progress, records
from pipeline.core.contracts import SharedGroups
from pipeline.core.errors import UserError, label_fault, listing
from pipeline.core.records import Example
from pipeline.core.text import MAX_FOREIGN_SHARE, foreign_share, not_nfc, words
from pipeline.prepare import formats, leaks
from pipeline.prepare.splits import (
    Split,
    clean,
    filter_unwanted,
    grouped,
    hold_out,
    limit,
    merge,
    reasons,
    shared_groups,
)
from pipeline.score import significance
from pipeline.sources import tables
from pipeline.sources.source import mounted
from pipeline.sources.tables import File

EXAMPLES_SHOWN = 5
MOST_ASPECTS = 500
"""Each is a row of the report with its own intervals; a chart of 2,000 cannot be drawn."""


def write_splits(data: params.Data) -> None:
    """Write `out/data/<split>.jsonl` and `out/data/card.json`.

    UserError, with nothing written, for a source that cannot be read, ids that repeat, a split left empty, a test
    split of one group, or more than `data.max_dropped_share` of the training rows dropped.
    """
    with mounted(data.pinned, kind="dataset", key="data") as places:
        there = _files(places, data)
        splits = {name: _read(data, there, name) for name in paths.SPLITS}
    for split in splits.values():
        filter_unwanted(split, data)
    hold_out(splits, data.holdout)
    for split in splits.values():
        _refuse_repeated_ids(split.rows, f"the {split.name} split, with its share of the training files,")
        split.declared = {row.id for row in split.rows if row.group}
        split.rows = grouped(split.rows)
        if data.merge_references and split.name != "train":
            merge(split)
        limit(split, getattr(data.limits, split.name))
        split.read = len(split.rows)
        clean(split)
    overlap = leaks.drop(splits, data.overlap_threshold)
    _require_enough(splits, data)

    for split in splits.values():
        records.write_rows(paths.split(split.name), split.rows)
    card = {name: _describe(split) for name, split in splits.items()}
    shared = shared_groups(splits, EXAMPLES_SHOWN)
    found = {"overlap": overlap, "shared_groups": contracts.content(shared)}
    records.write_json(paths.DATA_CARD, {"source": data.source, "sha256": data.sha256, "splits": card, **found})
    _say_what_was_made(splits, shared)


def _say_what_was_made(splits: Mapping[str, Split], shared: Sequence[SharedGroups]) -> None:
    for split in splits.values():
        progress.say(split.summary())
    for one in shared:
        more = ", ..." if one.shared > len(one.examples) else ""
        progress.say(f"{one.counted}: {', '.join(one.examples)}{more}; data.holdout keeps a group in one split")
    test = splits["test"].rows
    if apart := not_nfc(row.references for row in test):
        progress.say(
            f"{apart:,} of {len(test):,} test rows have references that are not in the normal form NFC: chrF, BLEU and "
            "evaluate.rouge_tokenizer: latin take é in two forms for two letters"
        )
    foreign = foreign_share(text for row in test for text in row.references)
    if foreign > MAX_FOREIGN_SHARE:
        progress.say(
            f"{foreign:.0%} of the test references' letters lie outside a-z: ROUGE then needs "
            "evaluate.rouge_tokenizer: unicode"
        )
    progress.say(
        f"{len(test)} test rows are likely to show a difference of {significance.planned(len(test)):.1f} points in "
        f"ROUGE-1, if they are independent and vary as in the default experiment; half of that takes {4 * len(test):,}"
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
    """The rows of a split's own files; none if it has a share of the training files instead."""
    wanted: str | list[str] | None = getattr(data.files, split)
    if wanted is None:
        return Split(split, [], [])
    files = tables.select(there, wanted, f"data.files.{split}")
    rows: list[Example] = []
    for file in files:
        if fault := label_fault(file.name, formats.LONGEST_ID):
            raise UserError(f"data.files.{split}: the name of the file {reprlib.repr(file.name)} {fault}")
        rows += examples(data, split, file, len(rows))
    names = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    if not rows:
        raise UserError(f"data.files.{split}: {names} holds no rows")
    _refuse_repeated_ids(rows, names)
    return Split(split, [file.name for file in files], rows)


def examples(data: params.Data, split: str, file: File, before: int) -> list[Example]:
    """The rows of one file in `data.format`; `before`: how many rows of the split came before it."""
    found = list(tables.records(file, data.encoding))
    if data.format == "aclsum":
        return formats.papers(found)
    if data.format == "chat":
        return formats.conversations(found, split, before)
    assert data.columns is not None
    return formats.table(found, data.columns, file.name, split, before)


def _refuse_repeated_ids(rows: Iterable[Example], where: str) -> None:
    if repeated := [name for name, times in Counter(row.id for row in rows).items() if times > 1]:
        raise UserError(
            f"{where}: ids repeat: {', '.join(repeated[:EXAMPLES_SHOWN])} ({len(repeated)} in all); make each id "
            "unique (in a table, data.columns.id: null numbers the rows)"
        )


def _require_enough(splits: Mapping[str, Split], data: params.Data) -> None:
    """UserError for too many dropped training rows, too many aspects, an empty split, and a single group of test."""
    train = splits["train"]
    if train.read and train.dropped_rows / train.read > data.max_dropped_share:
        problems = [
            f"{len(ids)} {why}, such as {', '.join(ids[:EXAMPLES_SHOWN])}" for why, ids in sorted(train.dropped.items())
        ]
        raise listing(
            [*problems, "correct the data, or raise data.max_dropped_share if these losses are meant"],
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
            gone = reasons(split.dropped | split.filtered) or "none was held out of the training files"
            knob = "files" if split.files else "holdout"
            raise UserError(f"no row of {split.name} is left: {gone}; correct data.{knob}.{split.name}")
    significance.require_groups(len({row.group for row in splits["test"].rows}))


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
    """Words as `pipeline.core.text.words` counts them."""
    counts = [len(words(text)) for text in texts]
    return {"min": min(counts), "median": median(counts), "max": max(counts)}
