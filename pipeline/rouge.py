"""ROUGE-1, -2, -L and -Lsum (Lin 2004, sections 2, 3.1 and 3.2) through the package `rouge-score`, as F1 x 100.

What this module adds is what the package leaves open: sentences for ROUGE-Lsum, a signature on every file of scores,
and refusals. The package's own bootstrap draws from the global, unseeded NumPy generator and is never used.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from pipeline import paths, records
from pipeline.errors import UserError, listing
from pipeline.params import Evaluate
from pipeline.sentences import sentences

MAX_FOREIGN_SHARE = 0.5
"""Share of the references' letters outside a-z above which the default tokenizer sees too little to score."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one variant, as `out/scores/<variant>.json` holds them.

    `corpus` maps a metric to its mean over examples, [0, 100]; `length` holds mean words of predictions and
    references; `stopped_by_cap` and `empty` are shares of the predictions; `examples` has one
    `{id, group, aspect, <metric>...}` for each test row, in the order of the test split.
    """

    variant: str
    signature: str
    n: int
    groups: int
    corpus: dict[str, float]
    length: dict[str, float]
    stopped_by_cap: float
    empty: float
    decoding: dict[str, Any]
    examples: list[dict[str, Any]]


def signature(evaluate: Evaluate) -> str:
    """Everything that a figure depends on besides the texts, in the manner of sacrebleu's signatures."""
    parts = [
        f"rouge-score {version('rouge-score')}",
        "+".join(evaluate.metrics),
        "F1x100",
        f"stem:{'yes' if evaluate.use_stemmer else 'no'}",
        "tokenizer:default [a-z0-9]",
        "split:regex",
        "mean:examples",
    ]
    return "|".join(parts)


def score_pairs(hypotheses: Sequence[str], references: Sequence[str], evaluate: Evaluate) -> list[dict[str, float]]:
    """F1 x 100 of each hypothesis against its reference, one `{metric: score}` a pair.

    ROUGE-Lsum is scored sentence by sentence, the others over the whole text. A text without a token scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: a second that nothing else should pay

    whole = RougeScorer([name for name in evaluate.metrics if name != "rougeLsum"], use_stemmer=evaluate.use_stemmer)
    split = RougeScorer([name for name in evaluate.metrics if name == "rougeLsum"], use_stemmer=evaluate.use_stemmer)
    scored: list[dict[str, float]] = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        found = whole.score(reference, hypothesis) if whole.rouge_types else {}
        if split.rouge_types:
            found |= split.score("\n".join(sentences(reference)), "\n".join(sentences(hypothesis)))
        scored.append({name: 100.0 * float(found[name].fmeasure) for name in evaluate.metrics})
    return scored


def evaluate(variant: str, evaluate: Evaluate) -> None:
    """Score the predictions of `variant` against the test split and write `paths.scores(variant)`.

    UserError when predictions and test split are not the same rows in the same order, or when the references are in
    a script that the tokenizer does not see.
    """
    examples = records.read_rows(paths.split("test"), records.Example)
    predictions = records.read_rows(paths.predictions(variant), records.Prediction)
    same_rows(variant, [row.id for row in predictions], [row.id for row in examples])
    _refuse_other_scripts([row.target for row in examples])
    pairs = score_pairs([row.text for row in predictions], [row.target for row in examples], evaluate)
    n = len(examples)
    scores = Scores(
        variant=variant,
        signature=signature(evaluate),
        n=n,
        groups=len({row.group for row in examples}),
        corpus={name: math.fsum(pair[name] for pair in pairs) / n for name in evaluate.metrics},
        length={
            "predictions": sum(words(row.text) for row in predictions) / n,
            "references": sum(words(row.target) for row in examples) / n,
        },
        stopped_by_cap=sum(row.finish == "length" for row in predictions) / n,
        empty=sum(not row.text.strip() for row in predictions) / n,
        decoding=asdict(records.Decoding(**records.read_json(paths.decoding(variant)))),
        examples=[
            {"id": row.id, "group": row.group, "aspect": row.aspect, **pair}
            for row, pair in zip(examples, pairs, strict=True)
        ],
    )
    records.write_json(paths.scores(variant), asdict(scores))


def read(variant: str) -> Scores:
    """The scores of one variant; UserError if the file is missing or was written by another version."""
    path = paths.scores(variant)
    try:
        return Scores(**records.read_json(path))
    except TypeError as error:
        raise UserError(f"{path} does not hold scores ({error}): run `dvc repro`") from None


def words(text: str) -> int:
    """Length of a text in whitespace-separated words."""
    return len(text.split())


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
    letters = [letter for text in references for letter in text.lower() if letter.isalpha()]
    foreign = sum(not re.match("[a-z]", letter) for letter in letters)
    if foreign > MAX_FOREIGN_SHARE * len(letters):
        raise UserError(
            f"{foreign / len(letters):.0%} of the references' letters lie outside a-z, which is all that rouge-score's "
            "tokenizer keeps: ROUGE would be about 0 for every model; use data.columns with a target in Latin script"
        )
