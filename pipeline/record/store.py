"""The MLflow store: one complete run for each record, found again by its digest, sealed, and read back.

Others gather a record (`pipeline.record.track`, the claims' pipeline) before the store is opened. MLflow is imported
inside functions: it takes seconds, and the command line should not pay them.
"""

import contextlib
import functools
import json
import logging
import os
import shlex
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.record import address, provenance, reach, runs, seal
from pipeline.record.bounds import Bounds
from pipeline.record.runs import DIGEST, FINISHED, Record, Stored

VIEW = "scores"
"""The name of the view in the menu Views of MLflow's list of runs, which shows no score by itself."""

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
"""How long MLflow waits for a server, read when it is imported. By itself it tries for minutes: 7 times, 120 s each."""
SECONDS_TO_BEGIN = 15.0
"""How long a server may take for the first answer of all. It may be starting."""

# MLflow's server refuses larger batches.
MAX_PARAMS_A_BATCH, MAX_METRICS_A_BATCH = 100, 1000


@contextlib.contextmanager
def opened(tracking: params.Tracking) -> Iterator[Any]:
    """Yield MLflow's client for the store, under the store's lock and with MLflow kept quiet.

    The lock is held to the end: two processes that open a fresh SQLite store at once break its migrations for good,
    and two that look for one digest at once would both write it. UserError if the store refuses anything.
    """
    paths.require_utf8(paths.main_repository(), "the project is in")
    uri = address.tracking_uri(tracking)
    _require_reachable(tracking, uri)
    home = address.home(tracking)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"), warnings.catch_warnings():
        # MLflow calls what its dependencies deprecate. A user of this project cannot change that.
        warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        try:
            file = address.database(tracking)
            if file and not file.exists():
                # Whole or not at all: a process killed in the migrations would leave a file that nobody can open.
                with records.replacing(file) as temporary:
                    MlflowClient(tracking_uri=f"sqlite:///{temporary.as_posix()}").search_experiments()
            with Bounds.of(tracking).confined():
                yield MlflowClient(tracking_uri=uri)
        except MlflowException as error:
            raise UserError(
                f"the MLflow store {uri} refused: {str(error).partition(chr(10))[0]}\n"
                f"Mend the store or its address. {reach.KEPT}"
            ) from error


@functools.cache
def _require_reachable(tracking: params.Tracking, _uri: str) -> None:
    """Asked once a process and address: whoever opens a store often would send as many questions again."""
    reach.require_reachable(tracking, SECONDS_TO_BEGIN)


# Writing


def write(found: Sequence[Record], tracking: params.Tracking) -> list[tuple[Stored, str]]:
    """Write the records that the store does not have.

    Returns, for each record, its run and "recorded" or "already recorded". UserError if the store cannot be used.
    """
    with opened(tracking) as client:
        experiment_id = experiment(client, tracking)
        return [_written(client, experiment_id, record, Bounds.of(tracking)) for record in found]


def crown(tracking: params.Tracking, digest: str, sweep: str, table: Path) -> str | None:
    """Tag the finished run of a complete experiment as the winner of a sweep, and log the sweep's table into it.

    An earlier table is replaced. Returns the run's id; None if there is no such run.
    """
    with opened(tracking) as client:
        for run in _runs(client, experiment(client, tracking), DIGEST, digest):
            if run.info.status == FINISHED:
                Bounds.of(tracking).require_run(run.info.artifact_uri)
                _add(client, run, runs.WINNER, sweep)
                client.log_artifact(run.info.run_id, str(table), "sweep")
                return str(run.info.run_id)
    return None


def experiment(client: Any, tracking: params.Tracking) -> str:
    """Id of the MLflow experiment, which is created if needed.

    UserError if it was deleted, or if its artifacts are where they may not be.
    """
    from mlflow.exceptions import MlflowException

    own = Bounds.of(tracking)
    found = client.get_experiment_by_name(tracking.experiment)
    if found is None:
        # A server chooses the place of artifacts. Clients of a database do, by default in the working directory.
        location = None if address.is_served(own.store) else own.root.as_uri()
        try:
            client.create_experiment(tracking.experiment, artifact_location=location)
        except MlflowException as error:
            # The lock is this machine's: another machine may have created it on a server meanwhile.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(tracking.experiment)
    if found.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {shlex.quote(found.experiment_id)}"
        raise UserError(
            f"the MLflow experiment {tracking.experiment} was deleted: restore it with `{restore}`, or change "
            "tracking.experiment"
        )
    own.require_experiment(found.artifact_location)
    return str(found.experiment_id)


def _written(client: Any, experiment_id: str, record: Record, own: Bounds) -> tuple[Stored, str]:
    run = _finished(client, experiment_id, record, own)
    if run is None:
        return Stored.of(_write(client, experiment_id, record, own)), "recorded"
    _seen_again(client, run, record.tags)
    return Stored.of(run), "already recorded"


def _runs(client: Any, experiment_id: str, key: str, digest: str) -> list[Any]:
    """The runs of a digest, the oldest first."""
    found = client.search_runs([experiment_id], f"tags.`{key}` = '{digest}'", order_by=["attributes.start_time ASC"])
    return list(found)


def _finished(client: Any, experiment_id: str, record: Record, own: Bounds) -> Any:
    """The finished run of a digest, or None; half-written runs, left by a killed process, are deleted."""
    finished = None
    for run in _runs(client, experiment_id, record.key, record.digest):
        if run.info.status == FINISHED:
            finished = finished or run
        else:
            client.delete_run(run.info.run_id)
            own.delete(run)
    return finished


def _write(client: Any, experiment_id: str, record: Record, own: Bounds) -> Any:
    """Write one run whole; if anything interrupts it, its status is not FINISHED."""
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
        versions = {"packages": provenance.versions(), "machine": provenance.platform_facts()}
        client.log_dict(run_id, versions, "versions.json")
        if record.predictions:
            client.log_table(run_id, record.predictions, "tables/predictions.json")
        seal.put(client, run_id, record)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to see; RUNNING is not FINISHED either
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, FINISHED)
    _add_view(client, experiment_id, record)
    return client.get_run(run_id)


def _add_view(client: Any, experiment_id: str, record: Record) -> None:
    """Give the MLflow experiment its view, unless it has one, which the user may have changed."""
    tag = f"mlflow.sharedViewState.{VIEW}"
    decide_by = json.loads(record.params.get("compare.decide_by", "[]"))
    if not decide_by or tag in client.get_experiment(experiment_id).tags:
        return
    names = dict.fromkeys(point.name for point in record.metrics)
    columns = ["attributes.`Description`", "params.`lora.r`", "params.`train.learning_rate`"]
    columns += [f"metrics.`{metric}.{field}`" for metric in decide_by for field in ("base", "tuned", "diff")]
    columns += [f"metrics.`{name}`" for name in names if name.endswith("validation/loss")]
    order = {"orderByKey": f"metrics.`{decide_by[0]}.tuned`", "orderByAsc": False}
    state = json.dumps({**order, "selectedColumns": columns})
    now = round(time.time() * 1000)
    content = json.dumps({"name": VIEW, "createdAt": now, "updatedAt": now, "state": state})
    client.set_experiment_tag(experiment_id, tag, content)


def _seen_again(client: Any, run: Any, tags: Mapping[str, str]) -> None:
    """Add a record's name, commit and sweep to those of the finished run, which is changed in no other way."""
    for key in (runs.EXPERIMENTS, runs.COMMITS, runs.SWEEP):
        if key in tags:
            _add(client, run, key, tags[key])


def _add(client: Any, run: Any, key: str, name: str) -> None:
    """Add a name to a tag with a list of names, up to MLflow's limit."""
    known = [one for one in run.data.tags.get(key, "").split(", ") if one]
    value = ", ".join([*known, name])
    if name not in known and len(value) <= runs.MAX_TAG:
        client.set_tag(run.info.run_id, key, value)


# Reading


def stored(tracking: params.Tracking, key: str = DIGEST) -> list[Stored]:
    """The runs that this project wrote, the oldest first; none if there is no store.

    `key` is the tag that they have: `DIGEST` for complete experiments, `TRIAL` or `CLAIM`.
    """
    if address.is_missing(tracking):
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
            found += [Stored.of(run) for run in page]
            if not page.token:
                return found


def view(tracking: params.Tracking) -> str:
    """The path in MLflow's pages that shows the runs with their scores; empty if nothing is recorded.

    Of a server it is the whole address of that page, without credentials, or of the list of experiments.
    """
    server = address.server(tracking)
    if address.is_missing(tracking):
        return ""
    with opened(tracking) as client:
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is None:
            path = "#/experiments" if server else ""
        elif f"mlflow.sharedViewState.{VIEW}" in experiment.tags:
            path = f"#/experiments/{_number(experiment)}/runs?viewStateShareKey={VIEW}"
        else:
            path = f"#/experiments/{_number(experiment)}" if server else ""
    return f"{server}/{path}" if server else path


def shown(tracking: params.Tracking) -> str:
    """Where people see the store, without credentials: a server's page of the experiment, else the store's address.

    If the server does not answer: its list of experiments.
    """
    server = address.server(tracking)
    if server is None:
        return address.shown(tracking)
    with contextlib.suppress(UserError), opened(tracking) as client:
        experiment = client.get_experiment_by_name(tracking.experiment)
        if experiment is not None:
            return f"{server}/#/experiments/{_number(experiment)}"
    return f"{server}/#/experiments"


def _number(experiment: Any) -> str:
    """The experiment's id for an address. A server may say anything."""
    return quote(str(experiment.experiment_id), safe="")


@contextlib.contextmanager
def copied(run: Stored, tracking: params.Tracking) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a temporary folder with the artifacts of a run, and the manifest of the run as it is now."""
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as name:
        yield Path(name), read_back(tracking, run.run_id, Path(name))


def read_back(tracking: params.Tracking, run_id: str, folder: Path) -> dict[str, str]:
    """Copy the artifacts of a run to `folder`, and return the manifest of the run as it is now."""
    with opened(tracking) as client:
        run = client.get_run(run_id)
        Bounds.of(tracking).require_run(run.info.artifact_uri)
        # Artifact stores raise errors of their own if they have nothing of the run: then all files are missing.
        with contextlib.suppress(OSError):
            client.download_artifacts(run_id, "", str(folder))
        return seal.manifest_now(client, run, folder)


def finished(digest: str, tracking: params.Tracking) -> Stored | None:
    """The finished run of the complete experiment with this digest, the oldest of several; None if there is none."""
    return next(iter(runs.of_digest(digest, stored(tracking))), None)


def line(run: Stored, tracking: params.Tracking) -> str:
    """A run and its store, in one line."""
    return f"{run} in {address.shown(tracking)}"
