"""The same search on one machine and on a Ray cluster that loses a worker: are the numbers the same?

    python -m bench.cluster [--default] [--remote folder|s3]

The project of `bench.sweeps` has a bare git repository as its origin, a DVC remote (a folder, or an S3 bucket of
a local `moto` server) and a local `mlflow server` on SQLite. Its search runs here first. A copy of the project as it
was before then runs it on two local Ray nodes, through the remotes and with another DVC cache; the first worker that
trains gets `kill -9`. Trials, losses and winner must be equal, and each trial be recorded once.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from bench import kills, sweeps
from pipeline.core import params
from pipeline.record import store
from pipeline.record.runs import TRIAL
from tests import ROOT

SECRETS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
"""`moto` accepts any."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default", action="store_true", help="the default experiment, on a few rows")
    parser.add_argument("--remote", choices=["folder", "s3"], default="folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cluster-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        project = sweeps.make_project(folder, given.default)
        remote = stack.enter_context(storage(folder, given.remote))
        share(project, remote, {"cpus": 1, "gpus": 0, "folder": str(folder / "node")})
        other = folder / "cluster" / "project"
        shutil.copytree(project, other, symlinks=True)
        print(sweeps.start(project, "sweep", "rates.yaml", "-j", "2").communicate()[0], flush=True)
        here = [(row["experiment"], row["validation_loss"]) for row in sweeps.table(project)]
        uri = stack.enter_context(server(folder))
        address = stack.enter_context(nodes(other, uri))
        search = sweeps.start(other, "sweep", "rates.yaml", "--ray", address, MLFLOW_TRACKING_URI=uri)
        killed = kill_one(folder / "node", search)
        print(search.communicate()[0], flush=True)
        there = [(row["experiment"], row["validation_loss"]) for row in sweeps.table(other)]
        trials = store.stored(params.Tracking(uri=uri, experiment="lora-repro"), TRIAL)
        finished = {run.tags[TRIAL] for run in trials if run.status == "FINISHED"}
        base = sweeps.stages(other).count("infer")
        winners = [winner(one) for one in (project, other)]
        print(
            f"{len(there)} trials over {given.remote} remote and server, worker killed: {'yes' if killed else 'no'}, "
            f"{len(finished)} recorded by {len(trials)} runs, base inference {base} times, "
            f"{'same' if winners[0] == winners[1] else 'another'} winner, "
            f"numbers {'equal' if here == there else 'differ'}"
        )
        fine = here == there and winners[0] == winners[1] != [] and base == 0 and killed and search.returncode == 0
        return 0 if fine and len(finished) == len(trials) == len(there) == sweeps.TRIALS else 1


def winner(project: Path) -> list[str]:
    refs = subprocess.run(
        ["git", "for-each-ref", "refs/exps"], cwd=project, capture_output=True, text=True, encoding="utf-8"
    ).stdout
    return [line.rpartition("/")[2] for line in refs.splitlines() if line.endswith("-tested")]


@contextlib.contextmanager
def storage(folder: Path, kind: str) -> Iterator[dict[str, str]]:
    """Start the storage of a DVC remote; yields the remote's configuration."""
    if kind == "folder":
        yield {"url": str(folder / "remote")}
        return
    os.environ.update(SECRETS)
    port = free_port()
    with started([sys.executable, "-m", "moto.server", "-p", str(port)], folder / "moto.log"):
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(endpoint)
        import boto3

        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="bucket")
        yield {"url": "s3://bucket/dvc", "endpointurl": endpoint}


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of an MLflow server on SQLite that keeps artifacts itself."""
    port = free_port()
    store = folder / "server"
    store.mkdir()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--artifacts-destination", str(store / "artifacts"),
    ]  # fmt: skip
    with started(command, folder / "server.log"):
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def nodes(project: Path, uri: str) -> Iterator[str]:
    """The address of a Ray cluster of two nodes on this machine, one trial each."""
    os.environ.update(kills.environment(project), PYTHONPATH=str(ROOT), BENCH_LOG=str(sweeps.log(project)))
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", MLFLOW_TRACKING_URI=uri)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield str(cluster.address)
    finally:
        cluster.shutdown()


def share(project: Path, remote: dict[str, str], node: dict[str, object]) -> None:
    """Give the project its remotes, push what is computed, and say what a trial takes of a node."""
    run(project, "git", "init", "-q", "--bare", str(project.parent / "origin.git"))
    run(project, "git", "remote", "add", "origin", str(project.parent / "origin.git"))
    for key, value in remote.items():
        command = (
            ["remote", "add", "--default", "shared", value]
            if key == "url"
            else ["remote", "modify", "shared", key, value]
        )
        run(project, "dvc", *command)
    YAML().dump(sweeps.PLAN | {"cluster": node}, project / "rates.yaml")
    run(project, "git", "commit", "-qam", "remotes")
    run(project, "git", "push", "-q", "origin", "HEAD")
    run(project, "dvc", "push", "--run-cache")


def run(project: Path, *command: str) -> None:
    done = subprocess.run(
        command,
        cwd=project,
        env=kills.environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")


def kill_one(place: Path, search: "subprocess.Popen[str]") -> bool:
    """`kill -9` for the worker of the first trial whose training is on its way."""
    while search.poll() is None:
        for process in psutil.process_iter(["cmdline", "cwd"]):
            with contextlib.suppress(psutil.Error):
                words, cwd = process.info["cmdline"] or [], process.info["cwd"] or ""
                if "stages.train" in words and "python" in Path(words[0]).name and Path(cwd).is_relative_to(place):
                    worker = next(one for one in process.parents() if "".join(one.cmdline()[:1]).startswith("ray::"))
                    worker.send_signal(signal.SIGKILL)
                    return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[None]:
    """A server in a process group of its own, which is ended with all it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(address: str) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
