"""One complete MLflow run for each experiment, written after the fact from `dvc.lock` and the outputs.

A stage that DVC restores from its run cache executes no code, so a record kept by the stages themselves would be false.
The last stage therefore writes the whole record, and an experiment is known by a digest of what DVC locked: parameters
in, content out. Reproducing it, under whatever name, on whatever day, finds the run that is there.

MLflow is imported inside functions: it takes seconds, and the command line should not pay them.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import DataCard, QuantizedFacts, Receipt, TrainingSummary
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.core.records import Decoding
from pipeline.record import costs, identity, provenance, store
from pipeline.record.identity import Stages
from pipeline.record.store import Point, Record
from pipeline.score import side_by_side

COMMAND = "dvc repro --force --single-item track"
"""Writes the page, the MLflow run of the working directory, unless a finished one is there, and the receipt."""


def record(seeds: Sequence[int], tracking: params.Tracking) -> None:
    """Record the experiment in the working directory, unless it is recorded already, and write `paths.RECEIPT`.

    Before that, publish its comparison: DVC has removed the reports, and people read them whatever the store answers.

    UserError when `dvc.lock` or an output is missing, when `dvc.lock` mixes two experiments, for a metric that MLflow
    cannot hold, and for a store that cannot be used. A run is finished only when everything is in it.
    """
    publish()
    made = gather(seeds)
    _refuse_other_content(made, identity.here(seeds))
    [(run, word)] = store.write([made], tracking)
    contracts.write(paths.RECEIPT, Receipt(made.digest))
    say(f"{word}: {store.line(run, tracking)}")


def publish() -> None:
    """Copy what people read of `paths.COMPARISON`, which a cache may have restored, to `paths.REPORTS`."""
    for path in sorted(path for path in paths.COMPARISON.rglob("*") if path.is_file() and paths.is_published(path)):
        with records.replacing(paths.published(path)) as temporary:
            shutil.copyfile(path, temporary)


def describe(seeds: Sequence[int], tracking: params.Tracking) -> str:
    """Where the record of the working directory is, in one line; the store is opened only if it is there."""
    runs = store.of_digest(identity.digest(identity.here(seeds)), store.stored(tracking))
    if runs:
        return store.line(runs[0], tracking)
    return "not recorded: run `dvc repro` (or `dvc repro --single-item --force track` if that finds nothing to do)"


def _refuse_other_content(made: Record, stages: Stages) -> None:
    """UserError where an output that goes into the run is not what its stage wrote.

    DVC takes a file for what it was by time and size, and restores what has rotted in its cache.
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
        remedy = "`lora-repro verify` says what mends it"
        raise listing(changed, f"nothing is recorded of outputs that have changed on the disk; {remedy}:")


def gather(seeds: Sequence[int]) -> Record:
    """All that a run of the experiment in the working directory holds; UserError as of `record`."""
    stages = identity.here(seeds)
    digest = identity.digest(stages)
    sha, dirty = provenance.commit(Path())
    experiment = provenance.experiment()
    # Many experiments share a commit that they differ from: its name alone would be none.
    at_commit = sha and (f"{sha[:7]}+{digest[:7]}" if dirty else sha[:7])
    tags = {
        store.DIGEST: digest,
        store.EXPERIMENTS: experiment,
        store.COMMITS: sha,
        "mlflow.source.name": "dvc repro",
        store.COMMIT: sha,
        "git.dirty": str(dirty).lower() if sha else None,
        "device": contracts.read(paths.decoding(paths.variant(None)), Decoding).device,
        store.NOTE: paths.COMPARISON_MD.read_text(encoding="utf-8").split("\n", 1)[0][: store.MAX_TAG],
        "energy": _meters(seeds, Path()),
        **store.surroundings(),
    }
    files: list[tuple[Path, str | None]] = [(paths.DVC_LOCK, None), (paths.PARAMS, None), (paths.DATA_CARD, "data")]
    files += [(path, "models") for path in (paths.BASE_FACTS, paths.QUANTIZED_FACTS)]
    reports = (paths.METRICS, paths.COMPARISON_JSON, paths.COMPARISON_MD, paths.REPORT_HTML, paths.COMPARISON_SVG)
    files += [(path, "reports") for path in reports]
    files += [(folder, f"reports/{folder.name}") for folder in (paths.FIGURES, paths.TABLES)]
    files += [(paths.scores(variant), paths.SCORES.name) for variant in map(paths.variant, (None, *seeds))]
    for seed in seeds:
        files.append((paths.adapter(seed), f"adapter/{seed}"))
        files += [(path, "training") for path in (paths.training_summary(seed), paths.training_log(seed))]
        files.append((paths.forgetting(seed), paths.FORGETTING.name))
    if missing := [str(path) for path, _ in files if not path.exists()]:
        raise listing(missing, "outputs are missing, run `dvc repro` or `dvc checkout`:")
    metrics = [*_results(), *_training(seeds, Path()), *_costs(seeds, Path())]
    return Record(
        name=experiment or at_commit or digest[:12],
        tags={key: value for key, value in tags.items() if value is not None},
        params=_params(stages),
        metrics=metrics,
        predictions=_predictions(seeds),
        files=files,
    )


def gather_trial(root: Path, commit: str, seeds: Sequence[int], name: str, sweep: str, loss: float) -> Record:
    """All that the run of the trial `name` holds, whose outputs are in the project folder `root`."""
    stages = identity.stages_of_trial((root / paths.DVC_LOCK).read_text(encoding="utf-8"), seeds)
    files: list[tuple[Path, str | None]] = [(root / paths.DVC_LOCK, None), (root / paths.PARAMS, None)]
    for seed in seeds:
        files.append((root / paths.adapter(seed), f"adapter/{seed}"))
        files += [(root / path, "training") for path in (paths.training_summary(seed), paths.training_log(seed))]
    metrics = [Point("validation_loss", loss), *_training(seeds, root), *_costs(seeds, root)]
    device = contracts.read(root / paths.training_summary(seeds[0]), TrainingSummary).device
    note = f"Trial of sweep {sweep}: validation loss {loss:.4f}; not tested"
    tags = _trial_tags(commit, identity.digest(stages), name, sweep, note)
    tags |= {"trial.state": "complete", "device": device}
    return Record(name, tags, _params(stages), metrics, {}, files)


def gather_pruned(
    commit: str, given: Mapping[str, Any], name: str, sweep: str, curve: list[tuple[int, float]]
) -> Record:
    """What there is of a trial that was ended early: its parameters, and its validation losses until then."""
    values = dict(identity.flat(given))
    tags = _trial_tags(commit, "", name, sweep, f"Trial of sweep {sweep}: pruned; not tested")
    content = json.dumps([commit, values, curve], sort_keys=True)
    tags |= {store.TRIAL: records.sha256_text(content), "trial.state": "pruned"}
    points = [Point("validation/loss", loss, step) for step, loss in curve]
    return Record(name, tags, {key: store.cut(value, "params.yaml") for key, value in values.items()}, points, {}, [])


def _trial_tags(commit: str, digest: str, name: str, sweep: str, note: str) -> dict[str, str]:
    tags = {
        store.TRIAL: digest,
        "kind": "trial",
        store.SWEEP: sweep,
        store.EXPERIMENTS: name,
        "mlflow.source.name": "lora-repro sweep",
        store.NOTE: note,
    }
    # A trial differs from its commit in its parameters.
    return tags | {store.COMMITS: commit, store.COMMIT: commit, "git.dirty": "true"} | store.surroundings()


def _params(stages: Stages) -> dict[str, str]:
    return {key: store.cut(value, "params.yaml") for key, value in identity.params_of(stages).items()}


def _results() -> Iterator[Point]:
    """The comparison, the sizes of the data, and what quantization cost in quality."""
    yield from _numbers(records.read_json(paths.METRICS))
    for name, split in contracts.read(paths.DATA_CARD, DataCard).splits.items():
        yield Point(f"data/{name}_read", split.read)
        yield Point(f"data/{name}_rows", split.rows)
        yield Point(f"data/{name}_groups", split.groups)
    yield from _fields("quantize", contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts))


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
    """The fields of a record that hold numbers."""
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


def _costs(seeds: Sequence[int], root: Path) -> Iterator[Point]:
    """Time, memory and measured energy of each stage that this folder ran."""
    for stage, cost in costs.of_stages(seeds, root).items():
        if cost is not None:
            values = {
                "seconds": cost.seconds,
                "peak_mb": cost.peak_memory_mb,
                "peak_device_mb": cost.peak_device_memory_mb,
                "energy_kwh": cost.energy_kwh,
            }
            yield from (Point(f"cost/{stage}_{name}", value) for name, value in values.items() if value is not None)


def _meters(seeds: Sequence[int], root: Path) -> str | None:
    """What measured the energy of the stages that ran here, or why nothing did."""
    meters = dict.fromkeys(cost.energy_meter for cost in costs.of_stages(seeds, root).values() if cost)
    return "; ".join(meter for meter in meters if meter)[: store.MAX_TAG] or None


def _predictions(seeds: Sequence[int]) -> dict[str, list[Any]]:
    """One row a test example: its text, what each variant wrote, and each variant's scores."""
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
