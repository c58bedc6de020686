"""The frame of every stage's one call: run alone, read its parameters, print a mistake, measure the cost.

DVC keeps two `dvc repro` apart. But if `dvc` is killed and its stage lives on, the next `dvc repro` starts that stage a
second time, and both write the same files. So each stage has a lock, which the operating system drops with its holder.
"""

import argparse
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from pipeline.core import energy, params, paths, records
from pipeline.core.errors import UserError, listing, panics_told

COMPUTING = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "sentencepiece", "safetensors", "gguf",
    "datasets", "pyarrow", "polib", "numpy", "scipy", "rouge_score", "nltk", "sacrebleu", "regex", "py3langid",
)  # fmt: skip
"""The packages whose version can move a number. Every stage depends on their pins, in `constraints.txt`."""

WHERE_INSTALLED = ("xllamacpp",)
"""The same, for extras: only if they are installed."""


def run(
    stage: str, call: Callable[[params.Declared], None], result: Path | None = None, seed: int | None = None
) -> None:
    """Run one stage of `dvc.yaml`, or the one of `seed` in a matrix, by `process`.

    `call` is given the parameters that the stage declares.
    """
    process(address(stage, seed), lambda: call(params.read(stage)), result)


def seed(about: str) -> int:
    """The seed that this process computes: by `--seed` on its command line, else by the stage that DVC runs.

    DVC names that stage in its environment (`DVC_STAGE`, `train@17`). A seed never stands in a command of `dvc.yaml`:
    DVC hands commands to a shell, and `params.yaml` may be a stranger's. `about` is the text of `--help`. Exits with 2
    where neither gives a whole number.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=_seed, help="by default that of the stage which DVC runs")
    given: int | None = parser.parse_args().seed
    if given is not None:
        return given
    named = os.environ.get("DVC_STAGE")
    if named is None:
        parser.error("--seed is needed where DVC does not run this: write --seed 17")
    try:
        return _seed(named.rpartition("@")[2])
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))


def _seed(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise argparse.ArgumentTypeError(f"the seed {text!a} is not a whole number: correct seeds in params.yaml")
    return int(text)


def process(
    name: str, call: Callable[[], dict[str, Any] | None], result: Path | None = None, shared: bool = False
) -> None:
    """Run `call` under the lock `name`; if `result`, an output of the call, is given, record what the call cost.

    The cost differs from run to run, and `dvc.lock` must not, so it is no output of the pipeline. It names the digest
    of `result`, which tells it from the cost of an earlier result in the same place. If the call returns a cost, that
    replaces the one of this process: others may have done the work (`shared`, `pipeline.model.processes`).

    A UserError is printed without a traceback, and the process exits with 1. An interrupted process exits with 130.
    """
    set_environment()
    started = time.monotonic()
    try:
        if not shared and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"{name} computes in one process, but WORLD_SIZE = {os.environ['WORLD_SIZE']} in the environment says "
                "that a launcher started several: start it without one, by `dvc repro`"
            )
        with alone(name), panics_told():
            require_pinned_versions()
            remove_leftovers()
            if result is None:
                call()
                return
            with energy.metered() as end:
                measured = call()
                paid = {"seconds": round(time.monotonic() - started, 3)} | (measured or cost()) | end()
            records.write_json(paths.costs(result), paid | {"result_sha256": records.sha256_file(result)})
    except UserError as error:
        print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted: `dvc repro` goes on from here\n", file=sys.stderr, flush=True)
        sys.exit(130)


def set_environment() -> None:
    """Set the environment variables that libraries read when they are imported, which a stage's call does."""
    if not sys.stderr.isatty():  # bars are litter
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP's threads wait for each other by spinning for milliseconds, which takes the cores from a second experiment.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Through the package `kernels`, where it is installed, transformers and bitsandbytes run what a model hub holds at
    # the time, which no pin covers. bitsandbytes has no setting for it: the package is not to be found.
    os.environ["USE_HUB_KERNELS"] = "0"
    sys.modules["kernels"] = None  # type: ignore[assignment]


def address(stage: str, seed: int | None) -> str:
    """DVC's name of a stage: `prepare`; of one of a matrix over seeds `train@17`."""
    return stage if seed is None else f"{stage}@{seed}"


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold the lock of stage `name` of the project in the working directory.

    UserError, with the process's number, when another process holds it.
    """
    paths.SCRATCH.mkdir(exist_ok=True)
    holder = paths.SCRATCH / f"{name}.pid"
    lock = FileLock(paths.SCRATCH / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        try:
            pid = holder.read_text()
        except FileNotFoundError:  # it has only just begun, or is ending
            pid = "<pid>"
        raise UserError(
            f"{name} is being computed by another process, pid {pid}, maybe of a `dvc repro` that was killed: wait for "
            f"it, or end it with `kill {pid}`; then run `dvc repro` again"
        ) from None
    try:
        records.write_text(holder, str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def require_pinned_versions() -> None:
    """UserError where another version than the one in `constraints.txt` would compute: `dvc.lock` would not tell."""
    if not paths.CONSTRAINTS.is_file():  # DVC does not start a stage without it
        return
    lines = paths.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line.count("==") == 1 and not line.startswith("#"))
    other = []
    for name in (*COMPUTING, *WHERE_INSTALLED):
        try:
            # torch's builds for other devices say so behind a +.
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = pins.get(name, "not") if name in WHERE_INSTALLED else "not"
        if name in pins and found != pins[name]:
            other.append(f"{name} {pins[name]}, and {found} is installed")
    if other:
        remedy = (
            "install them with `rm .venv/installed; make .venv/installed`, or write there what you mean to compute "
            "with, then `make lock`: all stages then run again"
        )
        raise listing([*other, remedy], f"{paths.CONSTRAINTS} has other versions than this environment:")


def remove_leftovers() -> None:
    """Remove the half-written files (`records.replacing`) of processes that are gone.

    DVC takes whole folders as dependencies (`out/predictions`): a leftover would be part of them.
    """
    for top in (paths.OUT, paths.REPORTS, paths.SCRATCH):
        # Not rglob(): it fails where another stage removes a folder meanwhile.
        for folder, _, names in os.walk(top):
            for name in names:
                writer = re.fullmatch(r"\..*\.(\d+)\.part", name)
                if writer and not psutil.pid_exists(int(writer[1])):
                    Path(folder, name).unlink(missing_ok=True)


def cost() -> dict[str, Any]:
    """Peak memory of this process (and of the accelerator, where there is one), device and threads."""
    # getrusage counts in bytes on macOS, in KiB elsewhere.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found: dict[str, Any] = {"peak_memory_mb": round(peak_bytes / 2**20, 1)}
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found["device"] = torch.cuda.get_device_name()
            found["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        else:
            found["device"] = "mps" if torch.backends.mps.is_available() else "cpu"
    return found
