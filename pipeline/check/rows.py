"""The data that is on this machine, made into rows as stage `prepare` does, and what other sections ask of them."""

import contextlib
import io

from pipeline import probes
from pipeline.check.report import Report
from pipeline.core import params
from pipeline.core.records import Example
from pipeline.model import prompt
from pipeline.prepare import prepare
from pipeline.prepare.splits import Split
from pipeline.score import evaluate
from pipeline.sources import source

MOST = 32 * 2**20
"""Bytes of sources that are read here: a second or two. Larger ones are left to their stages."""


def examine(draft: params.Draft, report: Report) -> None:
    """Check `data`, `prompt`, `evaluate` and `forget` against the data and the general text, where they are here."""
    data, general = draft.get(params.Data), draft.get(params.Forget)
    if data is not None and _readable(data.pinned, "data", "prepare", report):
        with report.part():
            splits = prepare.read_splits(data)
            report.seen.append(f"{sum(len(split.rows) for split in splits.values()):,} rows of data")
            # The bar of the leak guard is for a stage.
            with report.part(), contextlib.redirect_stdout(io.StringIO()):
                prepare.clean_splits(splits, data)
            _against_prompt(draft.get(params.Prompt), splits, report)
            if (settings := draft.get(params.Evaluate)) is not None:
                with report.part():
                    evaluate.require_script([row.references for row in splits[settings.split].rows], settings)
    for probe in general.probes if general is not None else []:
        if _readable([(probe.source, probe.sha256)], probe.at, "forget", report):
            with report.part():
                read = probes.conversations if probe.style == "chat" else probes.texts
                kind = "conversations" if probe.style == "chat" else "texts"
                report.seen.append(f"{len(read(probe)):,} {kind} of {probe.at}")


def _readable(pinned: list[tuple[str, str | None]], key: str, stage: str, report: Report) -> bool:
    """Whether sources are without a visible mistake, on this machine, and small enough to be read here."""
    before = len(report.problems)
    for name, sha256 in pinned:
        with report.part():
            source.check(name, sha256, key)
    if len(report.problems) > before:
        return False
    sizes = [source.size_here(name, sha256, key) for name, sha256 in pinned]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        report.left.append(f"{key}.source is not on this machine; stage {stage} downloads and checks it")
    elif sum(known) > MOST:
        report.left.append(f"{key}.source has {sum(known) / 2**20:,.0f} MiB; stage {stage} reads it")
    else:
        return True
    return False


def _against_prompt(given: params.Prompt | None, splits: dict[str, Split], report: Report) -> None:
    """Note rows that no prompt can be made of, whatever the model is."""
    if given is None:
        return
    first: dict[tuple[str, bool], Example] = {}  # the first row of an aspect, or with a history, tells of all
    for split in splits.values():
        for row in split.rows:
            first.setdefault((row.aspect, bool(row.history)), row)
    for row in first.values():
        with report.part():
            prompt.require_row(given, row)
