"""Trials on a Ray cluster: each task clones the commit on its node, and results travel through the shared remotes.

A node needs this project's environment, and access to the git remote, DVC's default remote and the MLflow server;
nothing else is shared. If a worker or a node dies, Ray runs the task again elsewhere. The new task finds what the dead
one had pushed, and writes no second record, because a trial is identified by its content.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core import git
from pipeline.core.errors import UserError, listing, without_passwords
from pipeline.core.progress import say
from pipeline.record.address import require_unsigned
from pipeline.search import trial
from pipeline.search.spec import Search
from pipeline.search.study import Judge

RETRIES = 3
"""How often Ray runs a task again if its worker died."""

SSH = ("ssh", "git+ssh", "ssh+git")


class Cluster:
    """Trials run as Ray tasks: up to `plan.at_once` at once, as many as the cluster has room for."""

    then = "dvc pull && "

    def __init__(self, plan: Search, source: trial.Source) -> None:
        import ray

        assert plan.cluster is not None
        self.source, self.folder, self.at_once = source, plan.cluster.folder, plan.at_once
        options = ray.remote(
            num_cpus=plan.cluster.cpus, num_gpus=plan.cluster.gpus, max_retries=RETRIES, retry_exceptions=False
        )
        self.task = options(_on_node)

    def start(self, job: trial.Job, judge: Judge) -> Any:
        return self.task.remote(self.source, self.folder, trial.run, job, judge)

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, trial.Outcome]]:
        import ray

        ended, _ = ray.wait(list(handles), num_returns=1)
        return [(handle, self._fetched(_outcome(handle))) for handle in ended]

    def test(self, job: trial.Job) -> trial.Outcome:
        return self._fetched(_outcome(self.task.remote(self.source, self.folder, trial.test, job)))

    def _fetched(self, outcome: trial.Outcome) -> trial.Outcome:
        """Fetch the experiments that the tasks have pushed."""
        if outcome.commit is not None:
            ref = trial.reference(self.source.commit, "*")
            with contextlib.suppress(UserError):  # the next one fetches them all
                git.run("fetch", "-q", self.source.url, f"+{ref}:{ref}")
        return outcome


@contextlib.contextmanager
def connected(plan: Search, here: trial.Source, address: str) -> Iterator[Cluster]:
    """The Ray cluster at `address`: `auto`, this machine's own, or `local`, one that ends with the search.

    UserError if Ray is missing, no cluster answers, no node has room for a trial, or nodes cannot reach the remotes.
    """
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
                f"no node of the cluster has what a trial takes, {plan.cluster.cpus} CPUs and {plan.cluster.gpus} "
                "GPUs: it would wait for ever"
            )
        say(f"{len(nodes)} Ray nodes")
        yield Cluster(plan, source)
    finally:
        ray.shutdown()


def shared(here: trial.Source) -> trial.Source:
    """The source of trials by addresses that other machines can reach; UserError lists everything that prevents it."""
    from dvc.repo import Repo

    problems = []
    url = git.ask("remote", "get-url", "origin")
    if not url:
        problems.append("git has no remote origin: `git remote add origin <url>`, then push")
    elif _holds_secret(url):
        problems.append(
            f"the address of the git remote origin, {without_passwords(url)}, holds a password or a token, and would "
            "travel to every node: remove it with `git remote set-url origin <address>`, and let git's credential "
            "helper or an SSH key provide it on each node"
        )
    else:
        if Path(url).is_dir():
            url = str(Path(url).resolve())
        unknown = ""
        try:
            git.run("fetch", "-q", "origin")
        except UserError as error:  # offline, what was fetched last decides
            unknown = f" (what was fetched last says so: {error})"
        if not git.ask("branch", "-r", "--contains", here.commit):
            problems.append(f"the commit is not at the git remote origin: `git push`{unknown}")
    with Repo() as repo:
        if not repo.config["core"].get("remote"):
            problems.append("DVC has no default remote: `dvc remote add --default <name> <url>`, commit, `dvc push`")
    uri = str(here.tracking.uri)
    if uri.startswith(("sqlite:", "file:")):
        problems.append(
            f"the MLflow store {uri} is a file on this machine: set MLFLOW_TRACKING_URI or tracking.uri to a server"
        )
    elif _holds_secret(uri):
        problems.append(
            f"the address of the MLflow store, {without_passwords(uri)}, holds a password or a token, and would travel "
            "to every node: set MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and MLFLOW_TRACKING_URI on each "
            "node instead"
        )
    if problems:
        raise listing(problems, "the nodes of a cluster could not share this project:")
    assert url is not None
    return replace(here, url=url, remote=True)


def _holds_secret(address: str) -> bool:
    """Whether an address holds a password, or a user name, which may be a token. Over SSH a name alone is no secret."""
    scheme, _, rest = address.partition("://")
    user, at, _ = re.split(r"[/?#]", rest)[0].rpartition("@")
    query = address[address.find("?") :] if "?" in address else ""
    named = bool(at) and (":" in user or scheme.lower() not in SSH)
    return named or without_passwords(query) != query


def _on_node(
    source: trial.Source, folder: str, call: Callable[..., trial.Outcome], job: trial.Job, *judge: Judge
) -> trial.Outcome:
    """Runs on a node: `trial.run` or `trial.test` with this node's cache, in a clone below `folder`.

    A UserError becomes a failed outcome.
    """
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    # Ray sets it to the CPUs of the task. Rounding depends on the number of threads, which runtime.threads sets.
    os.environ.pop("OMP_NUM_THREADS", None)
    address = str(source.tracking.uri)
    try:
        # This node's passwords may only be sent to an address that this node names itself.
        if os.environ.get("MLFLOW_TRACKING_URI") != address:
            require_unsigned(address, f"the MLflow store of this sweep is {address}")
        os.environ["MLFLOW_TRACKING_URI"] = address
        clone = place / "trials" / source.commit[:12] / job.name
        return call(replace(source, cache=str(place / "cache")), job, clone, *judge)
    except UserError as error:
        return trial.Outcome(trial.FAILED, log=str(error))


def _outcome(handle: Any) -> trial.Outcome:
    import ray

    try:
        outcome: trial.Outcome = ray.get(handle)
    except ray.exceptions.RayTaskError as error:
        return trial.Outcome(trial.FAILED, log=str(error))
    except ray.exceptions.RayError as error:
        return trial.Outcome(trial.FAILED, log=f"Ray gave up after {RETRIES} more tries: {error}")
    return outcome
