"""What `dvc plots show` and `dvc plots diff` draw: three small tables in `reports/plots/`, declared in `dvc.yaml`, each
with a template of its own in `.dvc/plots/`.

DVC's own bars stack base on tuned and know no intervals; and a plot names its files one by one (a folder is refused),
so it cannot follow `seeds`.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import paths, records
from pipeline.core import text as sentences
from pipeline.report import csv_tables as appendix
from pipeline.score.compare import Comparison
from pipeline.score.metrics import LABELS

POINTS = 400
"""A training curve has at most about so many points: those of a longer training are means over equal numbers of steps,
since these files are kept in git."""

Row = dict[str, Any]


def write(comparison: Comparison, seeds: Sequence[int]) -> None:
    """Write the tables; equal results give equal bytes."""
    _write(paths.PLOT_INTERVALS, _intervals(comparison))
    _write(paths.PLOT_CURVES, _curves(seeds))
    _write(paths.PLOT_LENGTHS, _lengths(seeds))


def _intervals(comparison: Comparison) -> Iterator[Row]:
    """Each metric's scores and difference; that with the interval which the verdict rests on."""
    for name, result in comparison.results.items():
        for what, one in (("base", result.base), ("tuned", result.tuned), ("tuned − base", result.deciding)):
            yield {"metric": LABELS[name], "what": what, "value": one.value, "low": one.low, "high": one.high}


def _curves(seeds: Sequence[int]) -> Iterator[Row]:
    """Cross-entropy a token, of every training step (or means of them) and of every validation."""
    for seed in seeds:
        with paths.training_log(seed).open(encoding="utf-8", newline="") as file:
            steps = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        size = -(-len(steps) // POINTS)
        for start in range(0, len(steps), size):
            some = steps[start : start + size]
            loss = sum(loss for _, loss in some) / len(some)
            yield {"seed": seed, "split": "training", "step": some[len(some) // 2][0], "loss": loss}
        for entry in records.read_json(paths.training_summary(seed))["validation"]:
            yield {"seed": seed, "split": "validation", "step": entry["step"], "loss": entry["loss"]}


def _lengths(seeds: Sequence[int]) -> Iterator[Row]:
    """The share of texts of each length; the outputs of several seeds are taken together."""
    texts = {
        "references": [row.target for row in records.read_rows(paths.split("test"), records.Example)],
        "base": _texts(paths.variant(None)),
        "tuned": [text for seed in seeds for text in _texts(paths.variant(seed))],
    }
    for name, some in texts.items():
        for words, count in sorted(Counter(len(sentences.words(text)) for text in some).items()):
            yield {"texts": name, "words": words, "share": count / len(some)}


def _texts(variant: str) -> list[str]:
    return [row.text for row in records.read_rows(paths.predictions(variant), records.Prediction)]


def _write(path: Path, rows: Iterable[Row]) -> None:
    records.write_text(path, appendix.text(list(rows)))
