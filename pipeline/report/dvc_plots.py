"""The three tables in `reports/plots/` that `dvc plots show` and `dvc plots diff` draw.

`dvc.yaml` declares them, each with its own template in `.dvc/plots/`: DVC's bars would stack base on tuned, without
intervals. All seeds share one table, since DVC wants a plot's files named one by one and refuses folders.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import paths, records
from pipeline.core.text import words
from pipeline.report import csv_tables
from pipeline.report.curves import Curve
from pipeline.score.comparison import Comparison
from pipeline.score.metrics import LABELS
from pipeline.score.side_by_side import Row

TableRow = dict[str, Any]


def write(comparison: Comparison, rows: Sequence[Row], curves: Sequence[Curve]) -> None:
    """Write the tables. Equal results give equal bytes."""
    _write(paths.PLOT_INTERVALS, _intervals(comparison))
    _write(paths.PLOT_CURVES, _curves(curves))
    _write(paths.PLOT_LENGTHS, _lengths(rows))


def _intervals(comparison: Comparison) -> Iterator[TableRow]:
    """Each metric's scores and difference, with the interval that decides the verdict."""
    for name, result in comparison.results.items():
        for what, one in (("base", result.base), ("tuned", result.tuned), ("tuned − base", result.deciding)):
            yield {"metric": LABELS[name], "what": what, "value": one.value, "low": one.low, "high": one.high}


def _curves(curves: Sequence[Curve]) -> Iterator[TableRow]:
    """The loss of every point of the training curves and of every validation."""
    for curve in curves:
        for step, loss in curve.training:
            yield {"seed": curve.seed, "split": "training", "step": step, "loss": loss}
        for one in curve.validation:
            yield {"seed": curve.seed, "split": "validation", "step": one.step, "loss": one.loss}


def _lengths(rows: Sequence[Row]) -> Iterator[TableRow]:
    """The share of texts of each length. The outputs of all seeds count together."""
    lengths = {
        "references": [len(words(row.example.target)) for row in rows],
        "base": [row.base.words for row in rows],
        "tuned": [one.words for row in rows for one in row.tuned],
    }
    for name, some in lengths.items():
        for length, count in sorted(Counter(some).items()):
            yield {"texts": name, "words": length, "share": count / len(some)}


def _write(path: Path, rows: Iterable[TableRow]) -> None:
    records.write_text(path, csv_tables.text(list(rows)))
