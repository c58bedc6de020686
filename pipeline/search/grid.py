"""Every combination of some parameters, through DVC's queue; the end says what ran, what failed, and why.

`dvc exp run --run-all` exits with 0 when an experiment fails, and waits for ever when its workers find no `dvc`
(treeverse/dvc#10398, #10673). Here all combinations are checked before anything is queued, workers that vanish are
replaced, and the exit code says whether every experiment succeeded. DVC runs everything: `dvc queue status` and
`dvc exp show` list it.
"""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.check.check import Examiner
from pipeline.core import git, params, paths, yaml12
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.search.printing import LOG_LINES, print_table, quoted, tail

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_WITHOUT_A_WORKER = 30.0
"""When nothing has begun or ended for so long, the workers are counted. A worker takes some seconds to start."""
RESTARTS = 3

BASE = ("evaluate@base", "evaluate-unquantized", "evaluate-shots")
NOT_OF_THE_BASE = {"lora", "train", "seeds", "forget", "contamination", "compare", "tracking"}
"""The sections of parameters that neither `BASE` nor a stage before them reads."""

QUEUED, RUNNING, SUCCESS, FAILED, LOST = "Queued", "Running", "Success", "Failed", "Lost"
OPEN = (QUEUED, RUNNING)


@dataclass(frozen=True, slots=True)
class Combination:
    """One experiment before it has run: `overrides` as DVC takes them, `lora.r=8`."""

    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.overrides)


def sweep(overrides: Sequence[str], jobs: int) -> int:
    """Run an experiment for each combination of `overrides` (`lora.r=4,8`), `jobs` at once, and return the exit code.

    0: all succeeded. 1: some failed; each is printed with the last lines of its log. 130: interrupted; queued and
    running experiments of this sweep are removed. UserError, before anything is queued, where `dvc` or a git identity
    is missing, and for a combination that `params.yaml` does not allow.
    """
    _require_tools()
    combinations = expand(overrides)
    check(combinations)
    names: dict[str, Combination] = {}
    try:
        _base_first(combinations)
        for name, combination in _queue(combinations, overrides):
            names[name] = combination
            say(f"queued {name}: {combination}")
        states = _wait(names, jobs)
    except KeyboardInterrupt:
        _remove(names)
        return 130
    rows = [(name, str(combination), states[name].lower()) for name, combination in names.items()]
    print_table(("experiment", "parameters", "status"), rows)
    failed = [name for name in names if states[name] != SUCCESS]
    for name in failed:
        say(f"\n{name} ({names[name]}): {states[name].lower()}\n{quoted(tail(_dvc('queue', 'logs', name)))}")
    if failed:
        say(f"\n{len(failed)} of {len(names)} experiments failed: {', '.join(failed)}")
    return 1 if failed else 0


def expand(overrides: Sequence[str]) -> list[Combination]:
    """All combinations of `overrides`, in DVC's order; UserError for an override that DVC cannot read."""
    from dvc.utils.hydra import get_hydra_sweeps
    from hydra.errors import HydraException

    if not overrides:
        raise UserError("there is nothing to sweep over: give parameters and values, such as -S lora.r=4,8")
    params.require_plain("-S", overrides)
    try:
        return [
            Combination(tuple(made[str(paths.PARAMS)]))
            for made in get_hydra_sweeps({str(paths.PARAMS): list(overrides)})
        ]
    except HydraException as error:
        raise UserError(f"-S takes <parameter>=<value>,<value>...: {_first_line(error)}") from None


def check(combinations: Iterable[Combination]) -> None:
    """UserError that lists, for every combination, what DVC cannot set, and what `lora-repro check` would refuse."""
    from dvc.exceptions import InvalidArgumentError
    from dvc.utils.hydra import apply_overrides

    params.load()  # refuses aliases, which DVC's own reader would expand without end when it sets the overrides
    examiner = Examiner()
    problems: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / paths.PARAMS.name
        for combination in combinations:
            shutil.copy(paths.PARAMS, copy)
            try:
                apply_overrides(copy, list(combination.overrides))
                problems |= dict.fromkeys(examiner.problems(yaml12.read(copy), str(combination)))
            except InvalidArgumentError as error:
                problems[f"{combination}: {_first_line(error.__cause__ or error)}"] = None
    if problems:
        raise listing(problems, "nothing was queued:")


def _require_tools() -> None:
    if shutil.which("dvc") is None:
        raise UserError(
            "`dvc` is not on the PATH, so the queue's workers could not start: activate the virtual environment "
            "(source .venv/bin/activate)"
        )
    require_git()


def require_git() -> None:
    """UserError unless git knows an identity, under which DVC commits experiments, and a commit to start them from."""
    for key in ("name", "email"):
        if not identity(key):
            raise UserError(
                f"git has no user.{key}, and DVC commits experiments: set it with `git config user.{key} <...>`"
            )
    if git.ask("rev-parse", "--verify", "--quiet", "HEAD") is None:
        raise UserError("there is no commit that experiments could start from: `git add` and `git commit` first")


def identity(key: str) -> str:
    """The `name` or `email` that DVC commits under; empty where there is none."""
    return os.environ.get(f"GIT_COMMITTER_{key.upper()}") or git.ask("config", f"user.{key}") or ""


def _base_first(combinations: Iterable[Combination]) -> None:
    """Compute the base's scores here, if all experiments share them: workers that start together would each do it.

    UserError where that fails, since every experiment would fail with it.
    """
    changed = {override.lstrip("+~").split("=")[0].split(".")[0] for one in combinations for override in one.overrides}
    if changed <= NOT_OF_THE_BASE and subprocess.run(["dvc", "repro", *BASE], check=False).returncode:
        raise UserError(f"nothing was queued: {', '.join(BASE)} failed, and every experiment needs it")


def _queue(combinations: Sequence[Combination], overrides: Sequence[str]) -> Iterator[tuple[str, Combination]]:
    """Queue all combinations by one command, and yield each one's name. UserError with DVC's message if it refuses."""
    settings = itertools.chain.from_iterable(("-S", override) for override in overrides)
    command = ["dvc", "exp", "run", "--queue", *settings]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout is not None
        printed, left = [], iter(combinations)
        for line in process.stdout:
            printed.append(line)
            if found := re.match(r"Queued experiment '(.+)' for future execution", line):
                yield found[1], next(left)
    if process.returncode:
        raise UserError(f"dvc could not queue: {''.join(printed[-LOG_LINES:]).strip()}")


def _wait(names: dict[str, Combination], jobs: int) -> dict[str, str]:
    """Start workers, print when an experiment begins and ends, and return the last state of each.

    A worker can die, or leave an experiment to a worker that is just closing down. If nothing has changed for a while
    and no worker answers, new ones are started. After `RESTARTS` times in a row, open experiments count as lost.
    """
    states = dict.fromkeys(names, QUEUED)
    _start_workers(jobs)
    moved, restarts = time.monotonic(), 0
    while any(state in OPEN for state in states.values()):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        for name, state in _look().items():
            if name in states and states[name] != state:
                states[name] = state
                moved, restarts = time.monotonic(), 0
                done = sum(other not in OPEN for other in states.values())
                if state != QUEUED:
                    say(f"{done}/{len(states)} {name}: {state.lower()} ({names[name]})")
        if time.monotonic() - moved > SECONDS_WITHOUT_A_WORKER:
            if not _working():
                if restarts == RESTARTS:
                    break
                restarts += 1
                say("no worker is left: starting new ones")
                _start_workers(jobs)
            moved = time.monotonic()
    return {name: LOST if state in OPEN else state for name, state in states.items()}


def _look() -> dict[str, str]:
    """The state of each experiment in DVC's queue, by name; empty while DVC rewrites the files that are read here."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with contextlib.suppress(DvcException, OSError, ValueError, KeyError), Repo() as repo:
        entries: list[dict[str, Any]] = repo.experiments.celery_queue.status()
        return {entry["name"] or entry["rev"][:7]: entry["status"] for entry in entries}
    return {}


def _working() -> bool:
    """Whether any worker of this project answers and has a task. A worker without a task is closing down."""
    from dvc.repo import Repo

    with Repo() as repo:
        return any(repo.experiments.celery_queue.worker_status().values())


def _start_workers(jobs: int) -> None:
    command = ["dvc", "queue", "start", "-j", str(jobs)]
    # Not through a pipe: the workers would inherit it and keep it open until they end.
    nowhere = subprocess.DEVNULL
    if subprocess.run(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, check=False).returncode:
        raise UserError(f"DVC's workers did not start: `{' '.join(command)}` says why; the experiments stay queued")


def _remove(names: Iterable[str]) -> None:
    """After Ctrl-C: take this sweep's queued experiments out of the queue, and end the running ones."""
    states = _look()
    queued = [name for name in names if states.get(name) == QUEUED]
    running = [name for name in names if states.get(name) == RUNNING]
    say(f"\ninterrupted: removing {len(queued)} queued experiments, ending {len(running)} running ones")
    if queued:
        _dvc("queue", "remove", *queued)
    if running:
        _dvc("queue", "kill", "--force", *running)


def _dvc(*arguments: str) -> str:
    """The output of a DVC command, whether or not it succeeded."""
    done = subprocess.run(
        ["dvc", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
    )
    return done.stdout


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
