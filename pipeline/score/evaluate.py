"""The stage `evaluate`: the scores of one variant, with their signature."""

import json
import math
from collections.abc import Sequence

import numpy as np

from pipeline.core import baseline, contracts, paths, records
from pipeline.core.contracts import ScoredRow, Scores
from pipeline.core.errors import UserError
from pipeline.core.params import Evaluate
from pipeline.core.text import MAX_FOREIGN_SHARE, canonical, foreign_share, holds_thought, is_visible, words
from pipeline.score import metrics, side_by_side


def score_variant(variant: str, settings: Evaluate) -> None:
    """Score the predictions of `variant` against the test split, and write `paths.scores(variant)`.

    UserError if predictions and test split are not the same rows in the same order, or if the tokenizer does not know
    the references' script.
    """
    test = side_by_side.test_split()
    _score(variant, settings, test, test, contracts.read(paths.decoding(variant), records.Decoding))


def score_baseline(variant: str, settings: Evaluate, most: int | None) -> None:
    """Score a variant of `baseline` against the test rows that `baseline.rows` (`most`) leaves; otherwise the same.

    If the variant is not computed, that is written. UserError also if it answered other rows.
    """
    decoding = contracts.read_or_skipped(paths.decoding(variant), records.Decoding)
    if isinstance(decoding, contracts.Skipped):
        contracts.write(paths.scores(variant), decoding)
        return
    test = side_by_side.test_split()
    rows = baseline.rows(test, most)
    if decoding.rows != rows:
        raise UserError(
            f"{paths.decoding(variant)} is of {len(decoding.rows or test)} test rows, which are not the {len(rows)} of "
            "baseline.rows: run `dvc repro`"
        )
    _score(variant, settings, test, [test[row] for row in rows], decoding)


def _score(
    variant: str,
    settings: Evaluate,
    test: Sequence[records.Example],
    examples: Sequence[records.Example],
    decoding: records.Decoding,
) -> None:
    """Score a variant that answered `examples` of the test split."""
    predictions = records.read_rows(paths.predictions(variant), records.Prediction)
    side_by_side.require_same_rows(variant, [row.id for row in predictions], [row.id for row in examples])
    references = [row.references for row in examples]
    require_script(references, settings)
    texts = [row.text for row in predictions]
    chosen = metrics.chosen(settings)
    statistics = {one.name: one.statistics(texts, references) for one in chosen}
    each = {one.name: one.each(statistics[one.name]).tolist() for one in chosen}
    n = len(examples)
    rows = [[row.id, row.group, row.aspect, row.references] for row in test]
    scores = Scores(
        variant=variant,
        signature=metrics.signature(settings),
        test_sha256=records.sha256_text(json.dumps(rows)),
        n=n,
        groups=len({row.group for row in examples}),
        corpus={one.name: _corpus(one, statistics[one.name]) for one in chosen},
        words=sum(len(words(text)) for text in texts) / n,
        reference_words=sum(len(words(row.target)) for row in examples) / n,
        stopped_by_cap=sum(row.finish == "length" for row in predictions) / n,
        empty=sum(not is_visible(text) for text in texts) / n,
        copied=sum(
            canonical(text).split() == canonical(row.source).split() for text, row in zip(texts, examples, strict=True)
        )
        / n,
        thoughts=sum(map(holds_thought, texts)),
        in_language=_share_in(settings.language, texts),
        references_in_language=_share_in(settings.language, [row.target for row in examples]),
        decoding=decoding,
        examples=[
            ScoredRow(row.id, row.group, row.aspect, {name: found[i] for name, found in each.items()})
            for i, row in enumerate(examples)
        ],
        statistics={one.name: statistics[one.name].tolist() for one in chosen if one.counted},
    )
    contracts.write(paths.scores(variant), scores)


def require_script(references: Sequence[Sequence[str]], settings: Evaluate) -> None:
    """UserError if ROUGE's tokenizer does not know the script of the references, a list for each row."""
    if settings.rouge_tokenizer != "latin" or not any(name.startswith("rouge") for name in settings.metrics):
        return
    foreign = foreign_share(one for some in references for one in some)
    if foreign > MAX_FOREIGN_SHARE:
        raise UserError(
            f"{foreign:.0%} of the references' letters lie outside a-z, the only letters that rouge-score's "
            "tokenizer keeps: ROUGE would be about 0 for every model; set evaluate.rouge_tokenizer to unicode"
        )


def _corpus(metric: metrics.Metric, statistics_nxk: metrics.Floats) -> float:
    sums_k = [math.fsum(column) for column in statistics_nxk.T.tolist()]
    return float(metric.corpus(np.array([sums_k]), np.array([len(statistics_nxk)], np.float64))[0])


def _share_in(language: str | None, texts: Sequence[str]) -> float | None:
    """The share of texts that are identified as `language` (ISO 639-1). Empty texts are in no language."""
    if language is None:
        return None
    from py3langid import classify

    return sum(bool(is_visible(text) and classify(canonical(text))[0] == language) for text in texts) / len(texts)
