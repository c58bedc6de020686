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

from pipeline.core import contracts, params, paths, progress, records
from pipeline.core.contracts import DataCard, Gone, Overlap, SharedGroups, Words
from pipeline.core.errors import UserError, label_fault, listing
from pipeline.core.records import Example
from pipeline.core.text import MAX_FOREIGN_SHARE, foreign_share, not_nfc, unspaced_share, words
from pipeline.prepare import chats, formats, leaks
from pipeline.prepare.cells import LONGEST_ID
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
from pipeline.sources.account import Account, listed
from pipeline.sources.source import mounted
from pipeline.sources.tables import File

EXAMPLES_SHOWN = 5
MOST_ASPECTS = 500
"""Each is a row of the report with its own intervals; a chart of 2,000 cannot be drawn."""


def write_splits(data: params.Data) -> None:
    """Write `out/data/<split>.jsonl` and `out/data/card.json`.

    UserError, with nothing written, for what `read_splits` and `clean_splits` refuse.
    """
    splits = read_splits(data)
    overlap = clean_splits(splits, data)
    for split in splits.values():
        records.write_rows(paths.split(split.name), split.rows)
    described = {name: _describe(split) for name, split in splits.items()}
    found = {pair: Overlap(**counts) for pair, counts in overlap.items()}
    shared = shared_groups(splits, EXAMPLES_SHOWN)
    contracts.write(paths.DATA_CARD, DataCard(data.source, data.sha256, described, found, shared))
    _say_what_was_made(splits, shared)


def read_splits(data: params.Data) -> dict[str, Split]:
    """The rows of the files, by split. UserError for a source that cannot be read, and for ids that repeat."""
    with mounted(data.pinned, kind="dataset", key="data") as places:
        there = _files(places, data)
        return {name: _read(data, there, name) for name in paths.SPLITS}


def clean_splits(splits: dict[str, Split], data: params.Data) -> dict[str, dict[str, int]]:
    """Take every step from the rows of the files to those that are written, in place.

    Returns how many rows of one split stand in another (`leaks.drop`). UserError for ids that repeat, a split left
    empty, or more than `data.max_dropped_share` of the training rows dropped.
    """
    for split in splits.values():
        filter_unwanted(split, data)
    hold_out(splits, data.holdout)
    for split in splits.values():
        _refuse_repeated_ids(split.rows, f"the {split.name} split, with its share of the training files,")
        split.declared = {row.id for row in split.rows if row.group}
        split.rows = grouped(split.rows)
        if data.merge_references and split.name != "train":
            merge(split)
        through = len(split.rows)
        limit(split, getattr(data.limits, split.name))
        split.beyond_limit = through - len(split.rows)
        split.read = len(split.rows) + split.dropped_rows
        clean(split)
    overlap = leaks.drop(splits, data.overlap_threshold)
    _require_enough(splits, data)
    return overlap


def _say_what_was_made(splits: Mapping[str, Split], shared: Sequence[SharedGroups]) -> None:
    for split in splits.values():
        progress.say(split.summary())
        told = split.account.lines()
        if split.beyond_limit:
            told = [f"rows beyond data.limits.{split.name}: {split.beyond_limit:,}", *told]
        for line in told:
            progress.say(f"{split.name}: {line}")
    for one in shared:
        more = ", ..." if one.shared > len(one.examples) else ""
        progress.say(f"{one.counted}: {', '.join(one.examples)}{more}; data.holdout keeps a group in one split")
    test = splits["test"].rows
    if apart := not_nfc(row.references for row in test):
        progress.say(
            f"{apart:,} of {len(test):,} test rows have references that are not in the normal form NFC: with "
            "evaluate.normal_form none, metrics take é in two forms for two letters"
        )
    foreign = foreign_share(text for row in test for text in row.references)
    if foreign > MAX_FOREIGN_SHARE:
        progress.say(
            f"{foreign:.0%} of the test references' letters lie outside a-z: ROUGE then needs "
            "evaluate.rouge_tokenizer: unicode"
        )
    unspaced = unspaced_share(text for row in test for text in row.references)
    if unspaced > MAX_FOREIGN_SHARE:
        progress.say(
            f"{unspaced:.0%} of the test references' letters are in scripts without spaces between words: BLEU then "
            "needs evaluate.bleu_tokenizer zh, ja-mecab, char or flores200"
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
    account = Account()
    for file in files:
        if fault := label_fault(file.name, LONGEST_ID):
            raise UserError(f"data.files.{split}: the name of the file {reprlib.repr(file.name)} {fault}")
        rows += examples(data, split, file, len(rows) + account.dropped_records, account)
    names = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    if not rows and not account.dropped:
        left_out = f": left out are {listed(account.left_out)}" if account.left_out else ""
        raise UserError(f"data.files.{split}: {names} holds no rows{left_out}")
    _refuse_repeated_ids(rows, names)
    return Split(split, [file.name for file in files], rows, dropped=account.dropped, account=account)


def examples(data: params.Data, split: str, file: File, before: int, account: Account | None = None) -> list[Example]:
    """The rows of one file in `data.format`; `before`: how many records of the split came before it.

    `account` counts what is left out, dropped and changed.
    """
    counts = Account() if account is None else account
    found = list(tables.records(file, data.encoding, account=counts))
    if data.format == "aclsum":
        return formats.papers(found, counts)
    if data.format == "chat":
        return chats.conversations(found, split, before, counts)
    assert data.columns is not None
    return formats.table(found, data.columns, file.name, split, before, counts)


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


def _describe(split: Split) -> contracts.Split:
    account = split.account
    return contracts.Split(
        files=split.files,
        read=split.read,
        rows=len(split.rows),
        groups=len({row.group for row in split.rows}),
        aspects=Counter(row.aspect for row in split.rows),
        source_words=_lengths(row.source for row in split.rows),
        target_words=_lengths(row.target for row in split.rows),
        filtered=_shown(split.filtered),
        held_out=split.held_out,
        merged=split.merged,
        dropped=_shown(split.dropped),
        beyond_limit=split.beyond_limit or None,
        left_out=_counted(account.left_out),
        unused=_counted(account.unused),
        changed=_counted(account.changed),
        blank_lines=account.blank_lines or None,
    )


def _shown(gone: Mapping[str, Sequence[str]]) -> dict[str, Gone]:
    return {why: Gone(len(ids), list(ids[:EXAMPLES_SHOWN])) for why, ids in gone.items()}


def _counted(counts: Mapping[str, int]) -> dict[str, int] | None:
    """The counts that are not zero; None if all are."""
    return {name: count for name, count in counts.items() if count} or None


def _lengths(texts: Iterable[str]) -> Words:
    """Words as `pipeline.core.text.words` counts them."""
    counts = [len(words(text)) for text in texts]
    return Words(min(counts), median(counts), max(counts))
