"""What every stage script does around its one call: give it its parameters, print a mistake, measure the cost."""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline import params, paths, records
from pipeline.errors import UserError


def run(stage: str, call: Callable[[params.Declared], None], result: Path | None = None) -> None:
    """Run one stage of `dvc.yaml`; with `result`, the output that tells one run of it from another, note its cost.

    The cost is no output of the pipeline: it differs from run to run, and `dvc.lock` must not. It names the content of
    the result that it was paid for, so it can be told from the cost of an earlier result in the same place.
    A UserError is printed without a traceback, and the process exits with 1.
    """
    # Read by libraries when they are imported, which happens inside the call. Without a terminal, bars are litter.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    try:
        call(params.read(stage))
        if result:
            cost = _cost(time.monotonic() - started)
            records.write_json(paths.costs(result), cost | {"result_sha256": records.sha256_file(result)})
    except UserError as error:
        print(f"\nerror: {error}\n", file=sys.stderr, flush=True)
        sys.exit(1)


def _cost(seconds: float) -> dict[str, object]:
    """Wall time, peak memory of this process (and of the accelerator, where there is one), device and threads."""
    # getrusage counts in bytes on macOS, in KiB elsewhere.
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cost: dict[str, object] = {"seconds": round(seconds, 3), "peak_memory_mb": round(peak_bytes / 2**20, 1)}
    torch = sys.modules.get("torch")
    if torch is not None:
        cost["threads"] = torch.get_num_threads()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            cost["device"] = torch.cuda.get_device_name()
            cost["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        else:
            cost["device"] = "mps" if torch.backends.mps.is_available() else "cpu"
    return cost
