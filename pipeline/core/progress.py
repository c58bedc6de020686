"""Long work made visible: a bar with rate and remaining time on a terminal, plain lines everywhere else."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from pipeline.core.errors import printable

SECONDS_BETWEEN_LINES = 10.0

VALIDATIONS = "LORA_REPRO_VALIDATIONS"
"""The environment variable that names the file which a search reads validation losses from while a trial trains."""


def say(message: str) -> None:
    """One line to the user, at once: stages run under DVC, which shows their output as it comes.

    It may quote what strangers or other programs have written, so it is made `printable`.
    """
    print(printable(message), flush=True)


def publish_validation(seed: int, step: int, loss: float) -> None:
    """Append a validation loss to the file that `VALIDATIONS` names, if there is one. It changes no result."""
    if name := os.environ.get(VALIDATIONS):
        with open(name, "a", encoding="utf-8") as file:  # noqa: PTH123 - one write, which is appended whole
            file.write(json.dumps({"seed": seed, "step": step, "loss": loss}) + "\n")


@contextmanager
def bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, to be called as `n` more of `total` units are done (`unit` in the plural: rows, MB)."""
    if sys.stdout.isatty():
        columns = (TextColumn(label), BarColumn(), _Done(unit), TimeRemainingColumn())
        with Progress(*columns, console=Console()) as progress:
            task = progress.add_task(label, total=total)
            yield lambda n: progress.advance(task, n)
    else:
        lines = _Lines(label, total, unit)
        yield lines.advance
        lines.close()


class _Done(ProgressColumn):
    """`120/300 rows 4.6/s`"""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        rate = f" {task.speed:.3g}/s" if task.speed else ""
        return Text(f"{task.completed:.0f}/{task.total:.0f} {self.unit}{rate}")


class _Lines:
    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.started = self.last = time.monotonic()

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES and self.done < self.total:
            rate = self.done / (now - self.started)
            left = (self.total - self.done) / rate if rate else 0.0
            say(f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {_clock(left)} left")
            self.last = now

    def close(self) -> None:
        seconds = time.monotonic() - self.started
        rate = self.done / seconds if seconds else 0.0
        say(f"{self.label}: {self.done}/{self.total} {self.unit} in {_clock(seconds)} ({rate:.3g}/s)")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
