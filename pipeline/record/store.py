"""The MLflow store: one complete run for each record, found again by a digest, sealed, and read back.

What is recorded is gathered by others (`pipeline.record.track`, the claims' pipeline) before the store is opened.
MLflow is imported inside functions: it takes seconds, and the command line should not pay them.
"""

import contextlib
import json
import logging
import math
import os
import posixpath
import re
import shlex
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.core import params, records
from pipeline.core.errors import UserError, listing, without_passwords
from pipeline.record import bounds, provenance

DIGEST = "dvc.digest"
TRIAL = "trial.digest"
"""Instead of `DIGEST` in the run of a sweep's trial, which was trained and validated, never tested."""
CLAIM = "claim.digest"
"""Instead of `DIGEST` in the run of a checked claim."""
SWEEP, WINNER = "sweep", "sweep.winner"
"""The sweeps that a trial belongs to, and those that a complete experiment won."""
EXPERIMENTS = "dvc.experiments"
COMMITS = "dvc.commits"
NOTE = "mlflow.note.content"
COMMIT = "mlflow.source.git.commit"

FINISHED = "FINISHED"
"""The status of a run that is complete."""

COMMAND = 'MLFLOW_TRACKING_URI="$(lora-repro store)" mlflow'
"""MLflow's command line on the project's store, for a shell."""

VIEW = "scores"
"""The name of the view that MLflow's list of runs offers in its menu Views: by itself the list shows no score."""

MANIFEST = "manifest.json"
"""The artifact that holds the sha256 of everything in a run, by its place there; itself pinned by the tag `SEAL`."""
SEAL = "manifest.sha256"
SEALED_TAGS = ("dvc.digest", "trial.", "claim.", "git.", "device", "machine.", "version.", "mlflow.source.", NOTE)
"""What the names of tags begin with that never change; a user may add others, and rename the run."""

# MLflow's limits; longer values are refused by its stores, larger batches by its server.
MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 8000, 250
MAX_PARAMS_A_BATCH, MAX_METRICS_A_BATCH = 100, 1000


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a metric; `step` is 0 for what has no curve."""

    name: str
    value: float
    step: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """All that goes into a run, gathered before the store is opened; `files` are (path, folder in the run).

    UserError for a metric that MLflow cannot hold.
    """

    name: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: list[Point]
    predictions: dict[str, list[Any]]
    files: list[tuple[Path, str | None]]

    def __post_init__(self) -> None:
        _check(self.metrics)

    @property
    def key(self) -> str:
        """The tag that holds the digest: of a complete experiment, of a trial, or of a claim."""
        return next((key for key in (TRIAL, CLAIM) if key in self.tags), DIGEST)

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

    @property
    def finished(self) -> bool:
        """Whether everything is in it: a run that was interrupted is never finished."""
        return self.status == FINISHED

    @property
    def seeds(self) -> list[int]:
        """The training seeds, after which files in the run are named; UserError where these are other texts."""
        try:
            seeds = json.loads(self.params.get("seeds", "[]"))
        except ValueError:
            seeds = None
        if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
            raise UserError(f"run {self.name} ({self.run_id}) cannot be read: its seeds are no list of numbers")
        return seeds


def surroundings() -> dict[str, str]:
    """Tags that say on which machine, and with which versions, a record was made."""
    machine = {f"machine.{name}": str(fact) for name, fact in provenance.platform_facts().items()}
    return machine | {f"version.{package}": version for package, version in provenance.versions().items()}


def cut(value: str, whole: str) -> str:
    """A parameter as long as MLflow takes it; `whole` names the artifact that holds all of it."""
    mark = f" ... (cut: see {whole})"
    return value if len(value) <= MAX_PARAM else value[: MAX_PARAM - len(mark)] + mark


def write(found: Sequence[Record], tracking: params.Tracking) -> list[tuple[Stored, str]]:
    """Record what is not recorded yet; of each its run, and in words which of the two it was.

    UserError for a store that cannot be used.
    """
    with opened(tracking) as client:
        experiment_id = experiment(client, tracking)
        return [_written(client, experiment_id, record, _bounds(tracking)) for record in found]


def _written(client: Any, experiment_id: str, record: Record, own: bounds.Bounds) -> tuple[Stored, str]:
    run = _finished(client, experiment_id, record, own)
    if run is None:
        return _stored(_write(client, experiment_id, record, own)), "recorded"
    _seen_again(client, run, record.tags)
    return _stored(run), "already recorded"


def crown(tracking: params.Tracking, digest: str, sweep: str, table: Path) -> str | None:
    """Tag the run of a complete experiment as the winner of a sweep, and log the sweep's table into it, in the place of
    an earlier one; the run's id, or None where there is no such run."""
    with opened(tracking) as client:
        experiment_id = experiment(client, tracking)
        for run in runs(client, experiment_id, DIGEST, digest):
            if run.info.status == FINISHED:
                _bounds(tracking).require_run(run.info.artifact_uri)
                _add(client, run, WINNER, sweep)
                client.log_artifact(run.info.run_id, str(table), "sweep")
                return str(run.info.run_id)
    return None


def tracking_uri(tracking: params.Tracking) -> str:
    """The store's address: the user's MLFLOW_TRACKING_URI, else `tracking.uri`, else SQLite in the main repository.

    Relative files are relative to the main repository, wherever an experiment runs. UserError where params.yaml names
    what it may not (`bounds.require_address`).
    """
    root = provenance.main_repository()
    own = os.environ.get("MLFLOW_TRACKING_URI")
    uri = own or tracking.uri or "sqlite:///.mlflow/mlflow.db"
    if file := re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", uri):
        uri = f"sqlite:///{(root / file[1]).as_posix()}{file[2] or ''}"
    elif re.match(r"[\w+.\-]+:", uri) is None and uri != "databricks":
        uri = (root / uri).as_uri()
    if tracking.uri and not own:
        bounds.require_address(uri, root)
    return uri


def address(tracking: params.Tracking) -> str:
    """The store's address as it may be printed."""
    return without_passwords(tracking_uri(tracking))


def database(tracking: params.Tracking) -> Path | None:
    """The file of a SQLite store; None for any other."""
    found = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", tracking_uri(tracking))
    return Path(found[1]) if found else None


def _home(tracking: params.Tracking) -> Path:
    """The folder for what belongs to a store on this machine: beside its database, or `.mlflow`."""
    file = database(tracking)
    return file.parent if file else provenance.main_repository() / ".mlflow"


def _bounds(tracking: params.Tracking) -> bounds.Bounds:
    return bounds.Bounds(tracking_uri(tracking), _home(tracking) / "artifacts", database(tracking))


@contextlib.contextmanager
def opened(tracking: params.Tracking) -> Iterator[Any]:
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
            with _bounds(tracking).confined():
                yield MlflowClient(tracking_uri=uri)
        except MlflowException as error:
            raise UserError(
                f"the MLflow store {uri} refused: {str(error).partition(chr(10))[0]}\n"
                "Nothing computed is lost: mend the store or its address, and run `dvc repro` again"
            ) from error


def experiment(client: Any, tracking: params.Tracking) -> str:
    """Id of the MLflow experiment, created at need; UserError where its artifacts are kept where they may not be.

    A database leaves artifacts to its clients, whose default is a folder of the working directory: hence an absolute
    one. A server has its own.
    """
    from mlflow.exceptions import MlflowException

    own = _bounds(tracking)
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        location = None if bounds.served(own.store) else own.root.as_uri()
        try:
            client.create_experiment(tracking.experiment, artifact_location=location)
        except MlflowException as error:
            # The lock is this machine's: another one may have created it on a server meanwhile.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {shlex.quote(experiment.experiment_id)}"
        raise UserError(
            f"the MLflow experiment {tracking.experiment} was deleted: restore it with `{restore}`, or change "
            "tracking.experiment"
        )
    own.require_experiment(experiment.artifact_location)
    return str(experiment.experiment_id)


def runs(client: Any, experiment_id: str, key: str, digest: str) -> list[Any]:
    """The runs of a digest, the oldest first."""
    found = client.search_runs([experiment_id], f"tags.`{key}` = '{digest}'", order_by=["attributes.start_time ASC"])
    return list(found)


def _finished(client: Any, experiment_id: str, record: Record, own: bounds.Bounds) -> Any:
    """The finished run of a digest, or None; half-written ones, which a killed process left, are deleted."""
    finished = None
    for run in runs(client, experiment_id, record.key, record.digest):
        if run.info.status == FINISHED:
            finished = finished or run
        else:
            client.delete_run(run.info.run_id)
            own.delete(run)
    return finished


def _write(client: Any, experiment_id: str, record: Record, own: bounds.Bounds) -> Any:
    """Write one run whole; whatever interrupts it, the run is not FINISHED."""
    from mlflow.entities import Metric, Param

    run = client.create_run(experiment_id, run_name=record.name, tags=record.tags)
    run_id = run.info.run_id
    try:
        own.require_run(run.info.artifact_uri)
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
    client.set_terminated(run_id, FINISHED)
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
    content = {f"params/{name}": records.sha256_text(value) for name, value in params.items()}
    content |= {
        f"tags/{name}": records.sha256_text(value) for name, value in tags.items() if name.startswith(SEALED_TAGS)
    }
    # MLflow keeps the last value of a curve a second time.
    content |= {
        f"metrics/{name}": records.sha256_text(json.dumps([sorted(curve), latest.get(name)]))
        for name, curve in points.items()
    }
    return content | {f"artifacts/{name}": records.sha256_file(path) for name, path in files.items()}


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


def stored(tracking: params.Tracking, key: str = DIGEST) -> list[Stored]:
    """The runs that this project wrote to its MLflow experiment, the oldest first; none where there is no store.

    With `key` = `TRIAL` those of trials, which no complete experiment is among."""
    file = database(tracking)
    if file is not None and not file.exists():
        return []
    with opened(tracking) as client:
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            return []
        found, page = [], None
        while True:
            page = client.search_runs(
                [experiment.experiment_id], f"tags.`{key}` != ''", order_by=["attributes.start_time ASC"],
                page_token=page and page.token,
            )  # fmt: skip
            found += [_stored(run) for run in page]
            if not page.token:
                return found


def of_digest(digest: str, runs: Sequence[Stored]) -> list[Stored]:
    """Of the runs that `stored` lists, the finished ones of the experiment with this digest, the oldest first."""
    return [run for run in runs if run.finished and run.tags.get(DIGEST) == digest]


def _stored(run: Any) -> Stored:
    """A run as a store lists it; UserError for an id that MLflow would not make, which commands name.

    Texts that stand in lines of ours cannot begin lines of their own.
    """
    if not bounds.is_run_id(run.info.run_id):
        raise UserError(f"the MLflow store lists a run with the id {run.info.run_id!r}, and MLflow makes no such ids")
    tags = {key: in_line(value) for key, value in run.data.tags.items()}
    metrics = dict(run.data.metrics)
    name, status = in_line(run.info.run_name), in_line(run.info.status)
    return Stored(run.info.run_id, name, status, tags, dict(run.data.params), metrics)


def in_line(text: str) -> str:
    """A text of a store as it stands in a line of ours: it begins no line of its own."""
    return " ".join(text.splitlines())


def view(tracking: params.Tracking) -> str:
    """What follows the address of MLflow's page to see the runs with their scores; empty where none is recorded."""
    file = database(tracking)
    if file is not None and not file.exists():
        return ""
    with opened(tracking) as client:
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None or f"mlflow.sharedViewState.{VIEW}" not in experiment.tags:
            return ""
        return f"#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={VIEW}"


def read_back(tracking: params.Tracking, run_id: str, folder: Path) -> dict[str, str]:
    """What `manifest` says, of a run as it is in the store now; its artifacts are copied to `folder`."""
    with opened(tracking) as client:
        run = client.get_run(run_id)
        _bounds(tracking).require_run(run.info.artifact_uri)
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
    if not isinstance(written, dict):
        return [f"artifacts/{MANIFEST} is no manifest"]
    changed = sorted(place for place in written if written[place] != now.get(place))
    # What a user adds to a run is no fault, except among the files that PEFT would load.
    added = sorted(place for place in now.keys() - written.keys() if place.startswith("artifacts/adapter/"))
    faults = [f"{place} {'is not what was written' if place in now else 'is missing'}" for place in changed]
    return [in_line(fault) for fault in [*faults, *(f"{place} was added" for place in added)]]


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


def line(run: Stored, tracking: params.Tracking) -> str:
    """A run and its store, as a line of text names them."""
    return f"run {run.name} ({run.run_id}) in {address(tracking)}"
