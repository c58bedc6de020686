"""Compute the whole experiment again in a copy that shares only downloads, and name what differs."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core import contracts, git, params, paths, records
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.core.records import Decoding
from pipeline.record import identity, lockfile, provenance, store


def run_again() -> bool:
    """Run the pipeline in a temporary copy, and print what differs, stage by stage. Returns whether all is equal.

    The copy has the files that git tracks or would add, a cache and an MLflow store of its own. It is always removed
    in the end. UserError if the pipeline fails there; what it printed is above.
    """
    recorded = lockfile.read()
    with _ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        copy = Path(folder) / Path.cwd().name
        _copy(copy, recorded.params)
        say(f"recomputing in {copy}")
        _reproduce(copy)
        again = lockfile.read(copy)
        device = contracts.read(copy / paths.decoding(paths.variant(None)), Decoding).device
    differing = compare(recorded.stages, again.stages)
    for line in differing or [f"{len(again.stages)} stages computed again: every parameter, input and output is equal"]:
        say(line)
    same = "environment: packages, machine and device are those of the recorded run"
    for line in environment(recorded.params, device) or [same]:
        say(line)
    return not differing


def compare(recorded: list[lockfile.Stage], again: list[lockfile.Stage]) -> list[str]:
    """The differences between two locked pipelines, a line for each stage, in the order of `dvc.yaml`.

    The first stage whose outputs differ although its inputs are equal is marked: the cause is there.
    """
    lines: list[str] = []
    marked = False
    for then, now in zip(recorded, again, strict=True):
        if then.locked is None or now.locked is None:
            lines.append(f"{then.name}: not run {'in the recorded experiment' if then.locked is None else 'again'}")
            continue
        inputs = [
            *_differing(lockfile.deps_of(then.locked), lockfile.deps_of(now.locked)),
            *_differing(lockfile.params_of(then.locked), lockfile.params_of(now.locked)),
        ]
        outs = _differing(lockfile.outs_of(then.locked), lockfile.outs_of(now.locked))
        if outs and not inputs:
            first = "" if marked else " (the first stage that gave other results from equal inputs)"
            lines.append(f"{then.name}: other outputs from equal inputs, {', '.join(outs)}{first}")
            marked = True
        elif inputs or outs:
            lines.append(f"{then.name}: other inputs, {', '.join(inputs)}; other outputs, {', '.join(outs) or 'none'}")
    return lines


def _differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _copy(copy: Path, given: params.Params) -> None:
    """Copy the project's files, without `dvc.lock` and outputs, into a git repository of their own."""
    listed = git.run("ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "-z")
    names = {Path(name) for name in listed.split("\0") if name} - {paths.DVC_LOCK}
    # git may ignore a local source. A relative path that leads out of the project would lead elsewhere in the copy.
    for local in (Path(source) for source, _ in given.sources):
        if not local.is_absolute() and local.exists():
            if ".." in local.parts:
                raise UserError(f"the source {local} is outside of the project: give its absolute path in params.yaml")
            names |= {local} if local.is_file() else set(records.files(local).values())
    for name in sorted(names):
        if name.is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, copy / name)
    git.run("init", "--quiet", str(copy))
    (copy / ".dvc" / "config.local").write_text("[cache]\n    dir = cache\n", encoding="utf-8")


def _reproduce(copy: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_"))}
    environment = {
        **kept,
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{(copy / '.mlflow' / 'mlflow.db').as_posix()}",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")]),
    }
    command = [sys.executable, "-m", "dvc", "repro", "--no-run-cache"]
    # In a session of its own, so that the stage, a grandchild, can be killed with it.
    with subprocess.Popen(command, cwd=copy, env=environment, start_new_session=True) as repro:
        try:
            failed = repro.wait()
        except BaseException:
            os.killpg(repro.pid, signal.SIGKILL)
            raise
    if failed:
        raise UserError(f"the recomputation failed with exit code {failed}: see above")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside the block, SIGTERM ends this process as Ctrl-C does, after it has cleaned up."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(given: params.Params, device: str) -> list[str]:
    """The differences in packages, machine and device between the recorded run and now, a line for each."""
    run = store.finished(identity.digest_here(given.seeds), given.tracking)
    if run is None:
        return ["environment: cannot be compared, there is no finished run of this experiment"]
    now = {f"version.{name}": one for name, one in provenance.versions().items()}
    now |= {f"machine.{name}": str(fact) for name, fact in provenance.platform_facts().items()} | {"device": device}
    then = {name: value for name, value in run.tags.items() if name.startswith(("version.", "machine.", "device"))}
    return [f"environment: {name} was {then.get(name)}, is {now.get(name)}" for name in _differing(then, now)]
