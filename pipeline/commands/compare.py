"""Compare experiments: the working directory, DVC experiments, git revisions and MLflow runs.

Scores and predictions come from the DVC cache, found by the `dvc.lock` of a commit, or from the MLflow run. Only the
statistics are computed. Test sets and signatures must be equal; prompts, models and adapters may differ.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pipeline.commands import show
from pipeline.core import contracts, git, params, paths, records
from pipeline.core.contracts import Scores, TrainingSummary
from pipeline.core.errors import UserError, listing
from pipeline.record import identity, lockfile, store
from pipeline.record.runs import Stored, in_line
from pipeline.report import wording
from pipeline.score import metrics, significance
from pipeline.score.comparison import Result
from pipeline.score.contrast import contrast
from pipeline.score.significance import Interval
from pipeline.score.tables import Table

TERMINAL = 80
"""Columns of a usual terminal."""

HERE = "workspace"
"""The name of the experiment in the working directory, as in DVC."""

COSTS: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("trainable", r"(seed-\d+/)?training/trainable_parameters", max),
    ("train s", r"cost/train-\d+_seconds", sum),
    ("peak MB", r"cost/train-\d+_peak_mb", max),
)
"""What an experiment cost: the title of a column, the metrics in the MLflow run, and how seeds are combined."""


@dataclass(frozen=True)
class Experiment:
    """One experiment: its parameters by dotted name, and the scores of its variants.

    `references` and `texts` map ids of test examples to references and to what the first seed's model wrote. `costs`
    has the titles of `COSTS` as keys, without unknown costs, such as those of a training restored from a cache.
    `loss` is the adapters' mean validation loss, if it is known.
    """

    name: str
    params: dict[str, str]
    base: Scores
    tuned: list[Scores]
    references: dict[str, str]
    texts: dict[str, str]
    costs: dict[str, float]
    loss: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two experiments in one metric: `result` is the second minus the first, `p_holm` is corrected for all pairs."""

    first: str
    second: str
    metric: str
    result: Result
    p_holm: float


@dataclass(frozen=True)
class Ranking:
    """Experiments ordered by the first metric, best first; `results` are by name and metric.

    `best` are the results of the best one over its base, with intervals that allow for the choice among `candidates`.
    """

    names: list[str]
    results: dict[str, dict[str, Result]]
    pairs: list[Pair]
    best: dict[str, Result]
    candidates: int


def find(name: str, tracking: params.Tracking) -> Experiment:
    """The experiment that `name` means: `workspace`, a DVC experiment, a git revision or an MLflow run (id or name).

    UserError if there is none, if several runs have the name, and if its results are neither in the cache nor in
    MLflow.
    """
    if name == HERE:
        return _from_lock(name, lockfile.text(paths.DVC_LOCK), tracking)
    if commit := commit_of(name):
        return _from_lock(name, lock_at(commit), tracking)
    return _from_run(show.named(name, tracking), tracking)


def rank(found: Sequence[Experiment], settings: params.Compare, seen: int = 0) -> Ranking:
    """Compare every experiment with its own base, and every two experiments with each other.

    The best one was chosen among all that were `seen` on this split, these at least: its own interval is also
    given at the confidence that a choice among so many needs (Bonferroni).

    UserError unless all were scored on the same test set in the same way, in the metrics of `settings.decide_by`.
    """
    _require_comparable(found)
    chosen = _deciding(found[0], settings)
    results = {one.name: _contrast(one, [one.base], chosen, settings) for one in found}
    names = sorted(results, key=lambda name: -results[name][chosen[0].name].tuned.value)
    by_name = {one.name: one for one in found}
    contrasts = {
        (first, second): _contrast(by_name[second], by_name[first].tuned, chosen, settings)
        for first, second in combinations(names, 2)
    }
    keys = [(pair, metric.name) for pair in contrasts for metric in chosen]
    corrected = significance.holm([contrasts[pair][metric].p for pair, metric in keys])
    pairs = [Pair(*pair, metric, contrasts[pair][metric], p) for (pair, metric), p in zip(keys, corrected, strict=True)]
    candidates = max(len(found), seen)
    chosen_at = settings.model_copy(update={"confidence": 1 - (1 - settings.confidence) / candidates})
    best = by_name[names[0]]
    return Ranking(names, results, pairs, _contrast(best, [best.base], chosen, chosen_at), candidates)


def gain(one: Experiment, over: Experiment, settings: params.Compare) -> dict[str, Result]:
    """The tuned models of `one` minus those of `over`, in each metric of `decide_by`; UserError as of `rank`."""
    _require_comparable([over, one])
    return _contrast(one, over.tuned, _deciding(one, settings), settings)


def gain_over_base(one: Experiment, settings: params.Compare) -> dict[str, Result]:
    """The tuned models of `one` minus its base, in each metric of `decide_by`; UserError as of `rank`."""
    _require_comparable([one])
    return _contrast(one, [one.base], _deciding(one, settings), settings)


def _deciding(one: Experiment, settings: params.Compare) -> list[metrics.Metric]:
    evaluate = _evaluate(one)
    if missing := sorted(set(settings.decide_by) - set(evaluate.metrics)):
        raise UserError(f"compare.decide_by names {', '.join(missing)}, which these experiments did not compute")
    return [metric for metric in metrics.chosen(evaluate) if metric.name in settings.decide_by]


def _contrast(
    one: Experiment, before: Sequence[Scores], chosen: Sequence[metrics.Metric], settings: params.Compare
) -> dict[str, Result]:
    """The tuned models of `one` against those with the scores `before`, on the same test examples."""
    there, here = ([Table.of(scored, chosen) for scored in some] for some in (before, one.tuned))
    return contrast(there, here, np.array([row.group for row in one.base.examples]), settings)


def page(found: Sequence[Experiment], ranking: Ranking, settings: params.Compare) -> str:
    """The ranking as Markdown that is readable in a terminal.

    It has each experiment with its parameters, score and cost, the intervals of each metric, and the verdict for every
    two experiments.
    """
    by_name = {one.name: one for one in found}
    places = {name: f"#{place}" for place, name in enumerate(ranking.names, start=1)}
    shown = list(next(iter(ranking.results.values())))
    interval = f"{100 * settings.confidence:g} % interval"
    first = found[0].base
    split = first.decoding.split
    lines = [f"{len(found)} experiments, {first.n} {split} examples of {first.groups} groups.", ""]
    lines += _overview([by_name[name] for name in ranking.names], ranking, shown[0])
    for metric in shown:
        label = metrics.LABELS[metric]
        rows = []
        for name in ranking.names:
            one = ranking.results[name][metric]
            low, high = wording.points(one.tuned.low), wording.points(one.tuned.high)
            reached = f"{wording.points(one.tuned.value)} ({low} to {high})"
            gained = f"{wording.signed(one.diff.value)} ({wording.span(one.deciding)})"
            rows.append([places[name], wording.markdown(name), reached, gained])
        lines += ["", f"{label}, with {interval}:", "", *table(["", "experiment", label, "tuned − its base"], rows)]
        rows = [
            [
                f"{places[pair.first]} − {places[pair.second]}",
                f"{wording.signed(-pair.result.diff.value)} ({_reversed(pair.result.deciding)})",
                wording.probability(pair.p_holm),
                f"{round(-pair.result.effect, 2) + 0.0:.2f}".replace("-", "−"),  # zero has no sign
                _verdict(pair, settings),
            ]
            for pair in ranking.pairs
            if pair.metric == metric
        ]
        lines += ["", *table(["", "difference", "p", "d", f"verdict in {label}"], rows)]
    gains = ", ".join(
        f"{metrics.LABELS[name]} {wording.signed(one.diff.value)} ({wording.span(one.deciding)})"
        for name, one in ranking.best.items()
    )
    level = 100 - 100 * (1 - settings.confidence) / ranking.candidates
    lines += [
        "",
        f"#1 is the best of {ranking.candidates} that were scored on this {split} split. With intervals of "
        f"{level:.4g} %, which allow for this choice, its gain over its base is {gains}.",
    ]
    lines += _by_validation(found, ranking)
    lines += [
        "",
        f"p is two-sided and corrected for all {len(ranking.pairs)} comparisons (Holm); d is the mean over "
        "the standard deviation of the groups' differences.",
        f"Signature: `{in_line(first.signature)}`",
    ]
    if any(len(one.tuned) == 1 for one in found):
        lines += ["With one seed, an interval covers the choice of examples, not that of the seed."]
    lines += _apart(by_name[ranking.names[0]], by_name[ranking.names[1]], shown[0], settings.examples)
    return "\n".join(lines)


def _by_validation(found: Sequence[Experiment], ranking: Ranking) -> list[str]:
    """What may be used for choosing: these scores if they are of the validation split, else the validation losses."""
    if found[0].base.decoding.split == "validation":
        return ["These scores are for choosing. `lora-repro unseal` scores an experiment on the test split."]
    losses = {one.name: one.loss for one in found if one.loss is not None}
    if len(losses) < len(found):
        return ["The test split is not for choosing. Validation losses are not known of all these experiments."]
    order = sorted(losses, key=lambda name: losses[name])
    ranked = ", ".join(f"#{ranking.names.index(name) + 1} ({losses[name]:.4f})" for name in order)
    return [f"The test split is not for choosing. By validation loss, from the lowest: {ranked}."]


def _overview(ranked: Sequence[Experiment], ranking: Ranking, metric: str) -> list[str]:
    """A table of parameters, scores and costs. Parameters that make it wider than a terminal follow below it."""
    differing = _differing(ranked)
    seeds = ["seeds"] if any(len(one.tuned) > 1 for one in ranked) else []

    def rows(names: Sequence[str]) -> list[list[str]]:
        return [
            [
                f"#{place}",
                wording.markdown(one.name),
                *(wording.markdown(one.params.get(key, "—")) for key in names),
                *(str(len(one.tuned)) for _ in seeds),
                wording.points(ranking.results[one.name][metric].tuned.value),
                *(f"{one.costs[key]:,.0f}" if key in one.costs else "n/a" for key, _, _ in COSTS),
            ]
            for place, one in enumerate(ranked, start=1)
        ]

    costs = [key for key, _, _ in COSTS]
    for names in (differing, []):
        shown = table(["", "experiment", *names, *seeds, metrics.LABELS[metric], *costs], rows(names))
        if len(shown[0]) <= TERMINAL:
            break
    if names == differing:
        return shown
    given = [
        (f"#{place}", [f"{key} = {one.params.get(key, '—')}" for key in differing])
        for place, one in enumerate(ranked, 1)
    ]
    return [*shown, "", *(f"- {place}: {wording.markdown(', '.join(values))}" for place, values in given)]


def _reversed(interval: Interval) -> str:
    """The interval of the opposite difference."""
    return f"{wording.signed(-interval.high)} to {wording.signed(-interval.low)}"


def _apart(first: Experiment, second: Experiment, metric: str, count: int) -> list[str]:
    """The examples on which the first seeds of two experiments differ most, at most `count` in favour of each."""
    here, there = ({row.id: row.scores[metric] for row in one.tuned[0].examples} for one in (first, second))
    order = sorted(here, key=lambda name: (there[name] - here[name], name))
    chosen = [name for name in order[:count] if here[name] > there[name]]
    chosen += [name for name in order[::-1][:count] if here[name] < there[name]]
    if not chosen:
        return []
    lines = [
        "",
        f"Where #1 and #2 are furthest apart in {metrics.LABELS[metric]}, chosen as extremes (first seeds):",
        "",
    ]
    for name in chosen:
        lines += [
            f"- {wording.markdown(name)}",
            f"  - reference: {wording.markdown(first.references[name])}",
            f"  - #1, {wording.points(here[name])}: {wording.markdown(first.texts[name])}",
            f"  - #2, {wording.points(there[name])}: {wording.markdown(second.texts[name])}",
        ]
    return lines


def _verdict(pair: Pair, settings: params.Compare) -> str:
    if pair.result.direction == "few":
        return "too few groups"
    if pair.result.direction == "none" or pair.p_holm > 1 - settings.confidence:
        return "no difference shown"
    better = pair.second if pair.result.diff.value > 0 else pair.first
    return f"{wording.markdown(better)} is better"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns, readable in a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]


def _differing(found: Sequence[Experiment]) -> list[str]:
    """The dotted names of the parameters that differ, without the seeds, which are shown by number."""
    names = sorted({name for one in found for name in one.params} - {"seeds"})
    return [name for name in names if len({one.params.get(name) for one in found}) > 1]


def _require_comparable(found: Sequence[Experiment]) -> None:
    first, problems = found[0], []
    if repeated := sorted({one.name for one in found if sum(other.name == one.name for other in found) > 1}):
        problems.append(f"{', '.join(repeated)} is named twice")
    for one in found:
        if one.base.test_sha256 != first.base.test_sha256:
            counts = "" if one.base.n == first.base.n else f" ({one.base.n}, not {first.base.n})"
            problems.append(f"{one.name} was tested on other examples than {first.name}{counts}")
        if one.base.signature != first.base.signature:
            problems.append(f"{one.name} is scored as {one.base.signature}, {first.name} as {first.base.signature}")
        problems.extend(
            f"{one.name}: {seed.variant} was scored otherwise than its base"
            for seed in one.tuned
            if (seed.test_sha256, seed.signature) != (one.base.test_sha256, one.base.signature)
        )
    if problems:
        raise listing(problems, "these experiments cannot be compared:")


def _evaluate(one: Experiment) -> params.Evaluate:
    """The section `evaluate` of an experiment, from its parameters by dotted name."""
    content: dict[str, Any] = {"normal_form": "none", "split": "test", "bertscore": None}  # before there was a choice
    for name, value in one.params.items():
        section, _, key = name.partition(".")
        if section == "evaluate":
            _put(content, key, value)
    return params.Evaluate.model_validate(content)


def _put(content: dict[str, Any], name: str, value: str) -> None:
    """Put a parameter of `evaluate`, as `track` writes it, at its dotted name."""
    outer, _, inner = name.partition(".")
    if inner:
        held = content.get(outer)
        content[outer] = (held or {}) | {inner: int(value) if inner == "layer" else value}
    else:
        content[outer] = value if params.Evaluate.model_fields[outer].annotation is str else _loaded(value)


def _loaded(text: str) -> Any:
    """A value of a parameter as `track` writes it: JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


# Finding experiments


def commit_of(name: str) -> str | None:
    """The commit of a DVC experiment or of a git revision; None if git knows neither."""
    for sha, experiment in show.experiments():
        if experiment == name:
            return sha
    return git.ask("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")


def lock_at(commit: str) -> str:
    """The text of the `dvc.lock` of a commit; UserError if it has none."""
    lock = git.ask("show", f"{commit}:./{paths.DVC_LOCK}")
    if not lock:
        raise UserError(f"{commit[:12]} has no {paths.DVC_LOCK}: name a commit in which the pipeline was run")
    return lock


def _from_lock(name: str, lock: str, tracking: params.Tracking) -> Experiment:
    """The experiment in the text of a `dvc.lock`: its scores from the cache, else from its MLflow run."""
    stages = lockfile.stages_of(lock, f"the {paths.DVC_LOCK} of {name}")
    try:
        seeds: list[int] = stages["compare"]["params"]["params.yaml"]["seeds"]
    except (KeyError, TypeError):
        raise UserError(
            f"{name}: its {paths.DVC_LOCK} holds no finished comparison (a trial of a sweep is validated, not tested): "
            "run `dvc repro` there"
        ) from None
    try:
        locked = identity.stages_of(lock, seeds)
        given = identity.params_of(locked)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    run = store.finished(identity.digest(locked), tracking)
    if one := _from_cache(name, given, locked, seeds, run):
        return one
    if run is None:
        raise UserError(
            f"{name}: its results are neither in the cache nor in MLflow; fetch them with `dvc exp pull <git remote> "
            f"{name}` (an experiment) or `dvc fetch --all-commits`"
        )
    return replace(_from_run(run, tracking), name=name)


def _from_cache(
    name: str, given: Mapping[str, str], locked: identity.Stages, seeds: list[int], run: Stored | None
) -> Experiment | None:
    """The experiment from the objects of the DVC cache; None if one is missing. `run` has its costs."""
    cache = lockfile.cache_folder(Path())
    md5 = {path: name for stage in locked.values() for path, name in stage.outs.items()}

    def cached(path: Path) -> Path:
        return lockfile.object_path(cache, md5[str(path)])

    files = [cached(paths.scores(variant)) for variant in (paths.variant(None), *map(paths.variant, seeds))]
    data = dict(lockfile.listing_of(cache, md5[str(paths.DATA)]))
    written = cached(paths.predictions(paths.variant(seeds[0])))
    if not all(file.is_file() for file in [*files, written]):
        return None
    scores = [contracts.read(file, Scores) for file in files]
    scored = lockfile.object_path(cache, data.get(paths.split(scores[0].decoding.split).name, ""))
    if not scored.is_file():
        return None
    references = {row.id: row.target for row in records.read_rows(scored, records.Example)}
    texts = {row.id: row.text for row in records.read_rows(written, records.Prediction)}
    one = _of(name, given, scores, references, texts, run)
    summaries = [cached(paths.training_summary(seed)) for seed in seeds]
    if all(summary.is_file() for summary in summaries):
        trained = [contracts.read(summary, TrainingSummary) for summary in summaries]
        one.costs["trainable"] = trained[0].trainable_parameters
        one = replace(one, loss=fmean(summary.kept_loss for summary in trained))
    return one


def _from_run(run: Stored, tracking: params.Tracking) -> Experiment:
    with store.copied(run, tracking) as (folder, _):
        return of_artifacts(run, folder)


def of_artifacts(run: Stored, folder: Path) -> Experiment:
    """The experiment of a run, from its artifacts in `folder`; UserError if they hold no scores."""
    # By name: the run also holds what the base scores without training (`pipeline.score.baselines`).
    files = [folder / paths.SCORES.name / paths.scores(paths.variant(seed)).name for seed in (None, *run.seeds)]
    found = [contracts.read(file, Scores) for file in files if file.is_file()]
    if len(found) < 2:
        raise UserError(f"run {run.name} holds no scores, an earlier version recorded it: run its experiment again")
    table = records.read_json(folder / "tables" / "predictions.json")
    columns = dict(zip(table["columns"], zip(*table["data"], strict=True), strict=True))
    texts = columns["tuned"] if "tuned" in columns else columns[paths.variant(run.seeds[0])]
    references = dict(zip(columns["id"], columns["reference"], strict=True))
    return _of(run.name, run.params, found, references, dict(zip(columns["id"], texts, strict=True)), run)


def _of(
    name: str,
    given: Mapping[str, str],
    found: Sequence[Scores],
    references: dict[str, str],
    texts: dict[str, str],
    run: Stored | None,
) -> Experiment:
    base, *tuned = found
    logged = run.metrics if run else {}
    costs: dict[str, float] = {}
    for key, pattern, combine in COSTS:
        if values := [value for metric, value in logged.items() if re.fullmatch(pattern, metric)]:
            costs[key] = combine(values)
    kept = [value for metric, value in logged.items() if re.fullmatch(r"(seed-\d+/)?training/kept_loss", metric)]
    return Experiment(name, dict(given), base, tuned, references, texts, costs, fmean(kept) if kept else None)
