"""One trial of a search: a DVC experiment in a clone of its own, trained and validated, never tested.

In a clone a trial locks nothing in the user's folder, reads no half-written file there, and leaves none if it is
killed; and a clone is the same on another machine. Only DVC's stages up to `train@<seed>` run in it, so no trial can
touch the test split; `test` runs the whole pipeline for the winner.

A trial first writes its outputs to the DVC cache, then its record to MLflow, then its commit to git: a trial whose
commit is found needs no computation. A killed trial leaves its clone, and the next attempt resumes from the checkpoints
in it.
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

from pipeline.core import contracts, git, params, paths
from pipeline.core.contracts import TrainingSummary, Validation
from pipeline.core.errors import UserError
from pipeline.core.progress import VALIDATIONS, say
from pipeline.record import identity, lockfile, store, track
from pipeline.record.runs import Record
from pipeline.search import leash
from pipeline.search.printing import quoted, tail

SECONDS_BETWEEN_LOOKS = 0.2

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"

BASE = ("prompts", "infer@base", "evaluate@base", *identity.BASELINES)
"""Stages whose results a trial takes over from its commit: they do not depend on the adapter."""

Curve = list[tuple[int, float]]
"""(training steps, validation loss) of a trial's first seed, in order."""


@dataclass(frozen=True, slots=True)
class Source:
    """The commit that trials start from, and where their results go.

    `url` is the repository that git clones, `within` the project's folder in it. `cache` is the DVC cache that trials
    on this machine share. `remote` says whether outputs travel through DVC's remote. `sweep` is the name of the search.
    `identity` is the name and the email that DVC commits under.
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
    """One trial before it has run: `overrides` as DVC takes them, `lora.r=8`; `given`, all parameters with them."""

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
    """How a trial ended. `loss` is the mean validation loss of its adapters, `log` the last output if it failed."""

    state: str
    curve: Curve = field(default_factory=list)
    loss: float | None = None
    parameters: int | None = None
    commit: str | None = None
    run: str | None = None
    log: str = ""


Judge = Callable[[Curve], bool]
"""Says whether a trial with this curve so far is to be pruned. It is never asked after the last validation: then there
is nothing left to save."""


def run(source: Source, job: Job, folder: Path, judge: Judge) -> Outcome:
    """Train and validate one trial in the clone `folder`, record it in MLflow, and remove the clone.

    A trial whose commit exists is not run again. A trial is pruned at the first validation that `judge` rejects, also
    if training had gone on before this process looked: pruning does not depend on the machine's speed.
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
                outcome = Outcome(FAILED, log=_end_of(log))
            else:
                _publish_cache(source, project, targets)
                outcome = _complete(source, job, project, commit)
                _publish_commit(source, folder, job.name)
        shutil.rmtree(folder)
        log.unlink(missing_ok=True)
        return outcome


def test(source: Source, job: Job, folder: Path) -> Outcome:
    """Run the whole pipeline, `track` included, with the winner's parameters in the clone `folder`.

    `Outcome.log` is the experiment's `dvc.lock`, or the end of the output if it failed.
    """
    with FileLock(f"{folder}.lock"):
        project = _clone(source, folder)
        commit = _fetched(source, folder, job.name)
        log = folder.with_suffix(".log")
        if commit is None:
            with _started(source, job, project, log, [], _environment(source)) as process:
                process.wait()
            if process.returncode == 0 and not (project / paths.RECEIPT).is_file():
                # `dvc repro --pull` skips a stage that has no cached outputs.
                subprocess.run(
                    ["dvc", "repro", "--force", "--single-item", "track"], cwd=project, env=_environment(source),
                    check=False, capture_output=True,
                )  # fmt: skip
            commit = _experiment(folder, source.commit, job.name)
            if process.returncode or commit is None or not (project / paths.RECEIPT).is_file():
                outcome = Outcome(FAILED, log=_end_of(log))
                shutil.rmtree(folder)
                return outcome
            _publish_cache(source, project, [])
            _publish_commit(source, folder, job.name)
        lock = git.run("show", f"{commit}:{Path(source.within, paths.DVC_LOCK).as_posix()}", cwd=folder)
        shutil.rmtree(folder)
        log.unlink(missing_ok=True)
        return Outcome(COMPLETE, commit=commit, log=lock)


def reference(commit: str, name: str) -> str:
    """The git reference of the DVC experiment `name` that started from `commit`."""
    return f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"


# The clone


def _clone(source: Source, folder: Path) -> Path:
    """Clone the commit into `folder`, with the checkpoints of an earlier clone; returns the project's folder in it."""
    scratch = folder / source.within / paths.SCRATCH
    kept = folder.with_suffix(".scratch")
    if scratch.is_dir() and not kept.exists():
        scratch.replace(kept)
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    git.run("clone", "-q", "--no-tags", "--no-checkout", source.url, folder.name, cwd=folder.parent)
    git.run("checkout", "-q", "--detach", source.commit, cwd=folder)
    for key, value in zip(("user.name", "user.email"), source.identity, strict=True):
        git.run("config", key, value, cwd=folder)
    project = folder / source.within
    if kept.is_dir():
        kept.replace(project / paths.SCRATCH)
    _configure(project, source)
    return project


def _forget_tests(project: Path, targets: Sequence[str]) -> None:
    """Remove the results of tests that the commit has: they belong to another adapter.

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
    """Remove an output from the clone; UserError if its path leads out of the clone."""
    try:
        path = paths.inside(project, name)
    except ValueError as error:
        raise UserError(f"{project / paths.DVC_LOCK}: {error}") from None
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _dvc(project: Path) -> Path:
    """The folder `.dvc` of a project, in its own folder or in one above it."""
    return next((folder / ".dvc" for folder in (project, *project.parents) if (folder / ".dvc").is_dir()), project)


def _configure(project: Path, source: Source) -> None:
    """Give the clone's DVC the shared cache, and the settings that only this machine's configuration holds."""
    from configobj import ConfigObj

    own = _dvc(Path(source.url) / source.within) / "config.local"
    config = ConfigObj(str(own) if not source.remote and own.is_file() else None)
    config.merge({"cache": {"dir": source.cache}})
    config.filename = str(_dvc(project) / "config.local")
    config.write()


def _started(
    source: Source, job: Job, project: Path, log: Path, targets: Sequence[str], environment: dict[str, str]
) -> "subprocess.Popen[bytes]":
    """Start DVC on an experiment, in a process group that ends when this process does."""
    settings = [word for override in job.overrides for word in ("-S", override)]
    pull = ["--pull"] if source.remote else []
    command = ["dvc", "exp", "run", *pull, "--name", job.name, *settings, *targets]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-I", leash.__file__, *command], cwd=project, env=environment,
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _environment(source: Source) -> dict[str, str]:
    """This process's environment without variables that lead DVC or git to another repository, and with the address of
    the sweep's MLflow store."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("DVC_", "GIT_DIR", "GIT_INDEX", "GIT_WORK")) or key == "DVC_SITE_CACHE_DIR"
    }
    programs = str(Path(sys.executable).parent)
    path = kept.get("PATH", "").split(os.pathsep)
    own = {"PATH": os.pathsep.join([programs, *path]), "DVC_NO_ANALYTICS": "1"}
    if not source.remote:
        own[paths.MAIN] = str(Path(source.url, source.within))
    return kept | own | {"MLFLOW_TRACKING_URI": str(source.tracking.uri)}


def _trained(source: Source, job: Job, project: Path, log: Path, targets: Sequence[str], judge: Judge) -> Curve | None:
    """Run DVC up to the adapters. If `judge` rejects the trial before that, end it and return its curve."""
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
    """The validations of one seed that its training has published. The last line may be incomplete, and is left out."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return _curve(Validation(int(line["step"]), float(line["loss"])) for line in lines if line["seed"] == seed)


def _curve(validations: Iterable[Validation]) -> Curve:
    """The curve of `validations`, by step. A validation that a resumed training published again counts once."""
    return sorted({one.step: one.loss for one in validations}.items())


def _rejected(curve: Curve, judge: Judge) -> Curve | None:
    """The shortest beginning of a curve that `judge` rejects; None if it rejects none."""
    return next((curve[:end] for end in range(1, len(curve) + 1) if judge(curve[:end])), None)


def _recorded(record: Record, source: Source) -> str:
    """Write a trial's run to MLflow, unless it exists, and return its id."""
    [(run, _)] = store.write([record], source.tracking)
    return run.run_id


def _complete(source: Source, job: Job, project: Path, commit: str) -> Outcome:
    """Record a trial whose outputs are in `project`, and return its outcome."""
    summaries = [contracts.read(project / paths.training_summary(seed), TrainingSummary) for seed in job.seeds]
    loss = fmean(one.kept_loss for one in summaries)
    record = track.gather_trial(project, source.commit, job.seeds, job.name, source.sweep, loss)
    run = _recorded(record, source)
    parameters = summaries[0].trainable_parameters
    return Outcome(COMPLETE, _curve(summaries[0].validation), loss, parameters, commit, run)


# Where results go


def _fetched(source: Source, folder: Path, name: str) -> str | None:
    """The commit of an experiment that is done, fetched into the clone; None if there is none."""
    ref = reference(source.commit, name)
    if not git.run("ls-remote", source.url, ref, cwd=folder):
        return None
    git.run("fetch", "-q", source.url, f"+{ref}:{ref}", cwd=folder)
    return _experiment(folder, source.commit, name)


def _restored(source: Source, folder: Path, project: Path, commit: str, targets: Sequence[str]) -> bool:
    """Bring the adapters of a finished experiment into the clone.

    False if the cache has lost them. Then the clone is at the search's commit again, without the experiment.
    """
    git.run("checkout", "-q", "--force", commit, cwd=folder)
    command = ["dvc", "pull" if source.remote else "checkout", *targets]
    done = subprocess.run(
        command, cwd=project, env=_environment(source), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return True
    say(f"a finished trial is computed again, because `{' '.join(command)}` failed:\n{quoted(tail(done.stdout))}")
    ref = git.run("for-each-ref", "--format=%(refname)", "--points-at", commit, cwd=folder).split()[0]
    git.run("update-ref", "-d", ref, cwd=folder)
    git.run("checkout", "-q", "--force", source.commit, cwd=folder)
    return False


def _experiment(folder: Path, commit: str, name: str) -> str | None:
    """The commit of the experiment `name`; None if the clone has none of that name."""
    return git.ask("rev-parse", "--verify", "--quiet", reference(commit, name), cwd=folder)


def _publish_cache(source: Source, project: Path, targets: Sequence[str]) -> None:
    """Push outputs and the run cache to DVC's remote, if results travel through it."""
    if not source.remote:
        return
    command = ["dvc", "push", "--run-cache", *(["--with-deps", *targets] if targets else [])]
    done = subprocess.run(
        command,
        cwd=project,
        env=_environment(source),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed:\n{tail(done.stdout)}")


def _publish_commit(source: Source, folder: Path, name: str) -> None:
    ref = reference(source.commit, name)
    git.run("push", "-q", source.url, f"+{ref}:{ref}", cwd=folder)


def _end_of(log: Path) -> str:
    return tail(log.read_text(encoding="utf-8", errors="replace"))
