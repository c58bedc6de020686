"""A search over training parameters, declared in a file. Validation loss decides; the winner alone is tested, once.

Optuna suggests and prunes (`pipeline.search.study`), DVC runs, and MLflow records. One machine, a cluster
(`pipeline.search.cluster`), and a search that was killed and started again try the same trials and choose the same
winner.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from pipeline.check.check import Examiner
from pipeline.core import git, params, paths, records
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.record import identity, lockfile, provenance, store
from pipeline.record.address import tracking_uri
from pipeline.record.runs import NOTE, WINNER
from pipeline.search import grid, spec, trial
from pipeline.search.printing import print_table, quoted
from pipeline.search.spec import Search
from pipeline.search.study import Judge, Study, hydra


class Runner(Protocol):
    """A place where trials run. `start` begins a trial and returns a handle; `wait` returns the trials that end next,
    by their handles; `test` runs the winner's whole pipeline."""

    at_once: int
    then: str
    """The commands that bring outputs here after `dvc exp apply`."""

    def start(self, job: trial.Job, judge: Judge) -> Any: ...

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, trial.Outcome]]: ...

    def test(self, job: trial.Job) -> trial.Outcome: ...


class Local:
    """Trials run on this machine, each in a clone under `.sweeps/`."""

    then = ""

    def __init__(self, source: trial.Source, folder: Path, at_once: int) -> None:
        self.source, self.folder, self.at_once = source, folder, at_once
        self.pool = futures.ThreadPoolExecutor(at_once)

    def start(self, job: trial.Job, judge: Judge) -> "futures.Future[trial.Outcome]":
        return self.pool.submit(trial.run, self.source, job, self.folder / job.name, judge)

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, trial.Outcome]]:
        done, _ = futures.wait(handles, return_when=futures.FIRST_COMPLETED)
        return [(future, _outcome(future)) for future in done]

    def test(self, job: trial.Job) -> trial.Outcome:
        return trial.test(self.source, job, self.folder / job.name)


def _outcome(future: "futures.Future[trial.Outcome]") -> trial.Outcome:
    try:
        return future.result()
    except UserError as error:
        return trial.Outcome(trial.FAILED, log=str(error))


def search(path: Path, jobs: int | None, address: str | None) -> int:
    """Run the search that the file `path` declares, or continue it, and return the exit code.

    `jobs` trials run at once: here, or on the Ray cluster at `address`. Exit codes: 0, all trials ended and the winner
    is tested; 1, some failed, and each is printed with the last lines of its output; 130, interrupted. UserError,
    before anything runs, for mistakes in the file and for what is missing on this machine or cluster.
    """
    plan = spec.load(path)
    name = path.stem
    given = spec.check(plan, path)
    if jobs is not None and jobs > plan.at_once:
        raise UserError(
            f"-j {jobs} is more than at_once = {plan.at_once} in {path}, so trials would not know the outcomes that "
            "they depend on: lower -j, or raise at_once, which makes it another search"
        )
    grid.require_git()
    _require_optuna()
    # The files of a cluster's machines are not here.
    if address is None and (problems := Examiner().problems(given.model_dump(mode="json"), str(paths.PARAMS))):
        raise listing(problems, f"{path}: nothing was run:")
    with begun(path, given) as (here, folder), contextlib.ExitStack() as stack:
        runner: Runner
        if address is None:
            runner = Local(here, folder, jobs or 1)
        else:
            from pipeline.search import cluster

            runner = stack.enter_context(cluster.connected(plan, here, address))
        return _run(plan, Study(plan, name, given, here.commit), runner, here.tracking, folder)


@contextlib.contextmanager
def begun(path: Path, given: params.Params) -> Iterator[tuple[trial.Source, Path]]:
    """The source of the trials of the sweep that the file `path` declares, and its folder, which is locked.

    Ctrl-C ends this process, and the trials that run on this machine with it. UserError if another process runs this
    sweep, or if changes are not committed.
    """
    commit, within = _committed(path)
    uri = tracking_uri(given.tracking)
    # The rules for addresses in params.yaml do not hold for one from the user's environment: so no validation.
    tracking = params.Tracking.model_construct(uri=uri, experiment=given.tracking.experiment)
    folder = (paths.SWEEPS / path.stem).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process runs the sweep {path.stem}: wait for it, or end it") from None
    with lock:
        source = trial.Source(
            url=git.run("rev-parse", "--show-toplevel"), commit=commit, within=within,
            cache=str(lockfile.cache_folder(Path())), remote=False, tracking=tracking, sweep=path.stem,
            identity=(grid.identity("name"), grid.identity("email")),
        )  # fmt: skip
        try:
            yield source, folder
        except KeyboardInterrupt:
            say(f"\ninterrupted: `lora-repro sweep {path}` continues from here")
            sys.stdout.flush()
            os._exit(130)


def _run(plan: Search, study: Study, runner: Runner, tracking: params.Tracking, folder: Path) -> int:
    """Run the trials that have not ended, print and write their table, test the winner, and return the exit code."""
    _run_trials(study, runner, plan.total)
    rows = list(_rows(study, plan.total))
    print_table(_header(study)[:-1], [row[:-1] for row in rows])
    table = folder / f"{study.name}.csv"
    records.write_text(table, records.csv_text(_header(study), rows))
    failed = [number for number in range(plan.total) if study.ended[number].state == trial.FAILED]
    for number in failed:
        say(f"\n{study.jobs[number].name}: failed\n{quoted(study.ended[number].log)}")
    code = _test_winner(study, runner, tracking, table, plan.total)
    if failed:
        names = ", ".join(study.jobs[number].name for number in failed)
        say(f"\n{len(failed)} of {plan.total} trials failed: {names}; the same command tries them again")
    return 1 if failed else code


def _run_trials(study: Study, runner: Runner, total: int) -> None:
    """Begin trials in order, each as soon as every trial has ended that it depends on."""
    running: dict[Any, trial.Job] = {}
    begun = 0
    say(f"sweep {study.name}: {total} trials, {len(study.ended)} done before")
    while True:
        while begun < total and len(running) < runner.at_once and study.knows(begun):
            if begun not in study.ended:
                job = study.job(begun)
                running[runner.start(job, study.judge(begun))] = job
                say(f"{len(study.ended)}/{total} {job.name}: running ({job})")
            begun += 1
        if not running:
            break
        for handle, outcome in runner.wait(list(running)):
            job = running.pop(handle)
            study.add(job, outcome)
            loss = "" if outcome.loss is None else f", validation loss {outcome.loss:.4f}"
            say(f"{len(study.ended)}/{total} {job.name}: {outcome.state}{loss} ({job})")


def _test_winner(study: Study, runner: Runner, tracking: params.Tracking, table: Path, total: int) -> int:
    """Run the whole pipeline for the trial with the lowest validation loss, unless it has run; the exit code."""
    complete = [number for number in range(total) if study.ended[number].state == trial.COMPLETE]
    if not complete:
        say("no trial is complete, so there is no winner")
        return 1
    job = study.jobs[min(complete, key=study.place)]
    tested = trial.Job(job.number, f"{job.name}-tested", job.overrides, job.given)
    say(f"\nwinner on validation: {job.name} ({job}); only this trial is tested, as {tested.name}")
    outcome = runner.test(tested)
    if outcome.state == trial.FAILED:
        say(f"{tested.name}: failed; the same command tries it again\n{quoted(outcome.log)}")
        return 1
    digest = identity.digest_of(outcome.log, job.seeds)
    run = store.crown(tracking, digest, study.name, table)
    if run is None:
        say(f"{tested.name} has no MLflow run: `dvc exp apply {tested.name}`, then `dvc repro` records it")
        return 1
    runs = store.stored(tracking)
    verdict = next(one for one in runs if one.run_id == run).tags.get(NOTE, "").replace("**", "")
    say(f"{verdict}\n")
    earlier = [one for one in runs if study.name in one.tags.get(WINNER, "").split(", ") and one.run_id != run]
    if earlier:
        names = ", ".join(one.name for one in earlier)
        say(f"{names}, an earlier winner of this sweep, was tested too: the test split was used more than once\n")
    say(f"  record  run {run} in {tracking.uri}, with the table of all trials")
    say(f"  take it dvc exp apply {tested.name} && {runner.then}git add -u && git commit -m '{study.name}: {job.name}'")
    return 0


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(
            "a search needs Optuna: `pip install --require-hashes -r lock/search.txt` in the project folder"
        ) from None


def _committed(path: Path) -> tuple[str, str]:
    """The commit that trials start from, and the project's folder in the repository.

    UserError for changes that are not committed, except in the search's own file and in what `dvc repro` writes.
    """
    own, here = path.resolve(), Path.cwd()
    apart = [*provenance.RESULTS, *([own.relative_to(here).as_posix()] if own.is_relative_to(here) else [])]
    excluded = [f":(exclude){name}" for name in apart]
    changed = git.run("status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
    if changed:
        files = ", ".join(line[2:].strip() for line in changed.splitlines())
        raise UserError(f"trials start from the last commit, which lacks changes in {files}: `git commit` first")
    return git.run("rev-parse", "HEAD"), git.run("rev-parse", "--show-prefix")


def _rows(study: Study, total: int) -> Iterator[list[str]]:
    for number in range(total):
        outcome, job = study.ended[number], study.jobs[number]
        loss = "" if outcome.loss is None else f"{outcome.loss:.6f}"
        parameters = "" if outcome.parameters is None else str(outcome.parameters)
        values = [hydra(study.values[number][key]) for key in study.plan.parameters]
        yield [str(number), job.name, *values, outcome.state, loss, parameters, outcome.run or ""]


def _header(study: Study) -> list[str]:
    return ["trial", "experiment", *study.plan.parameters, "state", "validation_loss", "trainable", "run"]
