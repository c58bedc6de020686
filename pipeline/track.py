"""One complete MLflow run for each experiment, written after the fact from `dvc.lock` and the outputs.

A stage that DVC restores from its run cache executes no code, so a record kept by the stages themselves would be false.
The last stage therefore writes the whole record, and an experiment is known by a digest of what DVC locked: parameters
in, content out. Reproducing it, under whatever name, on whatever day, finds the run that is there.

MLflow is imported inside functions: it takes seconds, and the command line should not pay them.
"""

import contextlib
import csv
import hashlib
import json
import logging
import math
import os
import posixpath
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from ruamel.yaml import YAML

from pipeline import params, paths, provenance, records
from pipeline.errors import UserError, listing, without_passwords
from pipeline.progress import say

DIGEST = "dvc.digest"
TRIAL = "trial.digest"
"""Instead of `DIGEST` in the run of a sweep's trial, which was trained and validated, never tested."""
SWEEP, WINNER = "sweep", "sweep.winner"
"""The sweeps that a trial belongs to, and those that a complete experiment won."""
EXPERIMENTS = "dvc.experiments"
COMMITS = "dvc.commits"
NOTE = "mlflow.note.content"
COMMIT = "mlflow.source.git.commit"

VIEW = "scores"
"""The name of the view that MLflow's list of runs offers in its menu Views: by itself the list shows no score."""

MANIFEST = "manifest.json"
"""The artifact that holds the sha256 of everything in a run, by its place there; itself pinned by the tag `SEAL`."""
SEAL = "manifest.sha256"
SEALED_TAGS = ("dvc.digest", "trial.", "git.", "device", "machine.", "version.", "mlflow.source.", NOTE)
"""What the names of tags begin with that never change; a user may add others, and rename the run."""

# MLflow's limits; longer values are refused by its stores, larger batches by its server.
MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 8000, 250
MAX_PARAMS_A_BATCH, MAX_METRICS_A_BATCH = 100, 1000

UPSTREAM = ("prepare", "fetch", "quantize")
"""The stages that training rests on."""

Stages = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a metric; `step` is 0 for what has no curve."""

    name: str
    value: float
    step: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """All that goes into a run, gathered before the store is opened; `files` are (path, folder in the run)."""

    name: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: list[Point]
    predictions: dict[str, list[Any]]
    files: list[tuple[Path, str | None]]

    @property
    def key(self) -> str:
        """The tag that holds the digest: of a complete experiment, or of a trial."""
        return TRIAL if TRIAL in self.tags else DIGEST

    @property
    def digest(self) -> str:
        return self.tags[self.key]


@dataclass(frozen=True, slots=True)
class Stored:
    """A run as the store lists it, of each metric the last value; curves and artifacts are for `read_back`."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def track(train_seeds: list[int], tracking: params.Tracking) -> None:
    """Record the experiment in the working directory, unless it is recorded already, and write `paths.RECEIPT`.

    Before that, publish its comparison: DVC has removed the reports, and what the store refuses is read all the same.

    UserError when `dvc.lock` or an output is missing, when `dvc.lock` mixes two experiments, for a metric that MLflow
    cannot hold, and for a store that cannot be used. A run is FINISHED only when everything is in it.
    """
    publish()
    record = gather(train_seeds)
    _refuse_other_content(record, _stages(train_seeds))
    run, word = _written(record, tracking)
    records.write_json(paths.RECEIPT, {"digest": record.digest})
    say(f"{word}: {_line(run, tracking)}")


def publish() -> None:
    """Copy the files of `paths.COMPARISON`, which a cache may have restored, to `paths.REPORTS`."""
    for path in sorted(path for path in paths.COMPARISON.rglob("*") if path.is_file()):
        with records.replacing(paths.published(path)) as temporary:
            shutil.copyfile(path, temporary)


def write(record: Record, tracking: params.Tracking) -> str:
    """Record a trial unless it is recorded already; the id of its run. UserError as of `track`."""
    run, _ = _written(record, tracking)
    return str(run.info.run_id)


def _written(record: Record, tracking: params.Tracking) -> tuple[Any, str]:
    with _opened(tracking) as client:
        experiment_id = _experiment(client, tracking)
        run = _finished(client, experiment_id, record)
        if run is None:
            return _write(client, experiment_id, record), "recorded"
        _seen_again(client, run, record.tags)
        return run, "already recorded"


def crown(tracking: params.Tracking, digest: str, sweep: str, table: Path) -> str | None:
    """Tag the run of a complete experiment as the winner of a sweep, and log the sweep's table into it, in the place of
    an earlier one; the run's id, or None where there is no such run."""
    with _opened(tracking) as client:
        experiment_id = _experiment(client, tracking)
        for run in _runs(client, experiment_id, DIGEST, digest):
            if run.info.status == "FINISHED":
                _add(client, run, WINNER, sweep)
                client.log_artifact(run.info.run_id, str(table), "sweep")
                return str(run.info.run_id)
    return None


def describe(train_seeds: list[int], tracking: params.Tracking) -> str:
    """Where the record of the working directory is, in one line; the store is opened only if it is there."""
    digest = _digest(_stages(train_seeds))
    file = database(tracking)
    if file is None or file.exists():
        with _opened(tracking) as client:
            experiment = client.get_experiment_by_name(tracking.experiment)
            for run in _runs(client, experiment.experiment_id, DIGEST, digest) if experiment else []:
                if run.info.status == "FINISHED":
                    return _line(run, tracking)
    return "not recorded: run `dvc repro` (or `dvc repro --single-item --force track` if that finds nothing to do)"


# What an experiment is


def read_lock() -> str:
    """The text of `dvc.lock`; UserError where there is none."""
    try:
        return paths.DVC_LOCK.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{paths.DVC_LOCK} is missing: run `dvc repro`, which makes it") from None


def _stages(seeds: list[int]) -> Stages:
    return _locked(read_lock(), _names(seeds))


def _names(seeds: list[int]) -> list[str]:
    """The stages of a complete experiment, but for `track`."""
    names = [*UPSTREAM, "infer@base", "evaluate@base", "compare"]
    of_seeds = ("train", "infer-tuned", "forget", "evaluate-tuned")
    return names + [f"{stage}@{seed}" for seed in seeds for stage in of_seeds]


def _locked(lock: str, names: list[str]) -> Stages:
    """Parameters and outputs of some stages, as `{stage: {params, outs}}`, from the text of a `dvc.lock`.

    It also keeps stages that `dvc.yaml` no longer has, such as a seed's after the seeds changed: not these. UserError
    where a stage is missing, or read another adapter than the one there, as after `dvc repro train@17` alone.
    """
    locked = YAML(typ="safe", pure=True).load(lock)["stages"]
    if missing := [name for name in names if name not in locked]:
        raise UserError(f"{paths.DVC_LOCK} has no {', '.join(missing)}: run `dvc repro`")
    made = {out["path"]: out["md5"] for name in names for out in locked[name].get("outs", [])}
    adapters = paths.ADAPTERS.as_posix()
    for name in names:
        for dep in locked[name].get("deps", []):
            if dep["path"].startswith(f"{adapters}/") and made.get(dep["path"], dep["md5"]) != dep["md5"]:
                raise UserError(
                    f"{paths.DVC_LOCK} mixes two experiments, {name} was run with another {dep['path']}: run "
                    "`dvc repro`"
                )
    return {
        name: {
            "params": {
                key: value for of_file in locked[name].get("params", {}).values() for key, value in of_file.items()
            },
            "outs": {out["path"]: out["md5"] for out in locked[name].get("outs", [])},
        }
        for name in names
    }


def _digest(stages: Stages) -> str:
    canonical = json.dumps(stages, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def digest_of(lock: str, seeds: list[int]) -> str:
    """The digest of the experiment that the text of a `dvc.lock` holds; UserError where it lacks a stage."""
    return _digest(_locked(lock, _names(seeds)))


def params_of(lock: str, seeds: list[int]) -> dict[str, str]:
    """The parameters by dotted name, as a run has them, of the experiment that the text of a `dvc.lock` holds."""
    return _params(_locked(lock, _names(seeds)))


def outs_of(lock: str, seeds: list[int]) -> dict[str, dict[str, str]]:
    """The outputs of each stage, as `{stage: {path: md5}}`, that the text of a `dvc.lock` holds."""
    return {name: content["outs"] for name, content in _locked(lock, _names(seeds)).items()}


# What goes into its run


def _refuse_other_content(record: Record, stages: Stages) -> None:
    """UserError where an output that goes into the run is not what its stage wrote.

    DVC takes a file for what it was by time and size, and restores what has rotted in its cache.
    """
    recorded = [path for path, _ in record.files] + [paths.split("test"), *paths.PREDICTIONS.glob("*.jsonl")]
    changed = [
        f"{out}: not what stage {name} wrote"
        for name, content in stages.items()
        for out, md5 in content["outs"].items()
        if any(path.is_relative_to(out) or Path(out).is_relative_to(path) for path in recorded)
        and records.dvc_md5(Path(out)) != md5
    ]
    if changed:
        remedy = "`lora-repro verify` says what mends it"
        raise listing(changed, f"nothing is recorded of outputs that have changed on the disk; {remedy}:")


def gather(seeds: list[int]) -> Record:
    """All that a run of the experiment in the working directory holds; UserError as of `track`."""
    stages = _stages(seeds)
    digest = _digest(stages)
    sha, dirty = provenance.commit(Path())
    experiment = provenance.experiment()
    # Many experiments share a commit that they differ from: its name alone would be none.
    at_commit = sha and (f"{sha[:7]}+{digest[:7]}" if dirty else sha[:7])
    tags = {
        DIGEST: digest,
        EXPERIMENTS: experiment,
        COMMITS: sha,
        "mlflow.source.name": "dvc repro",
        COMMIT: sha,
        "git.dirty": str(dirty).lower() if sha else None,
        "device": records.read_json(paths.decoding("base"))["device"],
        NOTE: paths.COMPARISON_MD.read_text(encoding="utf-8").split("\n", 1)[0][:MAX_TAG],
        "energy": _meters(seeds, Path()),
        **_surroundings(),
    }
    files: list[tuple[Path, str | None]] = [(paths.DVC_LOCK, None), (paths.PARAMS, None), (paths.DATA_CARD, "data")]
    files += [(path, "models") for path in (paths.BASE_FACTS, paths.QUANTIZED_FACTS)]
    reports = (paths.METRICS, paths.COMPARISON_MD, paths.REPORT_HTML, paths.COMPARISON_SVG)
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
    _check(metrics)
    return Record(
        name=experiment or at_commit or digest[:12],
        tags={key: value for key, value in tags.items() if value is not None},
        params=_params(stages),
        metrics=metrics,
        predictions=_predictions(seeds),
        files=files,
    )


def gather_trial(root: Path, commit: str, seeds: list[int], name: str, sweep: str, loss: float) -> Record:
    """All that the run of the trial `name` holds, whose outputs are in the project folder `root`."""
    lock = (root / paths.DVC_LOCK).read_text(encoding="utf-8")
    stages = _locked(lock, [*UPSTREAM, *(f"train@{seed}" for seed in seeds)])
    files: list[tuple[Path, str | None]] = [(root / paths.DVC_LOCK, None), (root / paths.PARAMS, None)]
    for seed in seeds:
        files.append((root / paths.adapter(seed), f"adapter/{seed}"))
        files += [(root / path, "training") for path in (paths.training_summary(seed), paths.training_log(seed))]
    metrics = [Point("validation_loss", loss), *_training(seeds, root), *_costs(seeds, root)]
    _check(metrics)
    device = records.read_json(root / paths.training_summary(seeds[0]))["device"]
    note = f"Trial of sweep {sweep}: validation loss {loss:.4f}; not tested"
    tags = _trial_tags(commit, _digest(stages), name, sweep, note) | {"trial.state": "complete", "device": device}
    return Record(name, tags, _params(stages), metrics, {}, files)


def gather_pruned(
    commit: str, given: Mapping[str, Any], name: str, sweep: str, curve: list[tuple[int, float]]
) -> Record:
    """What there is of a trial that was ended early: its parameters, and its validation losses until then."""
    values = dict(leaf for section, value in given.items() for leaf in _flat(value, section))
    tags = _trial_tags(commit, "", name, sweep, f"Trial of sweep {sweep}: pruned; not tested")
    identity = json.dumps([commit, values, curve], sort_keys=True)
    tags |= {TRIAL: _sha256(identity), "trial.state": "pruned"}
    points = [Point("validation/loss", loss, step) for step, loss in curve]
    return Record(name, tags, {key: _cut(value) for key, value in values.items()}, points, {}, [])


def _trial_tags(commit: str, digest: str, name: str, sweep: str, note: str) -> dict[str, str]:
    tags = {
        TRIAL: digest,
        "kind": "trial",
        SWEEP: sweep,
        EXPERIMENTS: name,
        "mlflow.source.name": "lora-repro sweep",
        NOTE: note,
    }
    # A trial differs from its commit in its parameters.
    return tags | {COMMITS: commit, COMMIT: commit, "git.dirty": "true"} | _surroundings()


def _surroundings() -> dict[str, str]:
    """Tags that say on which machine, and with which versions, a record was made."""
    machine = {f"machine.{name}": str(fact) for name, fact in provenance.platform_facts().items()}
    return machine | {f"version.{package}": version for package, version in provenance.versions().items()}


def _params(stages: Stages) -> dict[str, str]:
    """Every parameter that a stage was locked with, by dotted name; UserError where two stages disagree."""
    merged: dict[str, str] = {}
    stage_of: dict[str, str] = {}
    for stage, content in stages.items():
        leaves = (leaf for section, value in content["params"].items() for leaf in _flat(value, section))
        for key, value in leaves:
            if merged.setdefault(key, value) != value:
                raise UserError(
                    f"{paths.DVC_LOCK} mixes two experiments, {key} differs between {stage_of[key]} and {stage}: "
                    "run `dvc repro`"
                )
            stage_of.setdefault(key, stage)
    return {key: _cut(value) for key, value in merged.items()}


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Leaves by dotted name: text as it is, the rest as JSON, as is a mapping with keys that MLflow refuses."""
    if isinstance(value, Mapping) and value and all(re.fullmatch(r"[\w\- ]+", str(key)) for key in value):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _cut(value: str) -> str:
    """`value` as long as MLflow takes it; the whole is in the run's params.yaml."""
    mark = " ... (cut: see params.yaml)"
    return value if len(value) <= MAX_PARAM else value[: MAX_PARAM - len(mark)] + mark


def _results() -> Iterator[Point]:
    """The comparison, the sizes of the data, and what quantization cost in quality."""
    yield from _numbers(records.read_json(paths.METRICS))
    for split, facts in records.read_json(paths.DATA_CARD)["splits"].items():
        for name in ("read", "rows", "groups"):
            yield Point(f"data/{split}_{name}", facts[name])
    for name, value in records.read_json(paths.QUANTIZED_FACTS).items():
        if _is_number(value):
            yield Point(f"quantize/{name}", value)


def _numbers(value: Any, name: str = "") -> Iterator[Point]:
    """The leaves of `reports/metrics.json` by dotted name; whatever is no number is refused, not skipped."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else key)
    elif _is_number(value):
        yield Point(name, value)
    else:
        raise UserError(f"{paths.METRICS}: {name} = {value!r} is not a number")


def _training(seeds: list[int], root: Path) -> Iterator[Point]:
    for seed in seeds:
        prefix = f"seed-{seed}/" if len(seeds) > 1 else ""
        summary = records.read_json(root / paths.training_summary(seed))
        for name, value in summary.items():
            if _is_number(value) and name != "seed":
                yield Point(f"{prefix}training/{name}", value)
        for entry in summary["validation"]:
            yield Point(f"{prefix}validation/loss", entry["loss"], entry["step"])
        with (root / paths.training_log(seed)).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                yield from (Point(f"{prefix}train/{name}", float(cell), step) for name, cell in row.items())


def _costs(seeds: list[int], root: Path) -> Iterator[Point]:
    """Time, memory and measured energy of each stage, where this folder ran it for the very result that is here now.

    A result restored from a cache cost this experiment nothing, and what it cost another is in the other's run.
    """
    for stage, cost in spent(seeds, root).items():
        names = {"seconds": "seconds", "peak_memory_mb": "peak_mb", "peak_device_memory_mb": "peak_device_mb"}
        names |= {"energy_kwh": "energy_kwh"}
        yield from (Point(f"cost/{stage}_{name}", cost[key]) for key, name in names.items() if key in cost)


def _meters(seeds: list[int], root: Path) -> str | None:
    """What measured the energy of the stages that ran here, or why nothing did."""
    costs = spent(seeds, root).values()
    meters = dict.fromkeys(str(cost["energy_meter"]) for cost in costs if "energy_meter" in cost)
    return "; ".join(meters)[:MAX_TAG] or None


def spent(seeds: list[int], root: Path) -> dict[str, dict[str, Any]]:
    """The cost of each stage (`stage.run`), empty where the folder did not run it for the result that is there now."""
    results = {"prepare": paths.DATA_CARD, "fetch": paths.BASE_FACTS, "quantize": paths.QUANTIZED_FACTS}
    results |= {"infer-base": paths.predictions(paths.variant(None))}
    for seed in seeds:
        results[f"train-{seed}"] = paths.training_summary(seed)
        results[f"infer-tuned-{seed}"] = paths.predictions(paths.variant(seed))
        results[f"forget-{seed}"] = paths.forgetting(seed)
    found: dict[str, dict[str, Any]] = {}
    for stage, result in results.items():
        noted = root / paths.costs(result)
        cost = records.read_json(noted) if noted.exists() else {}
        found[stage] = cost if cost and cost["result_sha256"] == records.sha256_path(root / result) else {}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(metrics: list[Point]) -> None:
    """UserError for names and values that MLflow refuses, or bends: it stores infinity as 1.8e308."""
    problems = {
        f"{point.name!r} is no name for a metric: letters, digits, and _ - . / only"
        for point in metrics
        if not re.fullmatch(r"[\w\-./]+", point.name)
        or posixpath.normpath(point.name) != point.name
        or point.name.startswith(("/", ".."))
        or len(point.name) > MAX_KEY
    }
    problems |= {
        f"{point.name} = {point.value} at step {point.step}" for point in metrics if not math.isfinite(point.value)
    }
    if problems:
        raise listing(sorted(problems), "MLflow cannot hold these metrics:")


def _predictions(seeds: list[int]) -> dict[str, list[Any]]:
    """One row a test example: its text, what each variant wrote, and each variant's scores."""
    variants = {"base": paths.variant(None)}
    variants |= {("tuned" if len(seeds) == 1 else paths.variant(seed)): paths.variant(seed) for seed in seeds}
    examples = records.read_rows(paths.split("test"), records.Example)
    table: dict[str, list[Any]] = {
        "id": [row.id for row in examples],
        "aspect": [row.aspect for row in examples],
        "source": [row.source for row in examples],
        "reference": [row.target for row in examples],
    }
    scores: dict[str, list[float]] = {}
    for column, variant in variants.items():
        written = records.read_rows(paths.predictions(variant), records.Prediction)
        scored = records.read_json(paths.scores(variant))["examples"]
        if not table["id"] == [row.id for row in written] == [row["id"] for row in scored]:
            raise UserError(f"predictions or scores of {variant} are not of this test split: run `dvc repro`")
        table[column] = [row.text for row in written]
        for metric in (name for name in scored[0] if name not in ("id", "group", "aspect")):
            scores[f"{metric} {column}"] = [row[metric] for row in scored]
    return table | scores


# The store


def tracking_uri(tracking: params.Tracking) -> str:
    """The store's address: the user's MLFLOW_TRACKING_URI, else `tracking.uri`, else SQLite in the main repository.

    Relative files are relative to the main repository, wherever an experiment runs. To be read before MLflow is told
    an address: it exports that as MLFLOW_TRACKING_URI into its own process.
    """
    root = provenance.main_repository()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri or "sqlite:///.mlflow/mlflow.db"
    if file := re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", uri):
        return f"sqlite:///{(root / file[1]).as_posix()}{file[2] or ''}"
    if re.match(r"[\w+.\-]+:", uri) is None and uri != "databricks":
        return (root / uri).as_uri()
    return uri


def database(tracking: params.Tracking) -> Path | None:
    """The file of a SQLite store; None for any other."""
    found = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", tracking_uri(tracking))
    return Path(found[1]) if found else None


def _home(tracking: params.Tracking) -> Path:
    """The folder for what belongs to a store on this machine: beside its database, or `.mlflow`."""
    file = database(tracking)
    return file.parent if file else provenance.main_repository() / ".mlflow"


@contextlib.contextmanager
def _opened(tracking: params.Tracking) -> Iterator[Any]:
    """Yield MLflow's client on the store, under its lock, with MLflow kept quiet.

    The lock is held to the end: two processes that open a fresh SQLite store at once break its migrations for good,
    and two that look for one digest at once would both write it.
    """
    uri = tracking_uri(tracking)
    home = _home(tracking)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"), warnings.catch_warnings():
        # MLflow's own calls of what its dependencies deprecate: nothing that a user of this project could mend.
        warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        try:
            file = database(tracking)
            if file and not file.exists():
                # Whole or not at all: a process killed in the migrations would leave one that none can open again.
                with records.replacing(file) as temporary:
                    MlflowClient(tracking_uri=f"sqlite:///{temporary.as_posix()}").search_experiments()
            yield MlflowClient(tracking_uri=uri)
        except MlflowException as error:
            raise UserError(
                f"the MLflow store {uri} refused: {str(error).splitlines()[0]}\n"
                "Nothing computed is lost: mend the store or its address, and run `dvc repro` again"
            ) from error


def _experiment(client: Any, tracking: params.Tracking) -> str:
    """Id of the MLflow experiment, created at need.

    A database leaves artifacts to its clients, whose default is a folder of the working directory: hence an absolute
    one. A server has its own.
    """
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        served = tracking_uri(tracking).startswith(("http:", "https:", "databricks"))
        location = None if served else (_home(tracking) / "artifacts").as_uri()
        return str(client.create_experiment(tracking.experiment, artifact_location=location))
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"the MLflow experiment {tracking.experiment} was deleted: restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, or change tracking.experiment"
        )
    return str(experiment.experiment_id)


def _runs(client: Any, experiment_id: str, key: str, digest: str) -> list[Any]:
    """The runs of a digest, the oldest first."""
    found = client.search_runs([experiment_id], f"tags.`{key}` = '{digest}'", order_by=["attributes.start_time ASC"])
    return list(found)


def _finished(client: Any, experiment_id: str, record: Record) -> Any:
    """The finished run of a digest, or None; half-written ones, which a killed process left, are deleted."""
    finished = None
    for run in _runs(client, experiment_id, record.key, record.digest):
        if run.info.status == "FINISHED":
            finished = finished or run
        else:
            _delete(client, run)
    return finished


def _delete(client: Any, run: Any) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client.delete_run(run.info.run_id)
    # Not every artifact store can delete: what is left there then belongs to a deleted run.
    with contextlib.suppress(MlflowException, NotImplementedError, OSError):
        get_artifact_repository(run.info.artifact_uri).delete_artifacts()


def _write(client: Any, experiment_id: str, record: Record) -> Any:
    """Write one run whole; whatever interrupts it, the run is not FINISHED."""
    from mlflow.entities import Metric, Param

    run_id = client.create_run(experiment_id, run_name=record.name, tags=record.tags).info.run_id
    try:
        given = [Param(key, value) for key, value in record.params.items()]
        for at in range(0, len(given), MAX_PARAMS_A_BATCH):
            client.log_batch(run_id, params=given[at : at + MAX_PARAMS_A_BATCH])
        now = round(time.time() * 1000)
        points = [Metric(point.name, float(point.value), now, point.step) for point in record.metrics]
        for at in range(0, len(points), MAX_METRICS_A_BATCH):
            client.log_batch(run_id, metrics=points[at : at + MAX_METRICS_A_BATCH])
        for path, folder in record.files:
            (client.log_artifacts if path.is_dir() else client.log_artifact)(run_id, str(path), folder)
        client.log_dict(
            run_id, {"packages": provenance.versions(), "machine": provenance.platform_facts()}, "versions.json"
        )
        if record.predictions:
            client.log_table(run_id, record.predictions, "tables/predictions.json")
        _seal(client, run_id, record)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to see; RUNNING is not FINISHED either
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    _arrange(client, experiment_id, record)
    return client.get_run(run_id)


def _arrange(client: Any, experiment_id: str, record: Record) -> None:
    """Give the MLflow experiment its view, unless it has one, which the user may have changed."""
    tag = f"mlflow.sharedViewState.{VIEW}"
    decide_by = json.loads(record.params.get("compare.decide_by", "[]"))
    if not decide_by or tag in client.get_experiment(experiment_id).tags:
        return
    names = dict.fromkeys(point.name for point in record.metrics)
    fields = ("base", "tuned", "diff")
    columns = ["attributes.`Description`", "params.`lora.r`", "params.`train.learning_rate`"]
    columns += [f"metrics.`{metric}.{field}`" for metric in decide_by for field in fields]
    columns += [f"metrics.`{name}`" for name in names if name.endswith("validation/loss")]
    order = {"orderByKey": f"metrics.`{decide_by[0]}.tuned`", "orderByAsc": False}
    now = round(time.time() * 1000)
    view = {
        "name": VIEW,
        "createdAt": now,
        "updatedAt": now,
        "state": json.dumps({**order, "selectedColumns": columns}),
    }
    client.set_experiment_tag(experiment_id, tag, json.dumps(view))


def _seal(client: Any, run_id: str, record: Record) -> None:
    """Write the manifest of a run that has everything else, and pin it."""
    content = manifest(record)
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        # As MLflow made them from what it was given.
        for written in ("versions.json", *(["tables/predictions.json"] if record.predictions else [])):
            content[f"artifacts/{written}"] = records.sha256_file(
                Path(client.download_artifacts(run_id, written, folder))
            )
        path = Path(folder) / MANIFEST
        records.write_json(path, content)
        client.log_artifact(run_id, str(path))
        client.set_tag(run_id, SEAL, records.sha256_file(path))


def manifest(record: Record) -> dict[str, str]:
    """sha256 of every parameter, metric with its curve, lasting tag and file of a record, by its place in the run."""
    points: dict[str, list[tuple[int, float]]] = {}
    for point in record.metrics:
        points.setdefault(point.name, []).append((point.step, float(point.value)))
    latest = {name: max(curve)[1] for name, curve in points.items()}
    files: dict[str, Path] = {}
    for path, folder in record.files:
        prefix = f"{folder}/" if folder else ""
        within = [(file, file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        files |= {f"{prefix}{relative.as_posix()}": file for file, relative in within or [(path, Path(path.name))]}
    return _manifest(record.params, record.tags, points, latest, files)


def _manifest(
    params: Mapping[str, str],
    tags: Mapping[str, str],
    points: Mapping[str, list[tuple[int, float]]],
    latest: Mapping[str, float],
    files: Mapping[str, Path],
) -> dict[str, str]:
    content = {f"params/{name}": _sha256(value) for name, value in params.items()}
    content |= {f"tags/{name}": _sha256(value) for name, value in tags.items() if name.startswith(SEALED_TAGS)}
    # MLflow keeps the last value of a curve a second time.
    content |= {
        f"metrics/{name}": _sha256(json.dumps([sorted(curve), latest.get(name)])) for name, curve in points.items()
    }
    return content | {f"artifacts/{name}": records.sha256_file(path) for name, path in files.items()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def stored(tracking: params.Tracking, key: str = DIGEST) -> list[Stored]:
    """The runs that this project wrote to its MLflow experiment, the oldest first; none where there is no store.

    With `key` = `TRIAL` those of trials, which no complete experiment is among."""
    file = database(tracking)
    if file is not None and not file.exists():
        return []
    with _opened(tracking) as client:
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            return []
        found, page = [], None
        while True:
            page = client.search_runs(
                [experiment.experiment_id], f"tags.`{key}` != ''", order_by=["attributes.start_time ASC"],
                page_token=page and page.token,
            )  # fmt: skip
            found += [
                Stored(
                    run.info.run_id,
                    run.info.run_name,
                    run.info.status,
                    dict(run.data.tags),
                    dict(run.data.params),
                    dict(run.data.metrics),
                )
                for run in page
            ]
            if not page.token:
                return found


def view(tracking: params.Tracking) -> str:
    """What follows the address of MLflow's page to see the runs with their scores; empty where none is recorded."""
    file = database(tracking)
    if file is not None and not file.exists():
        return ""
    with _opened(tracking) as client:
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None or f"mlflow.sharedViewState.{VIEW}" not in experiment.tags:
            return ""
        return f"#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={VIEW}"


def read_back(tracking: params.Tracking, run_id: str, folder: Path) -> dict[str, str]:
    """What `manifest` says, of a run as it is in the store now; its artifacts are copied to `folder`."""
    with _opened(tracking) as client:
        run = client.get_run(run_id)
        # An artifact store that has nothing of the run answers in its own way: then all files are missing.
        with contextlib.suppress(OSError):
            client.download_artifacts(run_id, "", str(folder))
        points = {
            name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
            for name in run.data.metrics
        }
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        files.pop(MANIFEST, None)
        return _manifest(run.data.params, run.data.tags, points, run.data.metrics, files)


def spoilt(run: Stored, now: Mapping[str, str], folder: Path) -> list[str]:
    """The places in a finished run that are not what was written there; `now` and `folder` are those of `read_back`."""
    path = folder / MANIFEST
    if not path.is_file():
        return [f"artifacts/{MANIFEST} is missing"]
    if records.sha256_file(path) != run.tags.get(SEAL):
        return [f"artifacts/{MANIFEST} is not the one that the tag {SEAL} pins"]
    written = records.read_json(path)
    changed = sorted(place for place in written if written[place] != now.get(place))
    # What a user adds to a run is no fault, except among the files that PEFT would load.
    added = sorted(place for place in now.keys() - written.keys() if place.startswith("artifacts/adapter/"))
    faults = [f"{place} {'is not what was written' if place in now else 'is missing'}" for place in changed]
    return faults + [f"{place} was added" for place in added]


def _seen_again(client: Any, run: Any, tags: Mapping[str, str]) -> None:
    """Add this experiment's name and commit to those that the finished run was seen with: its only change, ever."""
    for key in (EXPERIMENTS, COMMITS, SWEEP):
        if key in tags:
            _add(client, run, key, tags[key])


def _add(client: Any, run: Any, key: str, name: str) -> None:
    """Add a name to a tag that lists some, as long as MLflow takes it."""
    known = [one for one in run.data.tags.get(key, "").split(", ") if one]
    value = ", ".join([*known, name])
    if name not in known and len(value) <= MAX_TAG:
        client.set_tag(run.info.run_id, key, value)


def _line(run: Any, tracking: params.Tracking) -> str:
    return f"run {run.info.run_name} ({run.info.run_id}) in {without_passwords(tracking_uri(tracking))}"
