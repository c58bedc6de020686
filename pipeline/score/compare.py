"""Base against tuned: is the difference in the scores larger than chance can explain, and is it about the source?

`pipeline.score.contrast` compares two sides, `pipeline.score.specific` says how much of a gain other sources would show
too. Each aspect is a separate question, so p-values are corrected over all aspects.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import DataCard, QuantizedFacts, Scores, TrainingSummary
from pipeline.core.errors import UserError, listing
from pipeline.core.records import Decoding, Encoded, Example
from pipeline.core.text import not_nfc
from pipeline.score import (
    baselines,
    guard_record,
    known,
    metrics,
    reference_lines,
    side_by_side,
    side_effects,
    significance,
    slices,
    specific,
)
from pipeline.score.comparison import Aspect, Baseline, Comparison, EqualLength, Line, Output, Pair, Result, Specific
from pipeline.score.contrast import contrast, verdict
from pipeline.score.estimates import Estimate, Judged
from pipeline.score.side_by_side import Outputs, Row
from pipeline.score.tables import Corpus, Table

MUST_AGREE = ("prompts_sha256", "model_sha256", "generation", "device", "threads", "dtype", "thinking", "split")
"""Fields of `records.Decoding` in which base and tuned must agree, so that only the adapter is compared."""


def write(seeds: Sequence[int], evaluate: params.Evaluate, settings: params.Compare) -> None:
    """Write the comparison of the adapters of `seeds` with base. UserError as `compare_variants`."""
    contracts.write(paths.COMPARISON_JSON, compare_variants(seeds, evaluate, settings))


def compare_variants(seeds: Sequence[int], evaluate: params.Evaluate, settings: params.Compare) -> Comparison:
    """The comparison of the tuned variants of `seeds` with base, on the split that is scored.

    UserError if outputs are missing, or listing all conditions in which the variants differ.
    """
    test = side_by_side.rows_of(evaluate.split)
    variants = [side_by_side.outputs(paths.variant(seed)) for seed in (None, *seeds)]
    _refuse_unequal(test, variants, evaluate)
    rows, scored = side_by_side.join(test, variants), [one.scores for one in variants]

    chosen = metrics.chosen(evaluate)
    groups = np.array([row.group for row in test])
    tables = [Table.of(one, chosen) for one in scored]
    if not all(np.isfinite(columns).all() for table in tables for columns in table.statistics):
        raise UserError("a score is not a finite number: remove out/scores and run `dvc repro`")

    results = contrast(tables[:1], tables[1:], groups, settings)
    about_source = _specific(rows, tables, settings)
    training = records.read_rows(paths.split("train"), Example)
    outputs = [_output(one) for one in scored]
    best, worst = _extremes(rows, settings)
    return Comparison(
        verdict=verdict(
            [results[name] for name in settings.decide_by],
            list(about_source[0].results.values()) if about_source else [],
        ),
        decide_by=list(settings.decide_by),
        margin=settings.margin,
        quantization=contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts).method,
        confidence=settings.confidence,
        samples=settings.bootstrap_samples,
        seed=settings.seed,
        split=evaluate.split,
        n=len(test),
        groups=len(set(groups)),
        signature=metrics.signature(evaluate, [row.references for row in test]),
        decoding={name: getattr(scored[0].decoding, name) for name in MUST_AGREE},
        results=results,
        aspects=_aspects(test, tables, settings),
        slices=_parts(slices.of(test), test, [table.only(settings.decide_by) for table in tables], settings),
        specific=about_source,
        equal_length=_equal_length(rows, tables, groups, settings),
        lines=_lines(rows, tables[1:], training, evaluate, settings),
        baselines=_baselines(tables, groups, settings),
        base=outputs[0],
        tuned=outputs[1:],
        language=evaluate.language,
        references_in_language=scored[0].references_in_language,
        published=list(settings.published),
        reference_words=scored[0].reference_words,
        best=best,
        worst=worst,
        cost=side_effects.read(seeds, settings),
        guards=guard_record.measured(seeds),
        encoded=_encoded(seeds[0], scored[0]),
        not_scored=guard_record.not_scored(evaluate.split),
        shared_groups=contracts.read(paths.DATA_CARD, DataCard).shared_groups,
        known=known.counted(test, training),
        contamination=contracts.read(paths.CONTAMINATION, contracts.Contamination),
        notices=scored[0].notices,
        references_not_in_source=scored[0].references_not_in_source,
        not_nfc=not_nfc(row.references for row in test) if metrics.sees_code_points(evaluate) else 0,
    )


def _encoded(seed: int, base: Scores) -> dict[str, Encoded]:
    """What became of the examples of each split, which is the same for all seeds and variants."""
    training = contracts.read(paths.training_summary(seed), TrainingSummary)
    return {**training.encoded, base.decoding.split: base.decoding.encoded}


def _aspects(test: Sequence[Example], tables: Sequence[Table], settings: params.Compare) -> list[Aspect]:
    """The results of each aspect, in the order of the test split; none if there is only one aspect."""
    rows_of: dict[str, list[int]] = {}
    for i, row in enumerate(test):
        rows_of.setdefault(row.aspect, []).append(i)
    return _parts(rows_of if len(rows_of) > 1 else {}, test, tables, settings)


def _parts(
    rows_of: Mapping[str, Sequence[int]], test: Sequence[Example], tables: Sequence[Table], settings: params.Compare
) -> list[Aspect]:
    """The results of each part of the rows. Parts whose rows are all in one group have no interval and are left out."""
    found: dict[str, dict[str, Result]] = {}
    for name, rows in rows_of.items():
        groups = np.array([test[i].group for i in rows])
        if len(set(groups)) > 1:
            here = [table.rows(rows) for table in tables]
            found[name] = contrast(here[:1], here[1:], groups, settings)
    keys = [(name, metric) for name in found for metric in settings.decide_by]
    corrected = significance.holm([found[name][metric].p for name, metric in keys])
    p_holm = dict(zip(keys, corrected, strict=True))
    return [
        Aspect(name, len(rows_of[name]), results, {metric: p_holm[name, metric] for metric in settings.decide_by})
        for name, results in found.items()
    ]


def _specific(rows: Sequence[Row], tables: Sequence[Table], settings: params.Compare) -> list[Specific]:
    """How much of the gain is specific to the source, in the deciding metrics. `tables` begin with base's."""
    written = [[row.base, *row.tuned] for row in rows]
    texts = [[one.texts for one in some] for some in zip(*written, strict=True)]
    base, *tuned = (
        specific.Variant(some, table.only(settings.decide_by)) for some, table in zip(texts, tables, strict=True)
    )
    return specific.measured([row.example for row in rows], base, tuned, settings)


def _equal_length(
    rows: Sequence[Row], tables: Sequence[Table], groups: NDArray[Any], settings: params.Compare
) -> EqualLength | None:
    """The gain at equal length, in the deciding metrics; None where the line would have to be drawn beyond all rows."""
    base, *tuned = (table.only(settings.decide_by).each().T for table in tables)
    words = np.array([[one.mean_words + 1 for one in (row.base, *row.tuned)] for row in rows], np.float64)
    ratios = np.log(words[:, 1:] / words[:, :1])
    if not (ratios.min(axis=0) <= 0).all() or not (ratios.max(axis=0) >= 0).all():
        return None
    found = Estimate.mean(
        [Estimate.intercepts(here - base, ratio_n, groups) for here, ratio_n in zip(tuned, ratios.T, strict=True)]
    )
    if not np.isfinite(found.values_gxm).all():
        return None
    judged = Judged(found, settings)
    names = [metric.name for metric in tables[0].only(settings.decide_by).metrics]
    gains = {name: judged.deciding(m) for m, name in enumerate(names)}
    return EqualLength(float(np.exp(np.median(ratios))), gains)


def _lines(
    rows: Sequence[Row],
    tuned: Sequence[Table],
    training: Sequence[Example],
    evaluate: params.Evaluate,
    settings: params.Compare,
) -> list[Line]:
    """The scores of the reference lines. Lines with texts in fewer than two groups are left out."""
    lines = []
    chosen = tuned[0].metrics
    test = [row.example for row in rows]
    for line in reference_lines.texts(test, [row.base.texts for row in rows], training, evaluate):
        held = [i for i, some in enumerate(line.texts) if some]
        groups = np.array([test[i].group for i in held])
        if len(set(groups)) < 2:
            continue
        table = Table.mean([line.texts[i] for i in held], [test[i] for i in held], chosen)
        here = Estimate.of(Corpus.of(table, groups))
        judged = Judged(
            Estimate.mean([Estimate.of(Corpus.of(one.rows(held), groups)) for one in tuned]) - here, settings
        )
        lines.append(
            Line(
                key=line.key,
                label=line.label,
                about=line.about,
                n=len(held),
                scores={metric.name: float(score) for metric, score in zip(chosen, here.scores_m, strict=True)},
                ahead={metric.name: judged.deciding(m) for m, metric in enumerate(chosen)},
            )
        )
    return lines


def _baselines(tables: Sequence[Table], groups: NDArray[Any], settings: params.Compare) -> list[Baseline]:
    """The variants of the base that were not trained, against base and tuned on their rows.

    One whose rows are all in one group has no interval and is left out.
    """
    found: list[Baseline] = []
    before: list[Table] = []
    for one in baselines.read():  # all of them answered the same rows
        here = groups[one.rows]
        if len(set(here)) > 1:
            base, *tuned = (table.rows(one.rows) for table in tables)
            own = Table.of(one.scores, base.metrics)
            found.append(
                Baseline(
                    label=one.label,
                    short=one.short,
                    n=len(one.rows),
                    groups=len(set(here)),
                    tuned=contrast([own], tuned, here, settings),
                    gain=contrast([base], [own], here, settings),
                    ahead=contrast(before, [own], here, settings) if before else {},
                    output=_output(one.scores),
                )
            )
            before = [own]
    return found


def _output(one: Scores) -> Output:
    return Output(
        one.variant,
        one.words,
        one.stopped_by_cap,
        one.empty,
        one.copied,
        one.in_language,
        one.corpus,
        one.thoughts,
        one.not_in_source,
        one.samples,
        one.samples_sd,
    )


def _extremes(rows: Sequence[Row], settings: params.Compare) -> tuple[list[Pair], list[Pair]]:
    """The examples on which tuned gains most and loses most, the most extreme first, ties by id."""
    metric = settings.decide_by[0]
    pairs = [
        Pair(
            row.example.id,
            row.example.source,
            row.example.target,
            row.base.text,
            row.tuned[0].text,
            row.base.scores[metric],
            row.tuned[0].scores[metric],
        )
        for row in rows
    ]
    gain = {pair.id: pair.tuned_score - pair.base_score for pair in pairs}
    up = sorted(pairs, key=lambda pair: (-gain[pair.id], pair.id))[: settings.examples]
    down = sorted(pairs, key=lambda pair: (gain[pair.id], pair.id))[: settings.examples]
    return [pair for pair in up if gain[pair.id] > 0], [pair for pair in down if gain[pair.id] < 0]


def _refuse_unequal(test: Sequence[Example], variants: Sequence[Outputs], evaluate: params.Evaluate) -> None:
    """UserError that lists all differences to base, except the adapter, and to the test split."""
    problems = []
    if len(variants) < 2:
        problems.append("there is no tuned variant: seeds is empty")
    base = variants[0].scores
    expected = metrics.signature(evaluate, [row.references for row in test])
    for outputs in variants:
        one = outputs.scores
        if one.signature != expected:
            problems.append(f"{one.variant} is scored as {one.signature}, but params ask for {expected}")
        problems += unequal(one.variant, one.decoding, base.decoding)
        problems += side_by_side.misplaced(test, outputs)
        if (one.decoding.adapter_sha256 is None) != (one is base):
            problems.append(f"{one.variant} was decoded with{'out' if one is not base else ''} an adapter")
    if problems:
        remedy = "run `dvc repro`"
        if len({one.scores.decoding.generation.get("tensor_parallel") for one in variants}) > 1:
            remedy = f"run `dvc repro --force --single-item infer@{paths.variant(None)}`, then `dvc repro`"
        raise listing(problems, f"base and tuned were not run under the same conditions; {remedy}:")


def unequal(variant: str, decoding: Decoding, base: Decoding) -> list[str]:
    """A message for each of `MUST_AGREE` that differs from base: `threads: tuned-17 has 4, base has 2`."""
    return side_by_side.unequal(variant, decoding, base, MUST_AGREE)
