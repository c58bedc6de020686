"""The comparison computed, and written as people, DVC and a paper's appendix read it: the body of stage `compare`."""

from collections.abc import Sequence

from pipeline.core import params
from pipeline.report import csv_tables, dvc_plots, words
from pipeline.score import compare, guard_record, side_by_side


def write(seeds: Sequence[int], evaluate: params.Evaluate, settings: params.Compare) -> None:
    """Write `paths.METRICS`, the tables of `dvc plots`, and `paths.COMPARISON`.

    `seeds` are those of the adapters that were scored. UserError where predictions or scores are missing or are not of
    one test split; equal scores give equal bytes.
    """
    comparison = compare.compare(list(seeds), evaluate, settings)
    measured = guard_record.measured(list(seeds))
    words.write(comparison, measured)
    dvc_plots.write(comparison, seeds)
    csv_tables.write(comparison, measured, side_by_side.read(seeds, evaluate.metrics), seeds)
