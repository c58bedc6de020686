"""Trials on a Ray cluster: each task clones the commit on its node, and results travel through the shared remotes.

A node needs this project's environment, the git remote, DVC's default remote and the MLflow server; nothing else is
shared. A task whose worker or node dies is run again by Ray elsewhere: what the dead one had pushed is found there,
and a record is written once, because a trial is known by its content.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError, without_passwords
from pipeline.core.progress import say
from pipeline.record.address import require_unsigned
from pipeline.search import trial
from pipeline.search.spec import Search
from pipeline.search.study import Judge

RETRIES = 3
"""How often a task is run again whose worker died."""

SSH = ("ssh", "git+ssh", "ssh+git")


class Cluster:
    """Where trials run: `plan.at_once` tasks at once, as far as the cluster has room for what each takes."""

    then = "dvc pull && "

    def __init__(self, plan: Search, source: trial.Source) -> None:
        import ray

        assert plan.cluster is not None
        self.source, self.folder, self.at_once = source, plan.cluster.folder, plan.at_once
        options = ray.remote(
            num_cpus=plan.cluster.cpus, num_gpus=plan.cluster.gpus, max_retries=RETRIES, retry_exceptions=False
        )
        self.trial, self.whole = options(_trial), options(_whole)

    def start(self, job: trial.Job, judge: Judge) -> Any:
        return self.trial.remote(self.source, job, self.folder, judge)

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, trial.Outcome]]:
        import ray

        ended, _ = ray.wait(list(handles), num_returns=1)
        return [(handle, self._fetched(_outcome(handle))) for handle in ended]

    def test(self, job: trial.Job) -> trial.Outcome:
        return self._fetched(_outcome(self.whole.remote(self.source, job, self.folder)))

    def _fetched(self, outcome: trial.Outcome) -> trial.Outcome:
        """Take the experiments that the tasks have pushed into this repository."""
        if outcome.commit is not None:
            ref = trial.reference(self.source.commit, "*")
            _git("fetch", "-q", self.source.url, f"+{ref}:{ref}")
        return outcome


@contextlib.contextmanager
def connected(plan: Search, here: trial.Source, address: str) -> Iterator[Cluster]:
    """The cluster at `address`: `auto` for the one that this machine is part of, `local` for one that lives as long as
    the search. UserError where its nodes could not reach what they need."""
    if plan.cluster is None:
        raise UserError("--ray needs `cluster: {cpus: ..., gpus: ..., folder: ...}` in the search's file")
    try:
        import ray
    except ImportError:
        raise UserError(
            "--ray needs Ray: `pip install --require-hashes -r lock/ray.txt` in the project folder, on every node"
        ) from None
    source = shared(here)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address=address, logging_level="WARNING", log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from None
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        wanted = {"CPU": plan.cluster.cpus, "GPU": plan.cluster.gpus}
        if not any(all(node["Resources"].get(key, 0) >= value for key, value in wanted.items()) for node in nodes):
            raise UserError(
                f"no node of the cluster has what cluster: asks for a trial, {plan.cluster.cpus} CPUs and "
                f"{plan.cluster.gpus} GPUs: it would wait for ever"
            )
        say(f"{len(nodes)} Ray nodes")
        yield Cluster(plan, source)
    finally:
        ray.shutdown()


def shared(here: trial.Source) -> trial.Source:
    """The source of trials as other machines can reach it; UserError with all that is in the way."""
    from dvc.repo import Repo

    problems = []
    url = _git("remote", "get-url", "origin")
    if not url:
        problems.append("git has no remote origin: `git remote add origin <url>`, then push")
    elif _holds_secret(url):
        problems.append(
            f"the address of the git remote origin, {without_passwords(url)}, holds a password or a token, and would "
            "travel to every node: take it out with `git remote set-url origin <address>`, and let git's credential "
            "helper, or an SSH key, give it on each node"
        )
    else:
        if Path(url).is_dir():
            url = str(Path(url).resolve())
        _git("fetch", "-q", "origin")
        if not _git("branch", "-r", "--contains", here.commit):
            problems.append("the commit is not at the git remote origin: `git push`")
    with Repo() as repo:
        if not repo.config["core"].get("remote"):
            problems.append("DVC has no default remote: `dvc remote add --default <name> <url>`, commit, `dvc push`")
    uri = str(here.tracking.uri)
    if uri.startswith(("sqlite:", "file:")):
        problems.append(
            f"the MLflow store {uri} is a file of this machine: set MLFLOW_TRACKING_URI or tracking.uri to a server"
        )
    elif _holds_secret(uri):
        problems.append(
            f"the address of the MLflow store, {without_passwords(uri)}, holds a password or a token, and would travel "
            "to every node: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on each node instead, and there "
            "MLFLOW_TRACKING_URI as well"
        )
    if problems:
        raise UserError("\n".join(["the nodes of a cluster could not share:", *(f"  - {one}" for one in problems)]))
    return replace(here, url=url, remote=True)


def _holds_secret(address: str) -> bool:
    """Whether an address holds a password, or a user name, which may be a token; over SSH a name alone is neither."""
    scheme, _, rest = address.partition("://")
    user, at, _ = re.split(r"[/?#]", rest)[0].rpartition("@")
    query = address[address.find("?") :] if "?" in address else ""
    named = bool(at) and (":" in user or scheme.lower() not in SSH)
    return named or without_passwords(query) != query


def _trial(source: trial.Source, job: trial.Job, folder: str, judge: Judge) -> trial.Outcome:
    """On a node: one trial."""
    return _on_node(source, folder, lambda own, place: trial.run(own, job, place / job.name, judge))


def _whole(source: trial.Source, job: trial.Job, folder: str) -> trial.Outcome:
    """On a node: the winner's whole pipeline."""
    return _on_node(source, folder, lambda own, place: trial.test(own, job, place / job.name))


def _on_node(source: trial.Source, folder: str, call: Callable[[trial.Source, Path], trial.Outcome]) -> trial.Outcome:
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    # Ray sets it to the CPUs of the task; rounding depends on threads, and runtime.threads says how many there are.
    os.environ.pop("OMP_NUM_THREADS", None)
    address = str(source.tracking.uri)
    try:
        if os.environ.get("MLFLOW_TRACKING_URI") != address:  # passwords of this node are for what this node names
            require_unsigned(address, f"the MLflow store of this sweep is {address}")
        os.environ["MLFLOW_TRACKING_URI"] = address
        return call(replace(source, cache=str(place / "cache")), place / "trials" / source.commit[:12])
    except UserError as error:
        return trial.Outcome(trial.FAILED, log=str(error))


def _outcome(handle: Any) -> trial.Outcome:
    import ray

    try:
        outcome: trial.Outcome = ray.get(handle)
    except ray.exceptions.RayTaskError as error:
        return trial.Outcome(trial.FAILED, log=str(error))
    except ray.exceptions.RayError as error:
        return trial.Outcome(trial.FAILED, log=f"Ray gave it up after {RETRIES} more tries: {error}")
    return outcome


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
