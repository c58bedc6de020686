"""One trial of a search: a DVC experiment in a clone of its own, trained and validated, never tested.

A clone, because nothing of the user's folder is then locked, read half-written or left torn by a kill, and because it
is the same on another machine. Only DVC's stages up to `train@<seed>` run in it, so no trial can touch the test split;
the winner's whole pipeline is run by `test`. What is computed goes into the DVC cache, the experiment's commit into
git, and the record into MLflow, in this order: a trial that has its commit has everything. A killed one leaves its
clone, whose checkpoints the next one goes on from.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock
from ruamel.yaml import YAML

from pipeline.core import contracts, params, paths
from pipeline.core.contracts import TrainingSummary, Validation
from pipeline.core.errors import UserError
from pipeline.core.progress import VALIDATIONS
from pipeline.record import identity, lockfile, store, track
from pipeline.record.runs import Record
from pipeline.search import leash

SECONDS_BETWEEN_LOOKS = 0.2
LOG_LINES = 15

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"

BASE = ("infer@base", "evaluate@base")
"""What a trial keeps of its commit beside the stages that it runs: it is the same for every adapter."""

Curve = list[tuple[int, float]]
"""Validation losses of a trial's first seed, by the number of training steps before them."""


@dataclass(frozen=True, slots=True)
class Source:
    """What trials are made of, the same on every machine: a commit, and where results go.

    `url` is what git clones, `within` the project's folder in it. `cache` is the DVC cache that trials on this machine
    share. `remote` says whether what DVC computes travels through its remote. `identity` is the name and the email
    that DVC commits under.
    """

    url: str
    commit: str
    within: str
    cache: str
    remote: bool
    tracking: params.Tracking
    sweep: str
    identity: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Job:
    """One trial to be: `overrides` as DVC takes them, `lora.r=8`; `given` all parameters with them."""

    number: int
    name: str
    overrides: tuple[str, ...]
    given: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return " ".join(override for override in self.overrides if not override.startswith("seeds="))

    @property
    def seeds(self) -> list[int]:
        seeds: list[int] = self.given["seeds"]
        return seeds


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended. `loss` is the mean validation loss of its adapters; `log` the end of a failed one's output."""

    state: str
    curve: Curve = field(default_factory=list)
    loss: float | None = None
    parameters: int | None = None
    commit: str | None = None
    run: str | None = None
    log: str = ""


Judge = Callable[[Curve], bool]
"""Whether a trial with this curve so far is to be pruned. Never asked with the last validation: that one is done."""


def run(source: Source, job: Job, folder: Path, judge: Judge) -> Outcome:
    """Train and validate one trial in the clone `folder`, which is removed at the end, and record it in MLflow.

    A trial whose commit is there already is not run. It is pruned at the first validation that `judge` rejects, even
    where the training was faster than the look: what is pruned does not depend on the machine.
    """
    with FileLock(f"{folder}.lock"):
        project, log = _clone(source, folder), folder.with_suffix(".log")
        targets = [f"train@{seed}" for seed in job.seeds]
        commit = _fetched(source, folder, job.name)
        if commit and _restored(source, folder, project, commit, targets):
            outcome = _complete(source, job, project, commit)
        else:
            _forget_tests(project, targets)
            rejected = _trained(source, job, project, log, targets, judge)
            commit = _experiment(folder, source.commit, job.name)
            if rejected is None and commit is not None:
                summary = contracts.read(project / paths.training_summary(job.seeds[0]), TrainingSummary)
                rejected = _rejected(_curve(summary.validation)[:-1], judge)
            if rejected is not None:
                record = track.gather_pruned(source.commit, job.given, job.name, source.sweep, rejected)
                outcome = Outcome(PRUNED, rejected, run=_recorded(record, source))
            elif commit is None:
                outcome = Outcome(FAILED, log=_end(log))
            else:
                _publish_cache(source, project, targets)
                outcome = _complete(source, job, project, commit)
                _publish_commit(source, folder, job.name)
        shutil.rmtree(folder)
        log.unlink(missing_ok=True)
        return outcome


def test(source: Source, job: Job, folder: Path) -> Outcome:
    """Run the whole pipeline with the winner's parameters in the clone `folder`, `track` included; `Outcome.log` is the
    experiment's `dvc.lock`, or the end of the output of a failed one."""
    with FileLock(f"{folder}.lock"):
        project = _clone(source, folder)
        commit = _fetched(source, folder, job.name)
        log = folder.with_suffix(".log")
        if commit is None:
            with _started(source, job, project, log, [], _environment(source)) as process:
                process.wait()
            if process.returncode == 0 and not (project / paths.RECEIPT).is_file():
                # `dvc repro --pull` takes a stage without cached outputs for done.
                subprocess.run(
                    ["dvc", "repro", "--force", "--single-item", "track"], cwd=project, env=_environment(source),
                    check=False, capture_output=True,
                )  # fmt: skip
            commit = _experiment(folder, source.commit, job.name)
            if process.returncode or commit is None or not (project / paths.RECEIPT).is_file():
                outcome = Outcome(FAILED, log=_end(log))
                shutil.rmtree(folder)
                return outcome
            _publish_cache(source, project, [])
            _publish_commit(source, folder, job.name)
        lock = _git(folder, "show", f"{commit}:{Path(source.within, paths.DVC_LOCK).as_posix()}")
        shutil.rmtree(folder)
        log.unlink(missing_ok=True)
        return Outcome(COMPLETE, commit=commit, log=lock)


def reference(commit: str, name: str) -> str:
    """Where DVC keeps the experiment `name` that began at `commit`."""
    return f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"


# The clone


def _clone(source: Source, folder: Path) -> Path:
    """A new clone of the commit in `folder`, with the checkpoints of an earlier one; the project's folder in it."""
    scratch = folder / source.within / paths.SCRATCH
    kept = folder.with_suffix(".scratch")
    if scratch.is_dir() and not kept.exists():
        scratch.replace(kept)
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _git(folder.parent, "clone", "-q", "--no-tags", "--no-checkout", source.url, folder.name)
    _git(folder, "checkout", "-q", "--detach", source.commit)
    for key, value in zip(("user.name", "user.email"), source.identity, strict=True):
        _git(folder, "config", key, value)
    project = folder / source.within
    if kept.is_dir():
        kept.replace(project / paths.SCRATCH)
    _configure(project, source)
    return project


def _forget_tests(project: Path, targets: Sequence[str]) -> None:
    """Take out of the clone what its commit knows of tests: they are of another adapter than the trial's will be.

    Otherwise `dvc exp show` would print the commit's test scores beside every trial.
    """
    lock = project / paths.DVC_LOCK
    if not lock.is_file():
        return
    stages = lockfile.stages_of(lockfile.text(lock), str(lock))
    kept = {name: stage for name, stage in stages.items() if name in (*identity.UPSTREAM, *BASE, *targets)}
    for stage in (stage for name, stage in stages.items() if name not in kept):
        for out in stage.get("outs", []):
            _remove(project, out["path"])
    YAML().dump({"schema": "2.0", "stages": kept}, lock)


def _remove(project: Path, name: str) -> None:
    """Remove an output from the clone; UserError where its path leads out of it."""
    try:
        path = paths.inside(project, name)
    except ValueError as error:
        raise UserError(f"{project / paths.DVC_LOCK}: {error}") from None
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _dvc(project: Path) -> Path:
    """DVC's folder of a project: in it, or in a folder above."""
    return next((folder / ".dvc" for folder in (project, *project.parents) if (folder / ".dvc").is_dir()), project)


def _configure(project: Path, source: Source) -> None:
    """Give the clone's DVC the shared cache, and what only this machine's configuration has."""
    from configobj import ConfigObj

    own = _dvc(Path(source.url) / source.within) / "config.local"
    config = ConfigObj(str(own) if not source.remote and own.is_file() else None)
    config.merge({"cache": {"dir": source.cache}})
    config.filename = str(_dvc(project) / "config.local")
    config.write()


def _started(
    source: Source, job: Job, project: Path, log: Path, targets: Sequence[str], environment: dict[str, str]
) -> "subprocess.Popen[bytes]":
    """DVC at work on an experiment, in a process group that ends when this process does."""
    settings = [word for override in job.overrides for word in ("-S", override)]
    pull = ["--pull"] if source.remote else []
    command = ["dvc", "exp", "run", *pull, "--name", job.name, *settings, *targets]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-I", leash.__file__, *command], cwd=project, env=environment,
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _environment(source: Source) -> dict[str, str]:
    """This process's own, less what would lead DVC and git elsewhere; records go where the sweep's do."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("DVC_", "GIT_DIR", "GIT_INDEX", "GIT_WORK")) or key == "DVC_SITE_CACHE_DIR"
    }
    programs = str(Path(sys.executable).parent)
    path = kept.get("PATH", "").split(os.pathsep)
    own = {"PATH": os.pathsep.join([programs, *path]), "DVC_NO_ANALYTICS": "1"}
    return kept | own | {"MLFLOW_TRACKING_URI": str(source.tracking.uri)}


def _trained(source: Source, job: Job, project: Path, log: Path, targets: Sequence[str], judge: Judge) -> Curve | None:
    """Run DVC up to the adapters; where `judge` rejects the trial on the way, end it and give its curve."""
    published = (project / paths.SCRATCH / "validations.jsonl").resolve()
    published.parent.mkdir(exist_ok=True)
    published.unlink(missing_ok=True)
    environment = _environment(source) | {VALIDATIONS: str(published)}
    with _started(source, job, project, log, targets, environment) as process:
        assert process.stdin is not None
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            rejected = _rejected(_published(published, job.seeds[0]), judge)
            if rejected is not None:
                process.stdin.close()  # the leash ends DVC and what it started
                process.wait()
                return rejected
    return None


def _published(path: Path, seed: int) -> Curve:
    """What a training has published of one seed; the last line may be on its way."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return _curve(Validation(int(line["step"]), float(line["loss"])) for line in lines if line["seed"] == seed)


def _curve(validations: Iterable[Validation]) -> Curve:
    """By step; one that a resumed training published again counts once."""
    return sorted({one.step: one.loss for one in validations}.items())


def _rejected(curve: Curve, judge: Judge) -> Curve | None:
    """The shortest beginning of a curve that `judge` rejects."""
    return next((curve[:end] for end in range(1, len(curve) + 1) if judge(curve[:end])), None)


def _recorded(record: Record, source: Source) -> str:
    """The id of the run of a trial, which is written unless it is there."""
    [(run, _)] = store.write([record], source.tracking)
    return run.run_id


def _complete(source: Source, job: Job, project: Path, commit: str) -> Outcome:
    """The outcome of a trial whose outputs are in `project`, recorded."""
    summaries = [contracts.read(project / paths.training_summary(seed), TrainingSummary) for seed in job.seeds]
    loss = fmean(one.kept_loss for one in summaries)
    record = track.gather_trial(project, source.commit, job.seeds, job.name, source.sweep, loss)
    run = _recorded(record, source)
    parameters = summaries[0].trainable_parameters
    return Outcome(COMPLETE, _curve(summaries[0].validation), loss, parameters, commit, run)


# Where results go


def _fetched(source: Source, folder: Path, name: str) -> str | None:
    """The commit of an experiment that is done, taken into the clone."""
    ref = reference(source.commit, name)
    if not _git(folder, "ls-remote", source.url, ref):
        return None
    _git(folder, "fetch", "-q", source.url, f"+{ref}:{ref}")
    return _experiment(folder, source.commit, name)


def _restored(source: Source, folder: Path, project: Path, commit: str, targets: Sequence[str]) -> bool:
    """Bring a done experiment's adapters into the clone; where the cache has lost them, the clone is as it was."""
    _git(folder, "checkout", "-q", "--force", commit)
    command = ["dvc", "pull" if source.remote else "checkout", *targets]
    if subprocess.run(command, cwd=project, env=_environment(source), capture_output=True, check=False).returncode == 0:
        return True
    ref = next(line for line in _git(folder, "for-each-ref", "--format=%(refname)", "--points-at", commit).split())
    _git(folder, "update-ref", "-d", ref)
    _git(folder, "checkout", "-q", "--force", source.commit)
    return False


def _experiment(folder: Path, commit: str, name: str) -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", reference(commit, name)], cwd=folder, capture_output=True, text=True
    )
    return found.stdout.strip() or None


def _publish_cache(source: Source, project: Path, targets: Sequence[str]) -> None:
    """Push outputs and run cache to DVC's remote, where there is one between machines."""
    if not source.remote:
        return
    command = ["dvc", "push", "--run-cache", *(["--with-deps", *targets] if targets else [])]
    done = subprocess.run(
        command, cwd=project, env=_environment(source), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed:\n{_tail(done.stdout)}")


def _publish_commit(source: Source, folder: Path, name: str) -> None:
    ref = reference(source.commit, name)
    _git(folder, "push", "-q", source.url, f"+{ref}:{ref}")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def _end(log: Path) -> str:
    return _tail(log.read_text(encoding="utf-8", errors="replace"))


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LOG_LINES:])
