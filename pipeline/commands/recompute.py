"""The whole experiment once more, in a copy that shares nothing but downloads; what differs, and what may be why."""

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
    """Run the pipeline anew in a temporary folder, and print what differs, stage by stage; whether nothing does.

    The copy has the files that git knows or would take, with a cache and an MLflow store of its own. It is removed in
    the end, whatever happens. UserError when the pipeline fails there, with what it printed above.
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
    for line in environment(recorded.params, device) or [
        "environment: packages, machine and device are those of the recorded run"
    ]:
        say(line)
    return not differing


def compare(recorded: list[lockfile.Stage], again: list[lockfile.Stage]) -> list[str]:
    """What differs between two locked pipelines, a line each, in the order of `dvc.yaml`.

    The first stage whose outputs differ although its inputs agree is named as such: the cause is there.
    """
    lines: list[str] = []
    cause = False
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
            first = "" if cause else " (the first: here equal inputs gave other results)"
            lines.append(f"{then.name}: other outputs from equal inputs, {', '.join(outs)}{first}")
            cause = True
        elif inputs or outs:
            lines.append(f"{then.name}: other inputs, {', '.join(inputs)}; other outputs, {', '.join(outs) or 'none'}")
    return lines


def _differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _copy(copy: Path, given: params.Params) -> None:
    """The project's own files, in a git repository of their own; neither `dvc.lock` nor what stages wrote."""
    listed = git.run("ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "-z")
    names = {Path(name) for name in listed.split("\0") if name} - {paths.DVC_LOCK}
    # A local source may be ignored by git; one outside of the project, by a relative path, cannot come along.
    for local in (Path(source) for source, _ in given.sources):
        if not local.is_absolute() and local.exists():
            if ".." in local.parts:
                raise UserError(f"the source {local} lies outside of the project: name it by its absolute path first")
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
    # A session of its own, so that the stage, a grandchild, can be ended with it.
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
    """Let SIGTERM end this process as Ctrl-C does, through what cleans up."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(given: params.Params, device: str) -> list[str]:
    """What differs between the recorded run's packages, machine and device and those of now, a line each."""
    found = store.of_digest(identity.digest(identity.here(given.seeds)), store.stored(given.tracking))
    if not found:
        return ["environment: unknown of then, there is no finished run of this experiment"]
    now = {f"version.{name}": one for name, one in provenance.versions().items()}
    now |= {f"machine.{name}": str(fact) for name, fact in provenance.platform_facts().items()} | {"device": device}
    then = {name: value for name, value in found[0].tags.items() if name.startswith(("version.", "machine.", "device"))}
    return [f"environment: {name} was {then.get(name)}, is {now.get(name)}" for name in _differing(then, now)]
