"""Base against tuned: is the difference in the scores more than chance can explain?

The interval is a paired bootstrap over groups of test examples; with several training seeds, the one that decides also
holds the spread between seeds (`pipeline.score.significance`). "Better" needs the interval of every metric in
`decide_by`
above zero; demanding all of them can only make that verdict rarer, so no correction for several metrics is due. The
aspects are as many questions more: their p-values are corrected for all of them together.

Reference lines, scored on the same rows, say what a figure is worth: see `reference_texts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError, listing
from pipeline.core.records import Example, Prediction
from pipeline.core.text import words
from pipeline.score import evaluate as scores
from pipeline.score import metrics, significance
from pipeline.score import side_effects as cost
from pipeline.score.metrics import Floats, Metric
from pipeline.score.side_effects import Cost
from pipeline.score.significance import Interval

Verdict = Literal["better", "worse", "mixed", "none"]

MUST_AGREE = ("prompts_sha256", "model_sha256", "generation", "device", "threads", "dtype")
"""Fields of `records.Decoding` in which base and tuned must not differ: otherwise not the adapter alone is compared."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Several seeds: the SD of their differences to base, and the mean difference with the interval for the choice of
    examples and of seeds together."""

    sd: float
    both: Interval


@dataclass(frozen=True, slots=True)
class Result:
    """One metric over all test rows, or those of one aspect; `tuned` is the mean over seeds.

    `diff` has the interval for the choice of examples; `seeds` is None with a single seed. `p` is two-sided, of no
    difference. `effect` is Cohen's d over groups. `detectable`: the difference in points that such a comparison finds
    in 80 % of repetitions. `wins`, `ties`, `losses` are the shares of examples that tuned scores higher, equal, and
    lower than base.
    """

    base: Interval
    tuned: Interval
    diff: Interval
    seeds: Spread | None
    p: float
    effect: float
    detectable: float
    wins: float
    ties: float
    losses: float

    @property
    def deciding(self) -> Interval:
        """The difference with the interval that a verdict rests on."""
        return self.seeds.both if self.seeds else self.diff


@dataclass(frozen=True, slots=True)
class Aspect:
    """The results of one aspect's rows. `p_holm`: of the metrics that decide, corrected for all aspects and metrics."""

    name: str
    n: int
    results: dict[str, Result]
    p_holm: dict[str, float]


@dataclass(frozen=True, slots=True)
class Line:
    """A reference line over `n` rows: `scores` maps a metric to its mean there, `ahead` to tuned minus the line."""

    key: str
    label: str
    about: str
    n: int
    scores: dict[str, float]
    ahead: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class Output:
    """What the outputs of one variant look like: mean words, shares (stopped by the cap, empty, equal to their source,
    in `evaluate.language` if that names one), scores."""

    variant: str
    words: float
    stopped_by_cap: float
    empty: float
    copied: float
    in_language: float | None
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Pair:
    """One example side by side, scored in the first metric of `decide_by`."""

    id: str
    source: str
    reference: str
    base: str
    tuned: str
    base_score: float
    tuned_score: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that the report shows. `tuned` has one row for each seed, in the order of params.

    `best` and `worst` come from the first seed, since texts have no mean. `published` are figures of papers.
    """

    verdict: Verdict
    decide_by: list[str]
    confidence: float
    samples: int
    seed: int
    n: int
    groups: int
    signature: str
    decoding: dict[str, Any]
    results: dict[str, Result]
    aspects: list[Aspect]
    lines: list[Line]
    base: Output
    tuned: list[Output]
    language: str | None
    references_in_language: float | None
    published: list[params.Published]
    reference_words: float
    best: list[Pair]
    worst: list[Pair]
    cost: Cost


def compare(seeds: Sequence[int], evaluate: params.Evaluate, compare: params.Compare) -> Comparison:
    """Compare the tuned variants of `seeds` with base on the scored test split.

    UserError lists every way in which the variants were not tried under the same conditions.
    """
    test = records.read_rows(paths.split("test"), Example)
    variants = [paths.variant(None), *(paths.variant(seed) for seed in seeds)]
    scored = [scores.read(variant) for variant in variants]
    texts = [records.read_rows(paths.predictions(variant), Prediction) for variant in variants]
    _refuse_unequal(test, scored, texts, evaluate)

    chosen = metrics.chosen(evaluate)
    groups = np.array([row.group for row in test])
    tables = [Table(chosen, [one.of(metric) for metric in chosen]) for one in scored]
    if not all(np.isfinite(columns).all() for table in tables for columns in table.statistics):
        raise UserError("a score is not a finite number: remove out/scores and run `dvc repro`")

    results = contrast(tables[:1], tables[1:], groups, compare)
    outputs = [
        Output(
            one.variant,
            one.length["predictions"],
            one.stopped_by_cap,
            one.empty,
            one.copied,
            one.in_language,
            one.corpus,
        )
        for one in scored
    ]
    deciding = list(evaluate.metrics).index(compare.decide_by[0])
    best, worst = _extremes(test, texts[0], texts[1], [table.each()[deciding] for table in tables[:2]], compare)
    return Comparison(
        verdict=verdict([results[name].deciding for name in compare.decide_by]),
        decide_by=list(compare.decide_by),
        confidence=compare.confidence,
        samples=compare.bootstrap_samples,
        seed=compare.seed,
        n=len(test),
        groups=len(set(groups)),
        signature=metrics.signature(evaluate),
        decoding={name: scored[0].decoding[name] for name in MUST_AGREE},
        results=results,
        aspects=_aspects(test, tables, compare),
        lines=_lines(test, [row.text for row in texts[0]], tables[1:], evaluate, compare),
        base=outputs[0],
        tuned=outputs[1:],
        language=evaluate.language,
        references_in_language=scored[0].references_in_language,
        published=list(compare.published),
        reference_words=scored[0].length["references"],
        best=best,
        worst=worst,
        cost=cost.read(seeds, compare),
    )


@dataclass(frozen=True)
class Table:
    """The statistics of one variant's texts: for each metric nxk."""

    metrics: Sequence[Metric]
    statistics: list[Floats]

    def rows(self, chosen: Sequence[int]) -> "Table":
        return Table(self.metrics, [columns[list(chosen)] for columns in self.statistics])

    def each(self) -> Floats:
        """mxn: the score of each row by itself."""
        return np.array([metric.each(table) for metric, table in zip(self.metrics, self.statistics, strict=True)])


def resampled(tables: Sequence[Table], groups: NDArray[Any], compare: params.Compare) -> tuple[Floats, Floats]:
    """vxm: the scores of v variants in m metrics over all rows; vxmxb: in every resample, drawn alike for all."""
    everything_nxk = np.concatenate([columns for table in tables for columns in table.statistics], axis=1)
    sums_bxk, rows_b = significance.resampled_sums(everything_nxk, groups, compare.bootstrap_samples, compare.seed)
    # The first row is the sum over all rows; the others are the resamples.
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
    base: Sequence[Table], tuned: Sequence[Table], groups: NDArray[Any], compare: params.Compare
) -> dict[str, Result]:
    """Each metric's result: the seeds of `tuned` on average against those of `base`, paired row by row."""
    chosen = tuned[0].metrics
    score_vxm, resample_vxmxb = resampled([*base, *tuned], groups, compare)
    one, other = (np.mean([table.each() for table in tables], axis=0) for tables in (base, tuned))
    gain_mxn = significance.difference(other, one)
    cut = len(base)
    results = {}
    for m, metric in enumerate(chosen):
        here, there = resample_vxmxb[:cut, m].mean(axis=0), resample_vxmxb[cut:, m].mean(axis=0)
        diff_b = significance.difference(there, here)
        value = float(significance.difference(score_vxm[cut:, m].mean(), score_vxm[:cut, m].mean()))
        diff = significance.percentiles(value, diff_b, compare.confidence)
        p, seeds, error = significance.p_value(diff_b), None, float(np.std(diff_b))
        if max(len(base), len(tuned)) > 1:
            sides = [score_vxm[:cut, m].tolist(), score_vxm[cut:, m].tolist()]
            sd, both, p = significance.over_seeds(value, sides, diff_b, len(set(groups)), compare.confidence)
            seeds = Spread(sd, both)
            error = (both.high - both.low) / 2 / NormalDist().inv_cdf((1 + compare.confidence) / 2)
        results[metric.name] = Result(
            base=significance.percentiles(score_vxm[:cut, m].mean(), here, compare.confidence),
            tuned=significance.percentiles(score_vxm[cut:, m].mean(), there, compare.confidence),
            diff=diff,
            seeds=seeds,
            p=p,
            effect=significance.effect_size(gain_mxn[m], groups),
            detectable=significance.detectable(error, compare.confidence),
            wins=float(np.mean(gain_mxn[m] > 0)),
            ties=float(np.mean(gain_mxn[m] == 0)),
            losses=float(np.mean(gain_mxn[m] < 0)),
        )
    return results


def verdict(differences: Sequence[Interval]) -> Verdict:
    """`better` or `worse` if all intervals lie on that side of zero, `none` if all hold zero, else `mixed`."""
    if all(one.low > 0 for one in differences):
        return "better"
    if all(one.high < 0 for one in differences):
        return "worse"
    return "none" if all(one.low <= 0 <= one.high for one in differences) else "mixed"


def cut(text: str, reference: str) -> str:
    """The first words of `text`, as many as `reference` has."""
    return " ".join(words(text)[: len(words(reference))])


def _aspects(test: Sequence[Example], tables: Sequence[Table], compare: params.Compare) -> list[Aspect]:
    """One result an aspect, in the order of the test split; none when all rows have the same.

    An aspect whose rows lie in one group has no interval and is left out.
    """
    rows_of: dict[str, list[int]] = {}
    for i, row in enumerate(test):
        rows_of.setdefault(row.aspect, []).append(i)
    found: dict[str, dict[str, Result]] = {}
    for name, rows in rows_of.items():
        groups = np.array([test[i].group for i in rows])
        if len(rows_of) > 1 and len(set(groups)) > 1:
            here = [table.rows(rows) for table in tables]
            found[name] = contrast(here[:1], here[1:], groups, compare)
    keys = [(name, metric) for name in found for metric in compare.decide_by]
    corrected = significance.holm([found[name][metric].p for name, metric in keys])
    p_holm = dict(zip(keys, corrected, strict=True))
    return [
        Aspect(name, len(rows_of[name]), results, {metric: p_holm[name, metric] for metric in compare.decide_by})
        for name, results in found.items()
    ]


@dataclass(frozen=True, slots=True)
class Reference:
    """The texts of a reference line: several a row, or none where it has nothing to say of one."""

    key: str
    label: str
    about: str
    texts: list[list[str]]


def reference_texts(test: Sequence[Example], base: Sequence[str], evaluate: params.Evaluate) -> list[Reference]:
    """The reference lines: texts that were written without doing the task, to show what a score is worth.

    lead: the first sentence of the source; in translation (where `evaluate.metrics` has chrF or BLEU) copy instead: the
    source as it is. wrong_aspect: the mean over the references of the group's other aspects, which are on topic and
    well written and answer another question. base_cut: base's output cut after
    as many words as its own reference has, which no real system can know; a gain over it is not that tuned merely
    stopped at a better length.
    """
    members: dict[str, list[Example]] = {}
    for row in test:
        members.setdefault(row.group, []).append(row)
    other = [[row.target for row in members[one.group] if row.aspect != one.aspect] for one in test]
    n_cut = sum(len(words(text)) > len(words(row.target)) for text, row in zip(base, test, strict=True))
    if {"chrf", "bleu"} & set(evaluate.metrics):
        first = Reference("copy", "Copy", "the source as it is", [[row.source] for row in test])
    else:
        first = Reference("lead", "Lead", "the first sentence of the source", [[row.lead] for row in test])
    return [
        first,
        Reference("wrong_aspect", "Wrong aspect", "the references of the same source's other aspects, averaged", other),
        Reference(
            "base_cut",
            "Base, cut",
            "base's outputs, each cut to the word count of its own reference "
            f"({100 * n_cut / len(test):.0f} % of them were longer)",
            [[cut(text, row.target)] for text, row in zip(base, test, strict=True)],
        ),
    ]


def _lines(
    test: Sequence[Example],
    base: Sequence[str],
    tuned: Sequence[Table],
    evaluate: params.Evaluate,
    compare: params.Compare,
) -> list[Line]:
    """The reference lines with their scores; without those that fewer than two groups have."""
    lines = []
    for one in reference_texts(test, base, evaluate):
        rows = [i for i, some in enumerate(one.texts) if some]
        groups = np.array([test[i].group for i in rows])
        if len(set(groups)) < 2:
            continue
        line = mean_table([one.texts[i] for i in rows], [test[i] for i in rows], tuned[0].metrics)
        score_vxm, resample_vxmxb = resampled([line, *(table.rows(rows) for table in tuned)], groups, compare)
        ahead_m = significance.difference(score_vxm[1:].mean(axis=0), score_vxm[0])
        ahead_mxb = significance.difference(resample_vxmxb[1:].mean(axis=0), resample_vxmxb[0])
        lines.append(
            Line(
                key=one.key,
                label=one.label,
                about=one.about,
                n=len(rows),
                scores=dict(zip(evaluate.metrics, score_vxm[0].tolist(), strict=True)),
                ahead={
                    name: significance.percentiles(ahead_m[m], ahead_mxb[m], compare.confidence)
                    for m, name in enumerate(evaluate.metrics)
                },
            )
        )
    return lines


def mean_table(texts: Sequence[Sequence[str]], rows: Sequence[Example], chosen: Sequence[Metric]) -> Table:
    """The statistics of each row, averaged over its texts, against that row's references."""
    flat = [text for some in texts for text in some]
    references = [row.references for some, row in zip(texts, rows, strict=True) for _ in some]
    ends = np.cumsum([len(some) for some in texts])[:-1]
    found = []
    for metric in chosen:
        parts = np.split(metric.statistics(flat, references), ends)
        found.append(np.array([part.mean(axis=0) for part in parts]))
    return Table(chosen, found)


def _extremes(
    test: Sequence[Example],
    base: Sequence[Prediction],
    tuned: Sequence[Prediction],
    scores_vxn: Sequence[Floats],
    compare: params.Compare,
) -> tuple[list[Pair], list[Pair]]:
    """The examples on which tuned gains and loses most, most extreme first; ties in the order of ids."""
    base_n, tuned_n = (scores_n.tolist() for scores_n in scores_vxn)
    pairs = [
        Pair(row.id, row.source, row.target, base[i].text, tuned[i].text, base_n[i], tuned_n[i])
        for i, row in enumerate(test)
    ]
    gain = {pair.id: pair.tuned_score - pair.base_score for pair in pairs}
    up = sorted(pairs, key=lambda pair: (-gain[pair.id], pair.id))[: compare.examples]
    down = sorted(pairs, key=lambda pair: (gain[pair.id], pair.id))[: compare.examples]
    return [pair for pair in up if gain[pair.id] > 0], [pair for pair in down if gain[pair.id] < 0]


def _refuse_unequal(
    test: Sequence[Example],
    scored: Sequence[scores.Scores],
    texts: Sequence[Sequence[Prediction]],
    evaluate: params.Evaluate,
) -> None:
    """UserError listing everything but the adapter in which the variants differ from base or from the test split."""
    problems = []
    if len(scored) < 2:
        problems.append("there is no tuned variant: seeds is empty")
    base = scored[0]
    expected = metrics.signature(evaluate)
    for one, predictions in zip(scored, texts, strict=True):
        if one.signature != expected:
            problems.append(f"{one.variant} is scored as {one.signature}, params ask for {expected}")
        problems.extend(unequal(one.variant, one.decoding, base.decoding))
        for what, ids in (
            ("scores", [row["id"] for row in one.examples]),
            ("predictions", [row.id for row in predictions]),
        ):
            try:
                scores.same_rows(f"{one.variant} ({what})", ids, [row.id for row in test])
            except UserError as error:
                problems.append(str(error).replace("\n", "\n  "))
        if (one.decoding["adapter_sha256"] is None) != (one is base):
            problems.append(f"{one.variant} was decoded with{'out' if one is not base else ''} an adapter")
    if problems:
        remedy = "run `dvc repro`"
        if len({one.decoding["generation"].get("tensor_parallel") for one in scored}) > 1:
            remedy = f"run `dvc repro --force --single-item infer@{paths.variant(None)}`, then `dvc repro`"
        raise listing(problems, f"base and tuned were not tried under the same conditions; {remedy}:")


def unequal(variant: str, decoding: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Each of `MUST_AGREE` in which a variant differs from base: `threads: tuned-17 has 4, base has 2`."""
    return [
        f"{name}: {variant} has {_difference(decoding[name], base[name])}"
        for name in MUST_AGREE
        if decoding[name] != base[name]
    ]


def _difference(here: Any, base: Any) -> str:
    """`x, base has y`, by key for the generation settings."""
    if isinstance(here, dict) and isinstance(base, dict):
        keys = sorted(key for key in here.keys() | base.keys() if here.get(key) != base.get(key))
        here, base = ({key: one.get(key) for key in keys} for one in (here, base))
    return f"{here}, base has {base}"
