"""Base against tuned: is the difference in ROUGE more than the choice of test examples can explain?

The interval is a paired bootstrap over groups (clusters): aspects of one paper share its text, so a resample draws
groups with replacement and takes all rows of each, base and tuned together (Koehn 2004, section 3, for pairing;
Davison and Hinkley 1997, section 3.8, for resampling clusters whole). Its ends are percentiles of the resampled means.
The test decides "better" only if the interval of every metric in `decide_by` lies above zero; demanding all of them
can only make that verdict rarer, so no correction for several metrics is due.

Three reference lines, scored on the same rows, say what a figure is worth: see `_lines`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import params, paths, records, rouge
from pipeline.errors import UserError, listing
from pipeline.records import Example, Prediction

Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "mixed", "none"]

TIE = 1e-9
"""Scores closer than this (points) are a tie: the means over seeds of equal scores may differ in the last bit."""
DRAWS_AT_ONCE = 2_000_000
"""Group indices drawn in one chunk of resamples: 16 MB, whatever the number of groups."""

MUST_AGREE = ("prompts_sha256", "model_sha256", "generation", "device", "threads", "dtype")
"""Fields of `records.Decoding` in which base and tuned must not differ: otherwise not the adapter alone is compared."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its bootstrap percentile interval, in ROUGE points."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Result:
    """One metric over all test rows, or those of one aspect; `tuned` is the mean over seeds, example by example.

    `wins`, `ties`, `losses` are the shares of examples that tuned scores higher, equal, and lower than base.
    """

    base: Interval
    tuned: Interval
    diff: Interval
    wins: float
    ties: float
    losses: float


@dataclass(frozen=True, slots=True)
class Aspect:
    name: str
    n: int
    results: dict[str, Result]


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
    """What the outputs of one variant look like: mean words, shares stopped by the cap and empty, mean scores."""

    variant: str
    words: float
    stopped_by_cap: float
    empty: float
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

    `seed_sd` maps a metric to the standard deviation of the seeds' means, and is empty with a single seed.
    `best` and `worst` come from the first seed, since texts have no mean.
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
    seed_sd: dict[str, float]
    reference_words: float
    best: list[Pair]
    worst: list[Pair]


def compare(seeds: Sequence[int], evaluate: params.Evaluate, compare: params.Compare) -> Comparison:
    """Compare the tuned variants of `seeds` with base on the scored test split.

    UserError lists every way in which the variants were not tried under the same conditions.
    """
    test = records.read_rows(paths.split("test"), Example)
    variants = [paths.variant(None), *(paths.variant(seed) for seed in seeds)]
    scores = [rouge.read(variant) for variant in variants]
    texts = [records.read_rows(paths.predictions(variant), Prediction) for variant in variants]
    _refuse_unequal(test, scores, texts, evaluate)

    metrics = list(evaluate.metrics)
    groups = np.array([row.group for row in test])
    by_variant = np.array([[[row[name] for name in metrics] for row in one.examples] for one in scores], np.float64)
    if not np.isfinite(by_variant).all():
        raise UserError("a score is not a finite number: remove out/scores and run `dvc repro`")
    base_nm, tuned_nm = by_variant[0], by_variant[1:].mean(axis=0)  # n: examples, m: metrics

    results = _results(base_nm, tuned_nm, groups, metrics, compare)
    outputs = [
        Output(one.variant, one.length["predictions"], one.stopped_by_cap, one.empty, one.corpus) for one in scores
    ]
    best, worst = _extremes(test, texts[0], texts[1], by_variant[:2, :, metrics.index(compare.decide_by[0])], compare)
    return Comparison(
        verdict=verdict([results[name].diff for name in compare.decide_by]),
        decide_by=list(compare.decide_by),
        confidence=compare.confidence,
        samples=compare.bootstrap_samples,
        seed=compare.seed,
        n=len(test),
        groups=len(set(groups)),
        signature=rouge.signature(evaluate),
        decoding={name: scores[0].decoding[name] for name in MUST_AGREE},
        results=results,
        aspects=_aspects(test, base_nm, tuned_nm, metrics, compare),
        lines=_lines(test, [row.text for row in texts[0]], tuned_nm, evaluate, compare),
        base=outputs[0],
        tuned=outputs[1:],
        seed_sd={name: stdev(one.corpus[name] for one in scores[1:]) for name in metrics} if len(seeds) > 1 else {},
        reference_words=scores[0].length["references"],
        best=best,
        worst=worst,
    )


def resampled_means(values_nk: Floats, groups: NDArray[Any], samples: int, generator: np.random.Generator) -> Floats:
    """Bootstrap over groups: means of the k columns over the rows of as many groups as there are, `samples` times.

    `values_nk` is [rows, columns], `groups` names the group of each row. Returns [samples, columns]. Each resample's
    mean is the sum over its rows divided by their number, so that large groups weigh more, as in the mean itself.
    UserError with a single group, over which nothing can be resampled.
    """
    # Sorted by name, so that the order of the rows does not decide which group a draw stands for.
    names, member = np.unique(groups, return_inverse=True)
    g = len(names)
    if g < 2:
        raise UserError(
            "all test examples belong to one group, so there is nothing to resample: raise data.limits.test, or name "
            "a column that tells sources apart in data.columns.group"
        )
    columns = np.column_stack([values_nk, np.ones(len(values_nk))])
    sums_gk = np.zeros((g, columns.shape[1]))
    np.add.at(sums_gk, member, columns)
    chunk = max(1, DRAWS_AT_ONCE // g)
    means = []
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        draws = generator.integers(g, size=(size, g)) + g * np.arange(size)[:, None]
        times_bg = np.bincount(draws.ravel(), minlength=size * g).reshape(size, g)
        totals_bk = times_bg @ sums_gk
        means.append(totals_bk[:, :-1] / totals_bk[:, -1:])
    return np.concatenate(means)


def intervals(values_nk: Floats, groups: NDArray[Any], compare: params.Compare) -> list[Interval]:
    """The mean of each column with its percentile interval; every call draws the same resamples of the same groups."""
    generator = np.random.Generator(np.random.PCG64(compare.seed))
    means_bk = resampled_means(values_nk, groups, compare.bootstrap_samples, generator)
    tail = (1 - compare.confidence) / 2
    low_k, high_k = np.quantile(means_bk, [tail, 1 - tail], axis=0)
    return [
        Interval(float(value), float(low), float(high))
        for value, low, high in zip(values_nk.mean(axis=0), low_k, high_k, strict=True)
    ]


def verdict(differences: Sequence[Interval]) -> Verdict:
    """`better` or `worse` if all intervals lie on that side of zero, `none` if all hold zero, else `mixed`."""
    if all(one.low > 0 for one in differences):
        return "better"
    if all(one.high < 0 for one in differences):
        return "worse"
    return "none" if all(one.low <= 0 <= one.high for one in differences) else "mixed"


def cut(text: str, reference: str) -> str:
    """The first words of `text`, as many as `reference` has."""
    return " ".join(text.split()[: rouge.words(reference)])


def _minus(here_nm: Floats, there_nm: Floats) -> Floats:
    """The differences, ties exactly zero: no verdict may rest on the rounding of a mean over seeds."""
    difference_nm = here_nm - there_nm
    return np.where(np.abs(difference_nm) <= TIE, 0.0, difference_nm)


def _results(
    base_nm: Floats, tuned_nm: Floats, groups: NDArray[Any], metrics: Sequence[str], compare: params.Compare
) -> dict[str, Result]:
    diff_nm = _minus(tuned_nm, base_nm)
    m = len(metrics)
    found = intervals(np.concatenate([base_nm, tuned_nm, diff_nm], axis=1), groups, compare)
    return {
        name: Result(
            base=found[i],
            tuned=found[m + i],
            diff=found[2 * m + i],
            wins=float(np.mean(diff_nm[:, i] > 0)),
            ties=float(np.mean(diff_nm[:, i] == 0)),
            losses=float(np.mean(diff_nm[:, i] < 0)),
        )
        for i, name in enumerate(metrics)
    }


def _aspects(
    test: Sequence[Example], base_nm: Floats, tuned_nm: Floats, metrics: Sequence[str], compare: params.Compare
) -> list[Aspect]:
    """One result an aspect, in the order of the test split; none when all rows have the same.

    An aspect whose rows lie in one group has no interval and is left out.
    """
    rows_of: dict[str, list[int]] = {}
    for i, row in enumerate(test):
        rows_of.setdefault(row.aspect, []).append(i)
    aspects = []
    for name, rows in rows_of.items():
        groups = np.array([test[i].group for i in rows])
        if len(rows_of) > 1 and len(set(groups)) > 1:
            aspects.append(Aspect(name, len(rows), _results(base_nm[rows], tuned_nm[rows], groups, metrics, compare)))
    return aspects


def _lines(
    test: Sequence[Example], base: Sequence[str], tuned_nm: Floats, evaluate: params.Evaluate, compare: params.Compare
) -> list[Line]:
    """The reference lines: what a text scores that was written without doing the task.

    lead: the first sentence of the source. wrong_aspect: the mean over the references of the group's other aspects,
    which are on topic and well written and answer another question; left out when no group has two aspects.
    base_cut: base's output cut after as many words as its own reference has, which no real system can know; a gain
    over it is not that tuned merely stopped at a better length.
    """
    members: dict[str, list[Example]] = {}
    for row in test:
        members.setdefault(row.group, []).append(row)
    other = [[row.target for row in members[one.group] if row.aspect != one.aspect] for one in test]
    n_cut = sum(rouge.words(text) > rouge.words(row.target) for text, row in zip(base, test, strict=True))
    candidates = [
        ("lead", "Lead", "the first sentence of the source", [[row.lead] for row in test]),
        ("wrong_aspect", "Wrong aspect", "the references of the same source's other aspects, averaged", other),
        (
            "base_cut",
            "Base, cut",
            "base's outputs, each cut to the word count of its own reference "
            f"({100 * n_cut / len(test):.0f} % of them were longer)",
            [[cut(text, row.target)] for text, row in zip(base, test, strict=True)],
        ),
    ]
    lines = []
    for key, label, about, texts in candidates:
        rows = [i for i, some in enumerate(texts) if some]
        groups = np.array([test[i].group for i in rows])
        if len(set(groups)) < 2:
            continue
        line_nm = _mean_scores([texts[i] for i in rows], [test[i].target for i in rows], evaluate)
        ahead = intervals(_minus(tuned_nm[rows], line_nm), groups, compare)
        lines.append(
            Line(
                key=key,
                label=label,
                about=about,
                n=len(rows),
                scores=dict(zip(evaluate.metrics, line_nm.mean(axis=0).tolist(), strict=True)),
                ahead=dict(zip(evaluate.metrics, ahead, strict=True)),
            )
        )
    return lines


def _mean_scores(texts: Sequence[Sequence[str]], references: Sequence[str], evaluate: params.Evaluate) -> Floats:
    """[rows, metrics]: the mean score of each row's texts against that row's reference."""
    flat = [(text, reference) for some, reference in zip(texts, references, strict=True) for text in some]
    scored = rouge.score_pairs([text for text, _ in flat], [reference for _, reference in flat], evaluate)
    values = np.array([[row[name] for name in evaluate.metrics] for row in scored])
    ends = np.cumsum([len(some) for some in texts])
    return np.array([part.mean(axis=0) for part in np.split(values, ends[:-1])])


def _extremes(
    test: Sequence[Example],
    base: Sequence[Prediction],
    tuned: Sequence[Prediction],
    scores_vn: Floats,
    compare: params.Compare,
) -> tuple[list[Pair], list[Pair]]:
    """The examples on which tuned gains and loses most, most extreme first; ties in the order of ids."""
    base_n, tuned_n = scores_vn.tolist()
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
    scores: Sequence[rouge.Scores],
    texts: Sequence[Sequence[Prediction]],
    evaluate: params.Evaluate,
) -> None:
    """UserError listing everything but the adapter in which the variants differ from base or from the test split."""
    problems = []
    if len(scores) < 2:
        problems.append("there is no tuned variant: train.seeds is empty")
    base = scores[0]
    expected = rouge.signature(evaluate)
    for one, predictions in zip(scores, texts, strict=True):
        if one.signature != expected:
            problems.append(f"{one.variant} is scored as {one.signature}, params ask for {expected}")
        problems.extend(
            f"{name}: {one.variant} has {_difference(one.decoding[name], base.decoding[name])}"
            for name in MUST_AGREE
            if one.decoding[name] != base.decoding[name]
        )
        for what, ids in (
            ("scores", [row["id"] for row in one.examples]),
            ("predictions", [row.id for row in predictions]),
        ):
            try:
                rouge.same_rows(f"{one.variant} ({what})", ids, [row.id for row in test])
            except UserError as error:
                problems.append(str(error).replace("\n", "\n  "))
        if (one.decoding["adapter_sha256"] is None) != (one is base):
            problems.append(f"{one.variant} was decoded with{'out' if one is not base else ''} an adapter")
    if problems:
        raise listing(problems, "base and tuned were not tried under the same conditions; run `dvc repro`:")


def _difference(here: Any, base: Any) -> str:
    """`x, base has y`, by key for the generation settings."""
    if isinstance(here, dict) and isinstance(base, dict):
        keys = sorted(key for key in here.keys() | base.keys() if here.get(key) != base.get(key))
        here, base = ({key: one.get(key) for key in keys} for one in (here, base))
    return f"{here}, base has {base}"
