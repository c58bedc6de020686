"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

import codecs
import io
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
"""Environment variable with the path of a file. A search reads a trial's validation losses from it during training."""


def print_in_any_locale() -> None:
    """Let this process print to a terminal or a log whose encoding lacks a character: another stands for it.

    Without it the first arrow of a verdict would end a program whose locale is C or ISO-8859-1.
    """
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="plain")


PLAIN = {
    "→": "->", "−": "-", "–": "-", "—": "-", "…": "...", "≤": "<=", "≥": ">=", "×": "x", "±": "+-",
    "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\u00a0": " ", "\u202f": " ",
}  # fmt: skip
"""What stands for a character of ours where it cannot be printed. `?` stands for any other."""


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in text), error.end


def say(message: str) -> None:
    """Print one line for the user, at once: DVC shows the output of stages as it comes.

    The message may quote text of strangers or of other programs, so it is made `printable`.
    """
    print(printable(message), flush=True)


def publish_validation(seed: int, step: int, loss: float) -> None:
    """Append a validation loss (nats a token) to the file that `VALIDATIONS` names, if any. It changes no result."""
    if name := os.environ.get(VALIDATIONS):
        with open(name, "a", encoding="utf-8") as file:  # noqa: PTH123 - one write, which is appended whole
            file.write(json.dumps({"seed": seed, "step": step, "loss": loss}) + "\n")


@contextmanager
def bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, to be called when `n` more of `total` units are done. `unit` is a plural, such as rows."""
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
    """A line every `SECONDS_BETWEEN_LINES`, and one at the end."""

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
