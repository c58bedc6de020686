"""Processes that are forked from one which has torch loaded, and a stage's members among them."""

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.infer import infer

SPAWNING = multiprocessing.get_context("forkserver")
SPAWNING.set_forkserver_preload(
    ["torch", "transformers.models.llama", "peft", "bitsandbytes", "rouge_score.rouge_scorer", "altair", "pytest",
     "scipy.stats", "pipeline.lora.train", "pipeline.infer.infer", "pipeline.report.words", "bench.kills"]
)  # fmt: skip


def inferred(project: params.Params) -> None:
    infer.decode("base", project.prompt, project.generation, project.runtime)


SECONDS_BEHIND_A_FAILURE = 60.0


def a_member(number: int, count: int, port: int, call: Callable[[params.Params], None], project: params.Params) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ["LOCAL_WORLD_SIZE"] = str(count)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with Path(f"printed-{number}").open("w") as printed, contextlib.redirect_stdout(printed):
        try:
            call(project)
        except UserError as error:
            print(f"error: {error}")
            raise SystemExit(1) from None
        finally:
            printed.flush()


def a_port() -> tuple[socket.socket, int]:
    """A port for members to meet at, as a launcher gives one, and the socket that keeps it from all other processes.

    On Linux member 0 may listen where another socket is bound that does not listen. Other systems might give that one
    what comes in: there it is closed already.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port: int = held.getsockname()[1]
    if sys.platform != "linux":
        held.close()
    return held, port


def members(project: params.Params, call: Callable[[params.Params], None], count: int = 2) -> list[int | None]:
    """Run `call` in `count` processes that are forked from one which has torch loaded; their exit codes.

    Those that do not end although another has failed are killed: they would wait for it for ever.
    """
    runtime = project.runtime.model_copy(update={"processes": count})
    project = project.model_copy(update={"runtime": runtime})
    held, port = a_port()
    with held:
        started = [SPAWNING.Process(target=a_member, args=(n, count, port, call, project)) for n in range(count)]
        for one in started:
            one.start()
        while alive := [one.sentinel for one in started if one.exitcode is None]:
            if not wait(alive, SECONDS_BEHIND_A_FAILURE if any(one.exitcode for one in started) else None):
                for one in started:
                    one.kill()
    return [one.exitcode for one in started]
