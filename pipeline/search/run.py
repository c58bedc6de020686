"""A search over training parameters, declared in a file: chosen on validation loss, the winner tested once.

Optuna suggests and prunes (`pipeline.search.study`); DVC runs; MLflow records. One machine, a cluster
(`pipeline.search.cluster`) and
a search that was killed and started again try the same and choose the same.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError, printable
from pipeline.core.progress import say
from pipeline.record import identity, lockfile, provenance, store
from pipeline.record.address import tracking_uri
from pipeline.record.runs import NOTE, WINNER
from pipeline.search import grid as sweep
from pipeline.search import spec as space
from pipeline.search import trial
from pipeline.search.spec import Search
from pipeline.search.study import Judge, Study, hydra


class Runner(Protocol):
    """Where trials run: `start` begins one, `wait` gives the next ones that ended of those begun, `then` is what brings
    outputs here after `dvc exp apply`."""

    at_once: int
    then: str

    def start(self, job: trial.Job, judge: Judge) -> Any: ...

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, trial.Outcome]]: ...

    def test(self, job: trial.Job) -> trial.Outcome: ...


class Local:
    """On this machine, each in a clone under `.sweeps/`."""

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
    """Run the search that the file `path` declares, or go on with it; the exit code.

    `jobs` trials at once here, or on the Ray cluster at `address`. 0: all trials ended, the winner is tested; 1: some
    failed, and the end names each with the last lines of its output; 130: interrupted. UserError before anything runs
    for what cannot work.
    """
    plan = space.load(path)
    name = path.stem
    given = space.check(plan, path)
    if jobs is not None and jobs > plan.at_once:
        raise UserError(
            f"-j {jobs} is more than at_once = {plan.at_once} in {path}, the number that may run without knowing of "
            "each other: raise that, which makes it another search, or lower -j"
        )
    sweep.require_git()
    _require_optuna()
    commit, within = _committed(path)
    uri = tracking_uri(given.tracking)
    # The address of the environment is the user's own: the rules for one in params.yaml are not for it.
    tracking = params.Tracking.model_construct(uri=uri, experiment=given.tracking.experiment)
    folder = (paths.SWEEPS / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"the sweep {name} is being run by another process: wait for it, or end that one") from None
    with lock, contextlib.ExitStack() as stack:
        here = trial.Source(
            url=_git("rev-parse", "--show-toplevel"), commit=commit, within=within,
            cache=str(lockfile.cache_folder(Path())), remote=False, tracking=tracking, sweep=name,
            identity=(_who("name"), _who("email")),
        )  # fmt: skip
        runner: Runner
        if address is None:
            runner = Local(here, folder, jobs or 1)
        else:
            from pipeline.search import cluster

            runner = stack.enter_context(cluster.connected(plan, here, address))
        study = Study(plan, name, given, commit)
        try:
            return _run(plan, study, runner, tracking, folder)
        except KeyboardInterrupt:
            say(f"\ninterrupted: `lora-repro sweep {path}` goes on from here")
            sys.stdout.flush()
            os._exit(130)  # what runs here ends with this process


def _run(plan: Search, study: Study, runner: Runner, tracking: params.Tracking, folder: Path) -> int:
    total = plan.total
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
    _print_table(study, total)
    table = folder / f"{study.name}.csv"
    records.write_text(table, records.csv_text(_header(study), _rows(study, total)))
    failed = [number for number in range(total) if study.ended[number].state == trial.FAILED]
    for number in failed:
        log = "\n".join(f"  | {line}" for line in study.ended[number].log.splitlines())
        say(f"\n{study.jobs[number].name}: failed\n{log}")
    code = _test_winner(study, runner, tracking, table, total)
    if failed:
        names = ", ".join(study.jobs[number].name for number in failed)
        say(f"\n{len(failed)} of {total} trials failed: {names}; the same command tries them again")
    return 1 if failed else code


def _test_winner(study: Study, runner: Runner, tracking: params.Tracking, table: Path, total: int) -> int:
    """Run the whole pipeline for the trial of the lowest validation loss, unless that was done; the exit code."""
    complete = [number for number in range(total) if study.ended[number].state == trial.COMPLETE]
    if not complete:
        say("no trial is complete: there is no winner")
        return 1
    job = study.jobs[min(complete, key=study.place)]
    tested = trial.Job(job.number, f"{job.name}-tested", job.overrides, job.given)
    say(f"\nwinner on validation: {job.name} ({job}); it alone is tested, as {tested.name}")
    outcome = runner.test(tested)
    if outcome.state == trial.FAILED:
        lines = "\n".join(f"  | {line}" for line in outcome.log.splitlines())
        say(f"{tested.name}: failed; the same command tries it again\n{lines}")
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
        say(f"an earlier winner of this sweep was tested too, {names}: the test split was looked at more than once\n")
    say(f"  record  run {run} in {tracking.uri}; it holds the table of the trials")
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
    """The commit that trials start from, and the project's folder in the repository; UserError unless all is in it, but
    the search's file and what `dvc repro` writes."""
    own, here = path.resolve(), Path.cwd()
    apart = [*provenance.RESULTS, *([own.relative_to(here).as_posix()] if own.is_relative_to(here) else [])]
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".",
        *(f":(exclude){name}" for name in apart),
    )  # fmt: skip
    if changed:
        files = ", ".join(line[2:].strip() for line in changed.splitlines())
        raise UserError(f"trials start from the last commit, and {files} differs from it: `git commit` first")
    return _git("rev-parse", "HEAD"), _git("rev-parse", "--show-prefix")


def _who(key: str) -> str:
    return os.environ.get(f"GIT_COMMITTER_{key.upper()}") or _git("config", f"user.{key}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip("\n")


def _rows(study: Study, total: int) -> Iterator[list[str]]:
    for number in range(total):
        outcome, job = study.ended[number], study.jobs[number]
        loss = "" if outcome.loss is None else f"{outcome.loss:.6f}"
        parameters = "" if outcome.parameters is None else str(outcome.parameters)
        values = [hydra(study.values[number][key]) for key in study.plan.parameters]
        yield [str(number), job.name, *values, outcome.state, loss, parameters, outcome.run or ""]


def _header(study: Study) -> list[str]:
    return ["trial", "experiment", *study.plan.parameters, "state", "validation_loss", "trainable", "run"]


def _print_table(study: Study, total: int) -> None:
    table = Table(*_header(study)[:-1], box=None, pad_edge=False)
    for row in _rows(study, total):
        table.add_row(*(escape(printable(cell)) for cell in row[:-1]))
    Console(soft_wrap=True, width=1000).print(table)  # as wide as the names are
