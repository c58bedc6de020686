"""The stage `evaluate`: the scores of one variant, with their signature."""

import json
import math
from collections.abc import Sequence

import numpy as np

from pipeline.core import baseline, contracts, paths, records
from pipeline.core.contracts import ScoredRow, Scores
from pipeline.core.errors import UserError
from pipeline.core.params import Evaluate
from pipeline.core.progress import say
from pipeline.core.records import Example
from pipeline.core.text import (
    MAX_FOREIGN_SHARE,
    canonical,
    foreign_share,
    holds_thought,
    is_visible,
    unspaced_share,
    words,
)
from pipeline.score import faithfulness, metrics, reference_lines, side_by_side

FEW_FOREIGN = 0.05
"""Up to this share of letters that a tokenizer drops or cannot cut, nothing is said of them."""
CUT_BY_BLEU = {
    "13a": "",
    "intl": "",
    "zh": r"\p{Han}",
    "ja-mecab": r"\p{Han}\p{Hiragana}\p{Katakana}",
    "ko-mecab": r"\p{Han}",
}
"""The scripts without spaces that BLEU's tokenizers cut into words; the others cut all."""
TO_CUT = "zh cuts Chinese, ja-mecab Japanese, ko-mecab Korean, char and flores200 any script"
ENOUGH_TO_NAME = 500
"""Letters from which the language of a text can be named."""


def score_variant(variant: str, settings: Evaluate) -> None:
    """Score the predictions of `variant` against the split `evaluate.split`, and write `paths.scores(variant)`.

    UserError if predictions and split are not the same rows in the same order, or if the tokenizer does not know
    the references' script.
    """
    split = side_by_side.rows_of(settings.split)
    _score(variant, settings, split, split, contracts.read(paths.decoding(variant), records.Decoding))


def score_baseline(variant: str, settings: Evaluate, most: int | None) -> None:
    """Score a variant of `baseline` against the rows that `baseline.rows` (`most`) leaves; otherwise the same.

    If the variant is not computed, that is written. UserError also if it answered other rows.
    """
    decoding = contracts.read_or_skipped(paths.decoding(variant), records.Decoding)
    if isinstance(decoding, contracts.Skipped):
        contracts.write(paths.scores(variant), decoding)
        return
    split = side_by_side.rows_of(settings.split)
    rows = baseline.rows(split, most)
    if decoding.rows != rows:
        raise UserError(
            f"{paths.decoding(variant)} is of {len(decoding.rows or split)} rows, which are not the {len(rows)} of "
            "baseline.rows: run `dvc repro`"
        )
    _score(variant, settings, split, [split[row] for row in rows], decoding)


def _score(
    variant: str,
    settings: Evaluate,
    split: Sequence[records.Example],
    examples: Sequence[records.Example],
    decoding: records.Decoding,
) -> None:
    """Score a variant that answered `examples` of `split`. UserError as of `_answered`."""
    predictions = _answered(variant, settings, examples, decoding)
    references = [row.references for row in examples]
    require_script(references, settings)
    notices = noticed(examples, settings)
    for one in notices:
        say(one)
    sources = faithfulness.Sources(examples)
    answers = [row.texts for row in predictions]
    texts = [text for some in answers for text in some]
    finishes = [one for row in predictions for one in row.finishes]
    chosen = metrics.chosen(settings)
    samples = [[one.statistics(some, references) for one in chosen] for some in zip(*answers, strict=True)]
    statistics = {
        one.name: np.mean(found, axis=0) for one, found in zip(chosen, zip(*samples, strict=True), strict=True)
    }
    each = {one.name: one.each(statistics[one.name]).tolist() for one in chosen}
    n = len(examples)
    rows = [[row.id, row.group, row.aspect, row.references] for row in split]
    scores = Scores(
        variant=variant,
        signature=metrics.signature(settings, references),
        test_sha256=records.sha256_text(json.dumps(rows)),
        n=n,
        groups=len({row.group for row in examples}),
        corpus={one.name: _corpus(one, statistics[one.name]) for one in chosen},
        words=sum(len(words(text)) for text in texts) / len(texts),
        reference_words=sum(len(words(row.target)) for row in examples) / n,
        stopped_by_cap=finishes.count("length") / len(texts),
        empty=sum(not is_visible(text) for text in texts) / len(texts),
        copied=sum(
            canonical(text).split() == canonical(row.source).split()
            for some, row in zip(answers, examples, strict=True)
            for text in some
        )
        / len(texts),
        thoughts=sum(map(holds_thought, texts)),
        in_language=_share_in(settings.language, texts),
        references_in_language=_share_in(settings.language, [row.target for row in examples]),
        decoding=decoding,
        examples=[
            ScoredRow(row.id, row.group, row.aspect, {name: found[i] for name, found in each.items()})
            for i, row in enumerate(examples)
        ],
        statistics={one.name: statistics[one.name].tolist() for one in chosen if one.counted},
        notices=notices,
        not_in_source=sources.beyond(answers),
        references_not_in_source=sources.beyond([[row.target] for row in examples]),
        samples=len(samples),
        samples_sd={one.name: _spread(one, [found[m] for found in samples]) for m, one in enumerate(chosen)},
    )
    contracts.write(paths.scores(variant), scores)


def _answered(
    variant: str, settings: Evaluate, examples: Sequence[records.Example], decoding: records.Decoding
) -> list[records.Prediction]:
    """The predictions of a variant. UserError if it answered another split, or other rows than `examples`."""
    if decoding.split != settings.split:
        raise UserError(
            f"{paths.decoding(variant)} is of the {decoding.split} split, and evaluate.split is {settings.split}: run "
            "`dvc repro`"
        )
    predictions = records.read_rows(paths.predictions(variant), records.Prediction)
    side_by_side.require_same_rows(
        variant, [row.id for row in predictions], [row.id for row in examples], settings.split
    )
    return predictions


def require_script(references: Sequence[Sequence[str]], settings: Evaluate) -> None:
    """UserError if ROUGE's or BLEU's tokenizer does not know the script of the references, a list for each row."""
    texts = [one for some in references for one in some]
    problems = []
    if (foreign := _dropped_by_rouge(texts, settings)) > MAX_FOREIGN_SHARE:
        problems.append(
            f"{foreign:.0%} of the references' letters lie outside a-z, the only letters that rouge-score's "
            "tokenizer keeps: ROUGE would be about 0 for every model; set evaluate.rouge_tokenizer to unicode"
        )
    if (whole := _uncut_by_bleu(texts, settings)) > MAX_FOREIGN_SHARE:
        problems.append(
            f"{whole:.0%} of the references' letters are in scripts without spaces between words, which "
            f"evaluate.bleu_tokenizer = {settings.bleu_tokenizer!r} does not cut: BLEU would take whole sentences for "
            f"words; set it to another ({TO_CUT})"
        )
    if problems:
        raise UserError("\n".join(problems))


def noticed(test: Sequence[Example], settings: Evaluate) -> list[str]:
    """What a reader of the scores must know of the split and the settings, a sentence each."""
    references = [one for row in test for one in row.references]
    found = []
    if (foreign := _dropped_by_rouge(references, settings)) > FEW_FOREIGN:
        found.append(
            f"{foreign:.0%} of the references' letters lie outside a-z, and ROUGE's tokenizer latin drops them: words "
            "with them are cut in pieces. evaluate.rouge_tokenizer unicode keeps them."
        )
    if (whole := _uncut_by_bleu(references, settings)) > FEW_FOREIGN:
        found.append(
            f"{whole:.0%} of the references' letters are in scripts without spaces, which BLEU's tokenizer "
            f"{settings.bleu_tokenizer} does not cut into words: {TO_CUT}."
        )
    if settings.use_stemmer and _has_rouge(settings):
        language = settings.language or _language_of(references)
        if language not in (None, "en"):
            given = "evaluate.language is" if settings.language else "the references seem to be in"
            found.append(
                f"ROUGE compares stems by Porter's rules, which are for English, and {given} {language!r}: unrelated "
                "words may count as equal. evaluate.use_stemmer false compares whole words."
            )
    whole_leads = reference_lines.lead_is_source(test)
    if whole_leads >= reference_lines.NEARLY_ALL and not reference_lines.is_translation(settings.metrics):
        found.append(
            f"There is no reference line “Lead”: {whole_leads:.0%} of the sources have no second sentence that marks "
            "tell apart, so their first sentence is the whole source."
        )
    return found


def _has_rouge(settings: Evaluate) -> bool:
    return any(name.startswith("rouge") for name in settings.metrics)


def _dropped_by_rouge(texts: Sequence[str], settings: Evaluate) -> float:
    """The share of letters that ROUGE does not see."""
    return foreign_share(texts) if _has_rouge(settings) and settings.rouge_tokenizer == "latin" else 0.0


def _uncut_by_bleu(texts: Sequence[str], settings: Evaluate) -> float:
    """The share of letters that stand in scripts without spaces and are not cut into words for BLEU."""
    if "bleu" not in settings.metrics or settings.bleu_tokenizer not in CUT_BY_BLEU:
        return 0.0
    return unspaced_share(texts, CUT_BY_BLEU[settings.bleu_tokenizer])


def _language_of(texts: Sequence[str]) -> str | None:
    """The language of some texts (ISO 639-1), if they are long enough, and the whole and most of them show the same."""
    from py3langid import classify

    some = [canonical(text) for text in texts[:: max(1, len(texts) // 100)] if is_visible(text)]
    together = " ".join(some)[:20_000]
    if sum(map(str.isalpha, together)) < ENOUGH_TO_NAME:
        return None
    language = str(classify(together)[0])
    return language if sum(classify(text)[0] == language for text in some) > len(some) / 2 else None


def _spread(metric: metrics.Metric, samples: Sequence[metrics.Floats]) -> float | None:
    """The standard deviation of the corpus score from one sample of all answers to the next; None of a single one."""
    return float(np.std([_corpus(metric, one) for one in samples], ddof=1)) if len(samples) > 1 else None


def _corpus(metric: metrics.Metric, statistics_nxk: metrics.Floats) -> float:
    sums_k = [math.fsum(column) for column in statistics_nxk.T.tolist()]
    return float(metric.corpus(np.array([sums_k]), np.array([len(statistics_nxk)], np.float64))[0])


def _share_in(language: str | None, texts: Sequence[str]) -> float | None:
    """The share of texts that are identified as `language` (ISO 639-1). Empty texts are in no language."""
    if language is None:
        return None
    from py3langid import classify

    return sum(bool(is_visible(text) and classify(canonical(text))[0] == language) for text in texts) / len(texts)
