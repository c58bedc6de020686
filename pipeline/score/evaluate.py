"""The scores of one variant: what the stage `evaluate` writes, each file with its signature, and what it refuses."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import paths, records
from pipeline.core.errors import UserError, listing
from pipeline.core.params import Evaluate
from pipeline.core.text import MAX_FOREIGN_SHARE, foreign_share, words
from pipeline.score import metrics


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one variant, as `out/scores/<variant>.json` holds them.

    `test_sha256` is over the ids, groups, aspects and references of the test split, in order: prompts may differ.

    `corpus` maps a metric to its score over all examples, [0, 100]; `length` holds mean words of predictions and
    references; `stopped_by_cap`, `empty` and `copied` (the source as it is) are shares of the predictions, and so is
    `in_language`, where `evaluate.language` names one (`references_in_language`: of the references, since short texts
    are often taken for another language); `examples` has one `{id, group, aspect, <metric>...}` for each
    test row, in the order of the test split, scored by itself; `statistics` maps the metrics that count (chrF, BLEU) to
    each row's counts, from which their scores over any rows follow.
    """

    variant: str
    signature: str
    test_sha256: str
    n: int
    groups: int
    corpus: dict[str, float]
    length: dict[str, float]
    stopped_by_cap: float
    empty: float
    copied: float
    in_language: float | None
    references_in_language: float | None
    decoding: dict[str, Any]
    examples: list[dict[str, Any]]
    statistics: dict[str, list[list[float]]]

    def of(self, metric: metrics.Metric) -> metrics.Floats:
        """nxk: the metric's statistics of every row."""
        rows = self.statistics[metric.name] if metric.counted else [[row[metric.name]] for row in self.examples]
        return np.array(rows, np.float64).reshape(len(self.examples), metric.width)


def evaluate(variant: str, evaluate: Evaluate) -> None:
    """Score the predictions of `variant` against the test split and write `paths.scores(variant)`.

    UserError when predictions and test split are not the same rows in the same order, or when the references are in
    a script that the tokenizer does not see.
    """
    examples = records.read_rows(paths.split("test"), records.Example)
    predictions = records.read_rows(paths.predictions(variant), records.Prediction)
    same_rows(variant, [row.id for row in predictions], [row.id for row in examples])
    references = [row.references for row in examples]
    if evaluate.rouge_tokenizer == "latin" and any(name.startswith("rouge") for name in evaluate.metrics):
        _refuse_other_scripts([one for some in references for one in some])
    texts = [row.text for row in predictions]
    chosen = metrics.chosen(evaluate)
    statistics = {one.name: one.statistics(texts, references) for one in chosen}
    each = {one.name: one.each(statistics[one.name]).tolist() for one in chosen}
    n = len(examples)
    scores = Scores(
        variant=variant,
        signature=metrics.signature(evaluate),
        test_sha256=_digest(examples),
        n=n,
        groups=len({row.group for row in examples}),
        corpus={one.name: _corpus(one, statistics[one.name]) for one in chosen},
        length={
            "predictions": sum(len(words(text)) for text in texts) / n,
            "references": sum(len(words(row.target)) for row in examples) / n,
        },
        stopped_by_cap=sum(row.finish == "length" for row in predictions) / n,
        empty=sum(not text.strip() for text in texts) / n,
        copied=sum(text.split() == row.source.split() for text, row in zip(texts, examples, strict=True)) / n,
        in_language=_share_in(evaluate.language, texts),
        references_in_language=_share_in(evaluate.language, [row.target for row in examples]),
        decoding=asdict(records.Decoding(**records.read_json(paths.decoding(variant)))),
        examples=[
            {"id": row.id, "group": row.group, "aspect": row.aspect, **{name: found[i] for name, found in each.items()}}
            for i, row in enumerate(examples)
        ],
        statistics={one.name: statistics[one.name].tolist() for one in chosen if one.counted},
    )
    records.write_json(paths.scores(variant), asdict(scores))


def _digest(examples: Sequence[records.Example]) -> str:
    content = [[row.id, row.group, row.aspect, row.references] for row in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read(variant: str) -> Scores:
    """The scores of one variant; UserError if the file is missing or was written by another version."""
    return load(paths.scores(variant))


def load(path: Path) -> Scores:
    """The scores in a file; UserError as of `read`."""
    try:
        return Scores(**records.read_json(path))
    except TypeError as error:
        raise UserError(f"{path} does not hold scores ({error}): run `dvc repro`") from None


def _corpus(metric: metrics.Metric, statistics_nxk: metrics.Floats) -> float:
    sums_k = [math.fsum(column) for column in statistics_nxk.T.tolist()]
    return float(metric.corpus(np.array([sums_k]), np.array([len(statistics_nxk)], np.float64))[0])


def _share_in(language: str | None, texts: Sequence[str]) -> float | None:
    """Share of the texts that are identified as being in a language, an ISO 639-1 code; empty ones are not."""
    if language is None:
        return None
    from py3langid import classify

    return sum(bool(text.strip() and classify(text)[0] == language) for text in texts) / len(texts)


def same_rows(variant: str, given: Sequence[str], test: Sequence[str]) -> None:
    """UserError unless `given` are the ids of the test split, in its order, each once, and at least one."""
    problems = []
    here, there = set(given), set(test)
    if not test:
        problems.append(f"{paths.split('test')} is empty: nothing can be scored")
    if len(there) < len(test):
        problems.append(f"{paths.split('test')} has {len(test) - len(there)} rows with the id of another")
    if missing := [row for row in test if row not in here]:
        problems.append(f"{len(missing)} test rows have no prediction: {_some(missing)}")
    if extra := [row for row in given if row not in there]:
        problems.append(f"{len(extra)} predictions belong to no test row: {_some(extra)}")
    if not problems and list(given) != list(test):
        problems.append("the rows are the same, their order or number is not")
    if problems:
        raise listing(problems, f"predictions of {variant} and the test split differ; run `dvc repro`:")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def _refuse_other_scripts(references: Sequence[str]) -> None:
    foreign = foreign_share(references)
    if foreign > MAX_FOREIGN_SHARE:
        raise UserError(
            f"{foreign:.0%} of the references' letters lie outside a-z, which is all that rouge-score's "
            "tokenizer keeps: ROUGE would be about 0 for every model; set evaluate.rouge_tokenizer to unicode"
        )
