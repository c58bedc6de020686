"""What every stage script does around its one call: hold a lock, read parameters, print mistakes, measure the cost.

DVC never runs two `dvc repro` at once. But if `dvc` is killed, its stage may still run when the next `dvc repro` starts
the same stage, and both would write the same files. So each stage has a lock, which the operating system releases when
the holder dies.
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
from pipeline.core.progress import print_in_any_locale

COMPUTING = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "sentencepiece", "safetensors", "gguf",
    "datasets", "pyarrow", "polib", "numpy", "scipy", "rouge_score", "nltk", "sacrebleu", "regex", "py3langid",
)  # fmt: skip
"""The packages whose version can change a result. Every stage depends on their pins in `constraints.txt`."""

WHERE_INSTALLED = ("xllamacpp",)
"""Likewise, for packages of extras, which may be missing."""


def run(
    stage: str, call: Callable[[params.Declared], None], result: Path | None = None, seed: int | None = None
) -> None:
    """Run `call`, a stage of `dvc.yaml`, on the parameters that the stage declares; otherwise like `process`.

    `seed` selects the stage of a matrix over seeds. `result` is the output whose digest identifies the run.
    """
    process(address(stage, seed), lambda: call(params.read(stage)), result)


def seed(about: str) -> int:
    """The seed of this process: from `--seed` on the command line, otherwise from the stage that DVC runs.

    DVC names that stage in the environment (`DVC_STAGE`, `train@17`). Commands in `dvc.yaml` never contain a seed: DVC
    hands them to a shell, and `params.yaml` may be a stranger's. `about` is the text of `--help`. Exits with 2 if
    neither gives a whole number.
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
    """Run `call` under the lock `name`; if `result` is given, record what it cost.

    `result` is the output whose digest identifies the run. `shared` allows several processes, as
    `pipeline.model.processes` starts them. A UserError is printed without a traceback, and the process exits with 1. An
    interrupted process exits with 130.
    """
    set_environment()
    print_in_any_locale()
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
            else:
                _record_cost(call, result, started)
    except UserError as error:
        print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted: `dvc repro` goes on from here\n", file=sys.stderr, flush=True)
        sys.exit(130)


def _record_cost(call: Callable[[], dict[str, Any] | None], result: Path, started: float) -> None:
    """Run `call` and write what it cost, with the digest of the result, since that place had other results before.

    If other processes did the work, `call` returns their memory and devices, which replace this process's own. The cost
    is no output of the pipeline: it differs between runs, and `dvc.lock` must not.
    """
    with energy.metered() as end:
        measured = call()
        paid = {"seconds": round(time.monotonic() - started, 3)} | (measured or cost()) | end()
    records.write_json(paths.costs(result), paid | {"result_sha256": records.sha256_file(result)})


def set_environment() -> None:
    """Set what libraries read when they are imported, which happens inside a stage's call."""
    if not sys.stderr.isatty():  # progress bars would only litter a log
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP's threads spin for milliseconds while they wait, which takes cores away from a second experiment.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # With the package `kernels`, transformers and bitsandbytes run code from a model hub, which no pin covers.
    # bitsandbytes has no setting against it, so the package is hidden.
    os.environ["USE_HUB_KERNELS"] = "0"
    sys.modules["kernels"] = None  # type: ignore[assignment]


def address(stage: str, seed: int | None) -> str:
    """DVC's name of a stage: `prepare`, or `train@17` in a matrix over seeds."""
    return stage if seed is None else f"{stage}@{seed}"


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold the lock of stage `name` of the project in the working directory.

    UserError, which names the other process, if that one holds it.
    """
    paths.SCRATCH.mkdir(exist_ok=True)
    holder = paths.SCRATCH / f"{name}.pid"
    lock = FileLock(paths.SCRATCH / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        try:
            pid = holder.read_text(encoding="utf-8")
        except FileNotFoundError:  # the other process has only just begun, or is ending
            pid = "<pid>"
        raise UserError(
            f"{name} is being computed by another process, pid {pid}, perhaps left by a `dvc repro` that was killed: "
            f"wait for it, or end it with `kill {pid}`; then run `dvc repro` again"
        ) from None
    try:
        records.write_text(holder, str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def require_pinned_versions() -> None:
    """UserError if an installed version differs from `constraints.txt`: `dvc.lock` would not show that."""
    if not paths.CONSTRAINTS.is_file():  # DVC does not start a stage without it
        return
    lines = paths.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line.count("==") == 1 and not line.startswith("#"))
    other = []
    for name in (*COMPUTING, *WHERE_INSTALLED):
        try:
            # torch's builds for other devices add "+cu128" or the like.
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = pins.get(name, "not") if name in WHERE_INSTALLED else "not"
        if name in pins and found != pins[name]:
            other.append(f"{name} {pins[name]}, and {found} is installed")
    if other:
        remedy = (
            "install the pinned versions with `rm .venv/installed; make .venv/installed`, or change the pins and run "
            "`make lock`: all stages then run again"
        )
        raise listing([*other, remedy], f"{paths.CONSTRAINTS} has other versions than this environment:")


def remove_leftovers() -> None:
    """Remove the half-written files (`records.replacing`) of processes that are gone.

    Some dependencies are whole folders (`out/predictions`), and DVC would count a leftover in them.
    """
    for top in (paths.OUT, paths.REPORTS, paths.SCRATCH):
        # Not rglob(): it fails when another stage removes a folder meanwhile.
        for folder, _, names in os.walk(top):
            for name in names:
                writer = re.fullmatch(r"\..*\.(\d+)\.part", name)
                if writer and not psutil.pid_exists(int(writer[1])):
                    Path(folder, name).unlink(missing_ok=True)


def cost() -> dict[str, Any]:
    """Peak memory of this process and of its accelerator (MiB), device and threads."""
    # getrusage counts bytes on macOS, KiB elsewhere.
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
