"""The files of a comparison for people, `dvc metrics`, `dvc plots` and a paper's appendix; all except the page."""

from collections.abc import Sequence

from pipeline.report import csv_tables, curves, dvc_plots, wording
from pipeline.score import side_by_side
from pipeline.score.comparison import Comparison


def write(seeds: Sequence[int]) -> None:
    """Write `paths.METRICS`, the tables of `dvc plots`, and the files in `paths.COMPARISON`, from the comparison there.

    `seeds` are those of the compared adapters. Equal outputs give equal bytes. UserError if an output is missing.
    """
    comparison, rows, losses = Comparison.read(), side_by_side.read(seeds), curves.read(seeds)
    wording.write(comparison)
    dvc_plots.write(comparison, rows, losses)
    csv_tables.write(comparison, rows, losses)
