"""The test examples side by side: what each variant wrote for each, and how it scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import paths, records
from pipeline.core import text as sentences
from pipeline.core.records import Example, Prediction
from pipeline.score import evaluate as scores


@dataclass(frozen=True, slots=True)
class Written:
    """What one variant wrote for one example; `scores` maps a metric to the score of that text alone."""

    text: str
    tokens: int
    capped: bool
    scores: dict[str, float]

    @property
    def words(self) -> int:
        return len(sentences.words(self.text))


@dataclass(frozen=True, slots=True)
class Row:
    """One test example; `tuned` has one entry a seed, in the order of params."""

    example: Example
    base: Written
    tuned: list[Written]

    def gain(self, metric: str) -> float:
        """What tuned scores above base, on average over seeds."""
        return sum(one.scores[metric] for one in self.tuned) / len(self.tuned) - self.base.scores[metric]


def read(seeds: Sequence[int], metrics: Sequence[str]) -> list[Row]:
    """The rows of the test split, in its order; that they belong together, `compare.compare` has checked."""
    test = records.read_rows(paths.split("test"), Example)
    columns = [_written(paths.variant(seed), metrics) for seed in (None, *seeds)]
    return [Row(example, base, list(tuned)) for example, base, *tuned in zip(test, *columns, strict=True)]


def _written(variant: str, metrics: Sequence[str]) -> list[Written]:
    predictions = records.read_rows(paths.predictions(variant), Prediction)
    scored = scores.read(variant).examples
    return [
        Written(one.text, one.tokens, one.finish == "length", {name: row[name] for name in metrics})
        for one, row in zip(predictions, scored, strict=True)
    ]
