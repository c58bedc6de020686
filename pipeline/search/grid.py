"""Every combination of some parameters, through DVC's queue, with a plain end: what ran, what failed, and why.

`dvc exp run --run-all` exits with 0 when an experiment fails, and waits for ever when its workers find no `dvc`
(treeverse/dvc#10398, #10673). Here mistakes are found before anything is queued, workers that vanish are replaced, and
the exit code is the truth. Everything that runs is DVC's: `dvc queue status` and `dvc exp show` see it all.
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

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.core import params, paths, yaml12
from pipeline.core.errors import UserError, listing, printable
from pipeline.core.progress import say

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_WITHOUT_A_WORKER = 30.0
"""How long nothing may begin or end before the workers are counted; a worker takes some seconds to start."""
RESTARTS = 3
LOG_LINES = 15

BASE = "evaluate@base"
NOT_OF_THE_BASE = {"lora", "train", "seeds", "forget", "compare", "tracking"}
"""The parameters that `BASE`, and all that it depends on, do not read."""

QUEUED, RUNNING, SUCCESS, FAILED, LOST = "Queued", "Running", "Success", "Failed", "Lost"
OPEN = (QUEUED, RUNNING)


@dataclass(frozen=True, slots=True)
class Combination:
    """One experiment to be: `overrides` as DVC takes them, `lora.r=8`."""

    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.overrides)


def sweep(overrides: Sequence[str], jobs: int) -> int:
    """Run an experiment for each combination of `overrides` (`lora.r=4,8`), `jobs` at once; the exit code.

    0: all succeeded; 1: some failed, and the end names each with the last lines of its log; 130: interrupted, and what
    was queued or running here is taken back. UserError, before anything is queued, for a missing `dvc` or git identity
    and for a combination that `params.yaml` does not allow.
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
        _take_back(names)
        return 130
    _print_table(names, states)
    failed = [name for name in names if states[name] != SUCCESS]
    for name in failed:
        say(f"\n{name} ({names[name]}): {states[name].lower()}\n{_log(name)}")
    if failed:
        say(f"\n{len(failed)} of {len(names)} experiments failed: {', '.join(failed)}")
    return 1 if failed else 0


def expand(overrides: Sequence[str]) -> list[Combination]:
    """All combinations, in DVC's order; UserError for what DVC cannot read."""
    from dvc.utils.hydra import get_hydra_sweeps
    from hydra.errors import HydraException

    if not overrides:
        raise UserError("nothing to sweep over: give parameters and values, such as -S lora.r=4,8")
    params.require_plain("-S", overrides)
    try:
        return [
            Combination(tuple(made[str(paths.PARAMS)]))
            for made in get_hydra_sweeps({str(paths.PARAMS): list(overrides)})
        ]
    except HydraException as error:
        raise UserError(f"-S takes <parameter>=<value>,<value>...: {_first_line(error)}") from None


def check(combinations: Iterable[Combination]) -> None:
    """UserError with every combination that DVC cannot set or `params.yaml` does not allow, and why."""
    from dvc.exceptions import InvalidArgumentError
    from dvc.utils.hydra import apply_overrides

    params.load()  # DVC's own reader, which sets the overrides, would expand aliases without end
    problems: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / paths.PARAMS.name
        for combination in combinations:
            shutil.copy(paths.PARAMS, copy)
            try:
                apply_overrides(copy, list(combination.overrides))
                params.check(yaml12.read(copy), str(combination))
            except InvalidArgumentError as error:
                problems[f"{combination}: {_first_line(error.__cause__ or error)}"] = None
            except UserError as error:
                problems |= dict.fromkeys(line.removeprefix("  - ") for line in str(error).splitlines()[1:])
    if problems:
        raise listing(problems, "nothing was queued:")


def _require_tools() -> None:
    if shutil.which("dvc") is None:
        raise UserError(
            "`dvc` is not on the PATH, so the queue's workers could not start: put the virtual environment's folder "
            "there (source .venv/bin/activate)"
        )
    require_git()


def require_git() -> None:
    """UserError unless DVC can commit experiments, and there is a commit to start them from."""
    for key in ("name", "email"):
        given = subprocess.run(["git", "config", f"user.{key}"], capture_output=True, text=True, check=False).stdout
        if not given.strip() and not os.environ.get(f"GIT_COMMITTER_{key.upper()}"):
            raise UserError(
                f"git has no user.{key}, and DVC commits experiments: set it with `git config user.{key} <...>`"
            )
    head = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, check=False)
    if head.returncode:
        raise UserError("there is no commit that experiments could start from: `git add` and `git commit` first")


def _base_first(combinations: Iterable[Combination]) -> None:
    """Compute here what all experiments share of the base: workers that begin side by side would each compute it.

    UserError where that fails: so would every experiment.
    """
    changed = {override.lstrip("+~").split("=")[0].split(".")[0] for one in combinations for override in one.overrides}
    if changed <= NOT_OF_THE_BASE and subprocess.run(["dvc", "repro", BASE], check=False).returncode:
        raise UserError(f"nothing was queued: {BASE} failed, which every experiment needs")


def _queue(combinations: Sequence[Combination], overrides: Sequence[str]) -> Iterator[tuple[str, Combination]]:
    """Queue all at once, and yield each one's name; UserError with DVC's words when it refuses."""
    settings = itertools.chain.from_iterable(("-S", override) for override in overrides)
    command = ["dvc", "exp", "run", "--queue", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        printed, left = [], iter(combinations)
        for line in process.stdout:
            printed.append(line)
            if found := re.match(r"Queued experiment '(.+)' for future execution", line):
                yield found[1], next(left)
    if process.returncode:
        raise UserError(f"dvc could not queue: {''.join(printed[-LOG_LINES:]).strip()}")


def _wait(names: dict[str, Combination], jobs: int) -> dict[str, str]:
    """Start workers, say what begins and ends, and return each experiment's last state.

    A worker can die, or leave an experiment for one that is just closing down. When nothing has moved for a while and
    no worker answers, new ones are started; what is open after `RESTARTS` times is Lost.
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
                if state not in OPEN:
                    say(f"{done}/{len(states)} {name}: {state.lower()} ({names[name]})")
                elif state == RUNNING:
                    say(f"{done}/{len(states)} {name}: running ({names[name]})")
        if time.monotonic() - moved > SECONDS_WITHOUT_A_WORKER:
            if not _working():
                if restarts == RESTARTS:
                    break
                restarts += 1
                say("no worker is left: starting again")
                _start_workers(jobs)
            moved = time.monotonic()
    return {name: LOST if state in OPEN else state for name, state in states.items()}


def _look() -> dict[str, str]:
    """State by name of all that DVC's queue knows; empty while DVC is just rewriting what is read."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with contextlib.suppress(DvcException, OSError, ValueError, KeyError), Repo() as repo:
        entries: list[dict[str, Any]] = repo.experiments.celery_queue.status()
        return {entry["name"] or entry["rev"][:7]: entry["status"] for entry in entries}
    return {}


def _working() -> bool:
    """Whether any worker of this project answers and has a task: one without is closing down."""
    from dvc.repo import Repo

    with Repo() as repo:
        return any(repo.experiments.celery_queue.worker_status().values())


def _start_workers(jobs: int) -> None:
    command = ["dvc", "queue", "start", "-j", str(jobs)]
    # Not through a pipe: the workers inherit it and would keep it open to their end.
    nowhere = subprocess.DEVNULL
    if subprocess.run(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, check=False).returncode:
        raise UserError(f"DVC's workers did not start: `{' '.join(command)}` says why; the experiments are queued")


def _take_back(names: Iterable[str]) -> None:
    """After Ctrl-C: nothing of this sweep is queued or runs any more; what had ended stays."""
    states = _look()
    queued = [name for name in names if states.get(name) == QUEUED]
    running = [name for name in names if states.get(name) == RUNNING]
    say(f"\ninterrupted: removing {len(queued)} queued experiments, ending {len(running)} running ones")
    if queued:
        _dvc("queue", "remove", *queued)
    if running:
        _dvc("queue", "kill", "--force", *running)


def _log(name: str) -> str:
    """The last lines that an experiment printed."""
    return "\n".join(f"  | {line}" for line in _dvc("queue", "logs", name).strip().splitlines()[-LOG_LINES:])


def _dvc(*arguments: str) -> str:
    """What a command of DVC's printed, whether or not it succeeded."""
    done = subprocess.run(
        ["dvc", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    return done.stdout


def _print_table(names: dict[str, Combination], states: dict[str, str]) -> None:
    table = Table("experiment", "parameters", "status", box=None, pad_edge=False)
    for name, combination in names.items():
        table.add_row(*(escape(printable(cell)) for cell in (name, str(combination), states[name].lower())))
    Console(soft_wrap=True).print(table)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
