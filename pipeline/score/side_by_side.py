"""The examples side by side: the output of each variant for each example, and its scores.

Only this module joins the rows of the split that is scored with outputs and scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core import contracts, paths, records
from pipeline.core.contracts import Scores
from pipeline.core.errors import UserError, listing
from pipeline.core.records import Decoding, Example, Prediction
from pipeline.core.text import words


@dataclass(frozen=True, slots=True)
class Written:
    """One variant's output for one example. `scores` maps a metric to the score of this text alone.

    With `generation.sampling` it is the first of several, `more` are the others, and `scores` are means over all.
    """

    text: str
    tokens: int
    capped: bool
    scores: dict[str, float]
    more: list[str] = field(default_factory=list)

    @property
    def words(self) -> int:
        return len(words(self.text))

    @property
    def texts(self) -> list[str]:
        return [self.text, *self.more]

    @property
    def mean_words(self) -> float:
        """The number of words, as the mean over all texts."""
        return sum(len(words(text)) for text in self.texts) / len(self.texts)


@dataclass(frozen=True, slots=True)
class Row:
    """One example with its outputs. `tuned` has one entry a seed, in the order of params."""

    example: Example
    base: Written
    tuned: list[Written]

    def gain(self, metric: str) -> float:
        """Tuned's score minus base's, as the mean over seeds."""
        return sum(one.scores[metric] for one in self.tuned) / len(self.tuned) - self.base.scores[metric]


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of one variant as its stages wrote them, in the order of the split."""

    predictions: list[Prediction]
    scores: Scores


def read(seeds: Sequence[int]) -> list[Row]:
    """The rows of the split that base answered, in its order, with the outputs of base and of the adapters of `seeds`.

    UserError if outputs are missing, or belong to another split.
    """
    variants = [outputs(paths.variant(seed)) for seed in (None, *seeds)]
    return join(rows_of(variants[0].scores.decoding.split), variants)


def rows_of(split: str) -> list[Example]:
    """The rows of a split that is scored."""
    return records.read_rows(paths.split(split), Example)


def outputs(variant: str) -> Outputs:
    """The outputs of one variant. UserError if they are missing."""
    predictions = records.read_rows(paths.predictions(variant), Prediction)
    return Outputs(predictions, contracts.read(paths.scores(variant), Scores))


def join(test: Sequence[Example], variants: Sequence[Outputs]) -> list[Row]:
    """The examples of a split with the outputs of the variants, of which base is the first.

    UserError, which lists every difference, if the outputs are not of these rows in this order.
    """
    if problems := [problem for one in variants for problem in misplaced(test, one)]:
        raise listing(problems, "the outputs belong to another split; run `dvc repro`:")
    columns = [
        [
            Written(one.text, one.tokens, one.finish == "length", row.scores, one.texts[1:])
            for one, row in zip(variant.predictions, variant.scores.examples, strict=True)
        ]
        for variant in variants
    ]
    return [Row(example, base, list(tuned)) for example, base, *tuned in zip(test, *columns, strict=True)]


def misplaced(test: Sequence[Example], outputs: Outputs) -> list[str]:
    """Why the outputs of a variant cannot be joined with the split `test`: messages, none if they can."""
    ids = [row.id for row in test]
    found = []
    for what, rows in (("scores", outputs.scores.examples), ("predictions", outputs.predictions)):
        try:
            require_same_rows(
                f"{outputs.scores.variant} ({what})", [row.id for row in rows], ids, outputs.scores.decoding.split
            )
        except UserError as error:
            found.append(str(error).replace("\n", "\n  "))
    return found


def require_same_rows(variant: str, given: Sequence[str], test: Sequence[str], split: str) -> None:
    """UserError unless `given` equals `test`, the ids of a split, which are not empty and have no duplicates."""
    problems = []
    here, there = set(given), set(test)
    if not test:
        problems.append(f"{paths.split(split)} is empty: nothing can be scored")
    if len(there) < len(test):
        problems.append(f"{paths.split(split)} has {len(test) - len(there)} rows with the id of another")
    if missing := [row for row in test if row not in here]:
        problems.append(f"{len(missing)} {split} rows have no prediction: {_some(missing)}")
    if extra := [row for row in given if row not in there]:
        problems.append(f"{len(extra)} predictions belong to no {split} row: {_some(extra)}")
    if not problems and list(given) != list(test):
        problems.append("the rows are the same, but in another order or number")
    if problems:
        raise listing(problems, f"predictions of {variant} and the {split} split differ; run `dvc repro`:")


def unequal(variant: str, decoding: Decoding, base: Decoding, names: Sequence[str]) -> list[str]:
    """A message for each of the fields `names` that differs from base: `threads: tuned-17 has 4, base has 2`."""
    pairs = {name: (getattr(decoding, name), getattr(base, name)) for name in names}
    return [f"{name}: {variant} has {_difference(*pair)}" for name, pair in pairs.items() if pair[0] != pair[1]]


def _difference(here: Any, base: Any) -> str:
    """`x, base has y`. For the generation settings, only the differing keys."""
    if isinstance(here, dict) and isinstance(base, dict):
        keys = sorted(key for key in here.keys() | base.keys() if here.get(key) != base.get(key))
        here, base = ({key: one.get(key) for key in keys} for one in (here, base))
    return f"{here}, base has {base}"


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
