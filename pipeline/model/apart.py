"""Tries chat templates and tokenizers, which strangers wrote, in a process that may come to harm (`apart_worker`)."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.model import apart_worker
from pipeline.model.apart_worker import SECONDS

INSTEAD = "take another model"


class TemplateError(Exception):
    """What a chat template raised, as text."""


def rendered(template: str, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """What a chat template makes of a conversation.

    `options` are the template's other variables. TemplateError for what the template raises; UserError where it takes
    longer than `SECONDS` says, or ends the process in another way.
    """
    return worker().ask("render", template=template, messages=messages, options=options)


def require_readable(file: Path) -> None:
    """UserError for a tokenizer.json that breaks its library, ends the process that reads it, or keeps it busy.

    Other faults are left to whoever loads it: that error says more.
    """
    try:
        worker().ask("tokenizer", file=str(file))
    except TemplateError as error:
        if str(error).startswith("PanicException"):
            raise UserError(f"the model's {file.name} breaks the library that reads it ({error}): {INSTEAD}") from None


@cache
def worker() -> "Worker":
    """The worker of this process, which ends with it."""
    one = Worker()
    atexit.register(one.end)
    return one


class Worker:
    """The other process. It starts at the first request, and again after a request has ended it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, task: str, **given: Any) -> str:
        """The answer to one request; TemplateError for an error there, UserError if it ends the process."""
        request = {"task": task, "seconds": SECONDS[task], "given": given}
        with self.lock:
            if self.process is None:
                self.process = self._start()
            assert self.process.stdin
            assert self.process.stdout
            line = ""
            try:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                pass
            except BaseException:  # the answer to an interrupted request must not reach the next one
                self.process.kill()
                self.end()
                raise
            if not line:
                raise self._lost(task, self.end())
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _start(self) -> subprocess.Popen[str]:
        # Without the tokens and passwords of the user's environment.
        kept = ("PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-P", apart_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment | {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for this process
        )

    def end(self) -> int:
        """End the process, and return its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        with contextlib.suppress(BrokenPipeError), process:  # closing its pipes ends it
            pass
        return process.returncode

    def _lost(self, task: str, status: int) -> UserError:
        if status >= 0:
            return UserError(
                f"the process that tries chat templates and tokenizers ended with {status}: what it printed says why; "
                "try again, or install this environment anew"
            )
        what, instead = "tokenizer", INSTEAD
        if task == "render":
            what, instead = "chat template", f"{INSTEAD}, or set prompt.style to plain"
        if status == -signal.SIGXCPU:
            return UserError(f"the model's {what} takes more than {SECONDS[task]} s of the processor: {instead}")
        return UserError(f"the model's {what} ended the process that tried it ({_signal(-status)}): {instead}")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
