"""One complete MLflow run for each experiment, written after the fact from `dvc.lock` and the outputs.

A stage that DVC restores from its run cache executes no code, so stages cannot record themselves. The last stage
writes the whole record. A digest of what DVC locked, parameters and content, identifies an experiment: reproducing it
under another name or on another day finds the run that is there.

MLflow is imported inside functions: it takes seconds, and the command line should not pay them.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import Cost, DataCard, QuantizedFacts, Receipt, Scores, TrainingSummary
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.core.records import Decoding
from pipeline.record import costs, identity, looks, provenance, runs, store
from pipeline.record.identity import Stages
from pipeline.record.looks import Looks
from pipeline.record.runs import Point, Record
from pipeline.score import baselines, side_by_side

COMMAND = "dvc repro --force --single-item track"
"""Writes the page, the receipt, and the MLflow run of the working directory if it is not recorded yet."""

Files = list[tuple[Path, str | None]]
"""What goes into a run: each path with its folder there (None: the root)."""


def record(seeds: Sequence[int], tracking: params.Tracking) -> None:
    """Record the experiment in the working directory unless it is recorded already, and write `paths.RECEIPT`.

    First its reports are published: DVC has removed them, and people read them whatever the store answers. UserError
    if `dvc.lock` or an output is missing, if `dvc.lock` mixes two experiments, if MLflow cannot hold a metric, and if
    the store cannot be used. A run is finished only when everything is in it.
    """
    publish()
    made = gather(seeds)
    _require_unchanged(made, identity.here(seeds))
    [(run, word)] = store.write([made], tracking)
    contracts.write(paths.RECEIPT, Receipt(made.digest))
    say(f"{word}: {store.line(run, tracking)}")


def looks_here(seeds: Sequence[int], tracking: params.Tracking) -> Looks | None:
    """The looks at the split, with this experiment; None without scores, or if the store cannot be used."""
    if not paths.scores(paths.variant(None)).exists():
        return None
    return looks.read(looks.Look.of(_look(identity.here(seeds))), tracking)


def _look(stages: Stages) -> dict[str, str]:
    """The tags that say what the experiment with these stages was scored on, and by which rule."""
    scores = contracts.read(paths.scores(paths.variant(None)), Scores)
    return {
        runs.DIGEST: identity.digest(stages),
        runs.TEST: scores.test_sha256,
        runs.SPLIT: scores.decoding.split,
        runs.ANSWERS: identity.answers(stages),
        runs.RULE: identity.rule(stages),
    }


def publish() -> None:
    """Copy the reports from `paths.COMPARISON`, which a cache may have restored, to `paths.REPORTS`."""
    for path in sorted(path for path in paths.COMPARISON.rglob("*") if path.is_file() and paths.is_published(path)):
        with records.replacing(paths.published(path)) as temporary:
            shutil.copyfile(path, temporary)


def describe(seeds: Sequence[int], tracking: params.Tracking) -> str:
    """The run of the experiment in the working directory, in one line, or that it is not recorded."""
    run = store.finished(identity.digest_here(seeds), tracking)
    if run is None:
        return "not recorded: run `dvc repro` (or `dvc repro --single-item --force track` if that finds nothing to do)"
    return store.line(run, tracking)


def _require_unchanged(made: Record, stages: Stages) -> None:
    """UserError if an output that goes into the run is not what its stage wrote.

    DVC compares only the time and size of a file, and restores what has rotted in its cache.
    """
    recorded = [path for path, _ in made.files] + [paths.split("test"), *paths.PREDICTIONS.glob("*.jsonl")]
    changed = [
        f"{out}: not what stage {name} wrote"
        for name, stage in stages.items()
        for out, md5 in stage.outs.items()
        if any(path.is_relative_to(out) or Path(out).is_relative_to(path) for path in recorded)
        and records.dvc_md5(Path(out)) != md5
    ]
    if changed:
        remedy = "`lora-repro verify` says how to mend them"
        raise listing(changed, f"nothing is recorded, because outputs have changed on the disk; {remedy}:")


# What runs hold


def gather(seeds: Sequence[int]) -> Record:
    """The record of the experiment in the working directory; UserError as of `record`."""
    stages = identity.here(seeds)
    look = _look(stages)
    digest = look[runs.DIGEST]
    sha, dirty = provenance.commit(Path())
    experiment = provenance.experiment()
    spent = costs.of_stages(seeds)
    # Many experiments share the commit that they differ from, so its name alone would not tell them apart.
    at_commit = sha and (f"{sha[:7]}+{digest[:7]}" if dirty else sha[:7])
    tags = {
        **look,
        runs.EXPERIMENTS: experiment,
        runs.COMMITS: sha,
        "mlflow.source.name": "dvc repro",
        runs.COMMIT: sha,
        "git.dirty": str(dirty).lower() if sha else None,
        "device": contracts.read(paths.decoding(paths.variant(None)), Decoding).device,
        runs.NOTE: paths.COMPARISON_MD.read_text(encoding="utf-8").split("\n", 1)[0][: runs.MAX_TAG],
        "energy": _meters(spent),
        **runs.surroundings(),
    }
    files = _files(seeds)
    if missing := [str(path) for path, _ in files if not path.exists()]:
        raise listing(missing, "outputs are missing, run `dvc repro` or `dvc checkout`:")
    return Record(
        name=experiment or at_commit or digest[:12],
        tags={key: value for key, value in tags.items() if value is not None},
        params=_params(identity.params_of(stages)),
        metrics=[*_results(), *_baselines(), *_training(seeds, Path()), *_costs(spent)],
        predictions=_predictions(seeds),
        files=files,
    )


def _files(seeds: Sequence[int]) -> Files:
    """The files and folders of a complete experiment's run."""
    files: Files = [(paths.DVC_LOCK, None), (paths.PARAMS, None), (paths.DATA_CARD, "data")]
    files += [(paths.CONTAMINATION, None)]
    files += [(path, "models") for path in (paths.BASE_FACTS, paths.QUANTIZED_FACTS)]
    reports = (paths.METRICS, paths.COMPARISON_JSON, paths.COMPARISON_MD, paths.REPORT_HTML, paths.COMPARISON_SVG)
    files += [(path, "reports") for path in reports]
    files += [(folder, f"reports/{folder.name}") for folder in (paths.FIGURES, paths.TABLES)]
    files += [(paths.scores(variant), paths.SCORES.name) for variant in map(paths.variant, (None, *seeds))]
    for variant in baselines.VARIANTS:
        files += [(paths.scores(variant), paths.SCORES.name), (paths.predictions(variant), paths.PREDICTIONS.name)]
    for seed in seeds:
        files += [*_files_of_training(seed, Path()), (paths.forgetting(seed), paths.FORGETTING.name)]
    return files


def _files_of_training(seed: int, root: Path) -> Files:
    logs = [(root / path, "training") for path in (paths.training_summary(seed), paths.training_log(seed))]
    return [(root / paths.adapter(seed), f"adapter/{seed}"), *logs]


def gather_trial(root: Path, commit: str, seeds: Sequence[int], name: str, sweep: str, loss: float) -> Record:
    """The record of the trial `name`, whose outputs are in the project folder `root`."""
    stages = identity.stages_of_trial((root / paths.DVC_LOCK).read_text(encoding="utf-8"), seeds)
    files: Files = [(root / paths.DVC_LOCK, None), (root / paths.PARAMS, None)]
    for seed in seeds:
        files += _files_of_training(seed, root)
    metrics = [Point("validation_loss", loss), *_training(seeds, root), *_costs(costs.of_stages(seeds, root))]
    device = contracts.read(root / paths.training_summary(seeds[0]), TrainingSummary).device
    note = f"Trial of sweep {sweep}: validation loss {loss:.4f}; not tested"
    tags = _trial_tags(commit, identity.digest(stages), name, sweep, note)
    tags |= {"trial.state": "complete", "device": device}
    return Record(name, tags, _params(identity.params_of(stages)), metrics, {}, files)


def gather_pruned(
    commit: str, given: Mapping[str, Any], name: str, sweep: str, curve: list[tuple[int, float]]
) -> Record:
    """The record of a trial that was ended early: its parameters, and its validation losses until then."""
    values = dict(identity.flat(given))
    digest = records.sha256_text(json.dumps([commit, values, curve], sort_keys=True))
    tags = _trial_tags(commit, digest, name, sweep, f"Trial of sweep {sweep}: pruned; not tested")
    points = [Point("validation/loss", loss, step) for step, loss in curve]
    return Record(name, tags | {"trial.state": "pruned"}, _params(values), points, {}, [])


def _trial_tags(commit: str, digest: str, name: str, sweep: str, note: str) -> dict[str, str]:
    tags = {
        runs.TRIAL: digest,
        "kind": "trial",
        runs.SWEEP: sweep,
        runs.EXPERIMENTS: name,
        "mlflow.source.name": "lora-repro sweep",
        runs.NOTE: note,
        runs.COMMITS: commit,
        runs.COMMIT: commit,
        "git.dirty": "true",  # a trial differs from its commit in its parameters
    }
    return tags | runs.surroundings()


def _params(values: Mapping[str, str]) -> dict[str, str]:
    return {key: runs.cut(value, "params.yaml") for key, value in values.items()}


def _results() -> Iterator[Point]:
    """The comparison, the sizes of the data, and what quantization cost in quality."""
    yield from _numbers(records.read_json(paths.METRICS))
    for name, split in contracts.read(paths.DATA_CARD, DataCard).splits.items():
        yield Point(f"data/{name}_read", split.read)
        yield Point(f"data/{name}_rows", split.rows)
        yield Point(f"data/{name}_groups", split.groups)
    yield from _fields("quantize", contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts))


def _baselines() -> Iterator[Point]:
    """The scores of the variants of the base, over the rows that they answered."""
    for one in baselines.read():
        yield Point(f"{one.name}/rows", one.scores.n)
        yield from (Point(f"{one.name}/{metric}", value) for metric, value in one.scores.corpus.items())


def _numbers(value: Any, name: str = "") -> Iterator[Point]:
    """The leaves of `reports/metrics.json` by dotted name; UserError for one that is not a number."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else key)
    elif _is_number(value):
        yield Point(name, value)
    else:
        raise UserError(f"{paths.METRICS}: {name} = {value!r} is not a number")


def _fields(prefix: str, record: Any) -> Iterator[Point]:
    """The numeric fields of a record, as metrics."""
    for name, value in asdict(record).items():
        if _is_number(value) and name != "seed":
            yield Point(f"{prefix}/{name}", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _training(seeds: Sequence[int], root: Path) -> Iterator[Point]:
    for seed in seeds:
        prefix = f"seed-{seed}/" if len(seeds) > 1 else ""
        summary = contracts.read(root / paths.training_summary(seed), TrainingSummary)
        yield from _fields(f"{prefix}training", summary)
        for one in summary.validation:
            yield Point(f"{prefix}validation/loss", one.loss, one.step)
        for row in contracts.read_curve(root / paths.training_log(seed)):
            values = asdict(row)
            step = values.pop("step")
            yield from (Point(f"{prefix}train/{name}", float(value), step) for name, value in values.items())


def _costs(spent: Mapping[str, Cost | None]) -> Iterator[Point]:
    """Time, memory and measured energy of each stage that ran in this folder."""
    for stage, cost in spent.items():
        if cost is not None:
            values = {
                "seconds": cost.seconds,
                "peak_mb": cost.peak_memory_mb,
                "peak_device_mb": cost.peak_device_memory_mb,
                "energy_kwh": cost.energy_kwh,
            }
            yield from (Point(f"cost/{stage}_{name}", value) for name, value in values.items() if value is not None)


def _meters(spent: Mapping[str, Cost | None]) -> str | None:
    """What measured the energy of the stages that ran in this folder, or why it was not measured."""
    meters = dict.fromkeys(cost.energy_meter for cost in spent.values() if cost)
    return "; ".join(meter for meter in meters if meter)[: runs.MAX_TAG] or None


def _predictions(seeds: Sequence[int]) -> dict[str, list[Any]]:
    """The table of test examples: a row for each, with what each variant wrote and its scores."""
    rows = side_by_side.read(seeds)
    columns = {"base": [row.base for row in rows]}
    for i, seed in enumerate(seeds):
        columns["tuned" if len(seeds) == 1 else paths.variant(seed)] = [row.tuned[i] for row in rows]
    table: dict[str, list[Any]] = {
        "id": [row.example.id for row in rows],
        "aspect": [row.example.aspect for row in rows],
        "source": [row.example.source for row in rows],
        "reference": [row.example.target for row in rows],
    }
    table |= {column: [one.text for one in written] for column, written in columns.items()}
    return table | {
        f"{metric} {column}": [one.scores[metric] for one in written]
        for column, written in columns.items()
        for metric in rows[0].base.scores
    }
