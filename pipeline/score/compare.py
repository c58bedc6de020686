"""Base against tuned: is the difference in the scores larger than chance can explain?

Intervals come from a paired bootstrap over groups of test examples. With several training seeds, the deciding interval
also covers the spread between seeds (`pipeline.score.significance`). "Better" needs the intervals of all metrics in
`decide_by` above zero. Demanding all of them only makes that verdict rarer, so it needs no correction for several
metrics. Each aspect is a separate question, so p-values are corrected over all aspects.

Dimensions: v variants, m metrics, n rows, b resamples, k statistics of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import contracts, params, paths
from pipeline.core.contracts import DataCard, Scores, TrainingSummary
from pipeline.core.errors import UserError, listing
from pipeline.core.records import Decoding, Encoded, Example
from pipeline.core.text import not_nfc
from pipeline.score import guard_record, metrics, reference_lines, side_by_side, side_effects, significance
from pipeline.score.comparison import Aspect, Comparison, Line, Output, Pair, Result, Spread, Verdict
from pipeline.score.metrics import Floats, Metric
from pipeline.score.side_by_side import Outputs, Row
from pipeline.score.significance import Interval

MUST_AGREE = ("prompts_sha256", "model_sha256", "generation", "device", "threads", "dtype", "thinking")
"""Fields of `records.Decoding` in which base and tuned must agree, so that only the adapter is compared."""


def write(seeds: Sequence[int], evaluate: params.Evaluate, settings: params.Compare) -> None:
    """Write the comparison of the adapters of `seeds` with base. UserError as `compare_variants`."""
    contracts.write(paths.COMPARISON_JSON, compare_variants(seeds, evaluate, settings))


def compare_variants(seeds: Sequence[int], evaluate: params.Evaluate, settings: params.Compare) -> Comparison:
    """The comparison of the tuned variants of `seeds` with base, on the scored test split.

    UserError if outputs are missing, or listing all conditions in which the variants differ.
    """
    test = side_by_side.test_split()
    variants = [side_by_side.outputs(paths.variant(seed)) for seed in (None, *seeds)]
    _refuse_unequal(test, variants, evaluate)
    rows, scored = side_by_side.join(test, variants), [one.scores for one in variants]

    chosen = metrics.chosen(evaluate)
    groups = np.array([row.group for row in test])
    tables = [Table.of(one, chosen) for one in scored]
    if not all(np.isfinite(columns).all() for table in tables for columns in table.statistics):
        raise UserError("a score is not a finite number: remove out/scores and run `dvc repro`")

    results = contrast(tables[:1], tables[1:], groups, settings)
    outputs = [
        Output(
            one.variant, one.words, one.stopped_by_cap, one.empty, one.copied, one.in_language, one.corpus, one.thoughts
        )
        for one in scored
    ]
    best, worst = _extremes(rows, settings)
    return Comparison(
        verdict=verdict([results[name].deciding for name in settings.decide_by]),
        decide_by=list(settings.decide_by),
        confidence=settings.confidence,
        samples=settings.bootstrap_samples,
        seed=settings.seed,
        n=len(test),
        groups=len(set(groups)),
        signature=metrics.signature(evaluate, [row.references for row in test]),
        decoding={name: getattr(scored[0].decoding, name) for name in MUST_AGREE},
        results=results,
        aspects=_aspects(test, tables, settings),
        lines=_lines(rows, tables[1:], settings),
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
        not_scored=guard_record.not_scored(),
        shared_groups=contracts.read(paths.DATA_CARD, DataCard).shared_groups,
        not_nfc=not_nfc(row.references for row in test) if metrics.sees_code_points(evaluate) else 0,
    )


def _encoded(seed: int, base: Scores) -> dict[str, Encoded]:
    """What became of the examples of each split, which is the same for all seeds and variants."""
    training = contracts.read(paths.training_summary(seed), TrainingSummary)
    return {**training.encoded, "test": base.decoding.encoded}


@dataclass(frozen=True)
class Table:
    """The statistics of one variant's texts: an nxk array for each metric."""

    metrics: Sequence[Metric]
    statistics: list[Floats]

    @classmethod
    def of(cls, scores: Scores, chosen: Sequence[Metric]) -> "Table":
        """The statistics of a scored variant for the metrics `chosen`."""
        rows = [
            scores.statistics[one.name] if one.counted else [[row.scores[one.name]] for row in scores.examples]
            for one in chosen
        ]
        found = [np.array(table, np.float64) for table in rows]
        return cls(chosen, [table.reshape(-1, one.width) for table, one in zip(found, chosen, strict=True)])

    def rows(self, chosen: Sequence[int]) -> "Table":
        """The table of the rows with these numbers."""
        return Table(self.metrics, [columns[list(chosen)] for columns in self.statistics])

    def each(self) -> Floats:
        """The score of each row by itself, mxn."""
        return np.array([metric.each(table) for metric, table in zip(self.metrics, self.statistics, strict=True)])


def resampled(tables: Sequence[Table], groups: NDArray[Any], settings: params.Compare) -> tuple[Floats, Floats]:
    """The scores over all rows (vxm), and over each resample (vxmxb). All variants share the resamples."""
    everything_nxk = np.concatenate([columns for table in tables for columns in table.statistics], axis=1)
    sums_bxk, rows_b = significance.resampled_sums(everything_nxk, groups, settings.bootstrap_samples, settings.seed)
    # Row 0 is the sum over all rows; the resamples follow.
    sums_bxk = np.concatenate([everything_nxk.sum(axis=0, keepdims=True), sums_bxk])
    rows_b = np.concatenate([[len(groups)], rows_b])
    start, found = 0, []
    for table in tables:
        row = []
        for metric in table.metrics:
            row.append(metric.corpus(sums_bxk[:, start : start + metric.width], rows_b))
            start += metric.width
        found.append(row)
    scores_vxmxb = np.array(found)
    return scores_vxmxb[:, :, 0], scores_vxmxb[:, :, 1:]


def contrast(
    base: Sequence[Table], tuned: Sequence[Table], groups: NDArray[Any], settings: params.Compare
) -> dict[str, Result]:
    """Each metric's result: the mean over the seeds of `tuned` against that over `base`, paired by rows.

    `groups` names the group of each row. UserError with a single group.
    """
    chosen = tuned[0].metrics
    score_vxm, resample_vxmxb = resampled([*base, *tuned], groups, settings)
    one, other = (np.mean([table.each() for table in tables], axis=0) for tables in (base, tuned))
    gain_mxn = significance.difference(other, one)
    cut = len(base)
    results = {}
    for m, metric in enumerate(chosen):
        here, there = resample_vxmxb[:cut, m].mean(axis=0), resample_vxmxb[cut:, m].mean(axis=0)
        diff_b = significance.difference(there, here)
        value = float(significance.difference(score_vxm[cut:, m].mean(), score_vxm[:cut, m].mean()))
        diff = significance.percentiles(value, diff_b, settings.confidence)
        p, seeds, error = significance.p_value(diff_b), None, float(np.std(diff_b))
        if max(len(base), len(tuned)) > 1:
            sides = [score_vxm[:cut, m].tolist(), score_vxm[cut:, m].tolist()]
            sd, both, p = significance.over_seeds(value, sides, diff_b, len(set(groups)), settings.confidence)
            seeds = Spread(sd, both)
            error = (both.high - both.low) / 2 / NormalDist().inv_cdf((1 + settings.confidence) / 2)
        results[metric.name] = Result(
            base=significance.percentiles(score_vxm[:cut, m].mean(), here, settings.confidence),
            tuned=significance.percentiles(score_vxm[cut:, m].mean(), there, settings.confidence),
            diff=diff,
            seeds=seeds,
            p=p,
            effect=significance.effect_size(gain_mxn[m], groups),
            detectable=significance.detectable(error, settings.confidence),
            wins=float(np.mean(gain_mxn[m] > 0)),
            ties=float(np.mean(gain_mxn[m] == 0)),
            losses=float(np.mean(gain_mxn[m] < 0)),
        )
    return results


def verdict(differences: Sequence[Interval]) -> Verdict:
    """`better` or `worse` if all intervals lie on that side of zero, `none` if all contain zero, else `mixed`."""
    if all(one.low > 0 for one in differences):
        return "better"
    if all(one.high < 0 for one in differences):
        return "worse"
    return "none" if all(one.low <= 0 <= one.high for one in differences) else "mixed"


def _aspects(test: Sequence[Example], tables: Sequence[Table], settings: params.Compare) -> list[Aspect]:
    """The results of each aspect, in the order of the test split; none if there is only one aspect.

    Aspects whose rows are all in one group have no interval and are left out.
    """
    rows_of: dict[str, list[int]] = {}
    for i, row in enumerate(test):
        rows_of.setdefault(row.aspect, []).append(i)
    found: dict[str, dict[str, Result]] = {}
    for name, rows in rows_of.items():
        groups = np.array([test[i].group for i in rows])
        if len(rows_of) > 1 and len(set(groups)) > 1:
            here = [table.rows(rows) for table in tables]
            found[name] = contrast(here[:1], here[1:], groups, settings)
    keys = [(name, metric) for name in found for metric in settings.decide_by]
    corrected = significance.holm([found[name][metric].p for name, metric in keys])
    p_holm = dict(zip(keys, corrected, strict=True))
    return [
        Aspect(name, len(rows_of[name]), results, {metric: p_holm[name, metric] for metric in settings.decide_by})
        for name, results in found.items()
    ]


def _lines(rows: Sequence[Row], tuned: Sequence[Table], settings: params.Compare) -> list[Line]:
    """The scores of the reference lines. Lines with texts in fewer than two groups are left out."""
    lines = []
    chosen = tuned[0].metrics
    test, names = [row.example for row in rows], [metric.name for metric in chosen]
    for line in reference_lines.texts(test, [row.base.text for row in rows], names):
        held = [i for i, some in enumerate(line.texts) if some]
        groups = np.array([test[i].group for i in held])
        if len(set(groups)) < 2:
            continue
        table = mean_table([line.texts[i] for i in held], [test[i] for i in held], chosen)
        score_vxm, resample_vxmxb = resampled([table, *(one.rows(held) for one in tuned)], groups, settings)
        ahead_m = significance.difference(score_vxm[1:].mean(axis=0), score_vxm[0])
        ahead_mxb = significance.difference(resample_vxmxb[1:].mean(axis=0), resample_vxmxb[0])
        lines.append(
            Line(
                key=line.key,
                label=line.label,
                about=line.about,
                n=len(held),
                scores={metric.name: float(score) for metric, score in zip(chosen, score_vxm[0], strict=True)},
                ahead={
                    metric.name: significance.percentiles(ahead_m[m], ahead_mxb[m], settings.confidence)
                    for m, metric in enumerate(chosen)
                },
            )
        )
    return lines


def mean_table(texts: Sequence[Sequence[str]], rows: Sequence[Example], chosen: Sequence[Metric]) -> Table:
    """The statistics of each row, as the mean over its texts, against the row's references."""
    flat = [text for some in texts for text in some]
    references = [row.references for some, row in zip(texts, rows, strict=True) for _ in some]
    ends = np.cumsum([len(some) for some in texts])[:-1]
    found = []
    for metric in chosen:
        parts = np.split(metric.statistics(flat, references), ends)
        found.append(np.array([part.mean(axis=0) for part in parts]))
    return Table(chosen, found)


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
    pairs = {name: (getattr(decoding, name), getattr(base, name)) for name in MUST_AGREE}
    return [f"{name}: {variant} has {_difference(*pair)}" for name, pair in pairs.items() if pair[0] != pair[1]]


def _difference(here: Any, base: Any) -> str:
    """`x, base has y`. For the generation settings, only the differing keys."""
    if isinstance(here, dict) and isinstance(base, dict):
        keys = sorted(key for key in here.keys() | base.keys() if here.get(key) != base.get(key))
        here, base = ({key: one.get(key) for key in keys} for one in (here, base))
    return f"{here}, base has {base}"
