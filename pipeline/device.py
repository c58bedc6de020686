"""Which device computes, and with how many threads. A device that was asked for and is not there is an error."""

import logging
import os
import warnings
from typing import TYPE_CHECKING

from pipeline import distributed, params
from pipeline.errors import UserError
from pipeline.progress import say

if TYPE_CHECKING:
    import torch

# With this setting cuBLAS repeats its results; it is read when CUDA starts, so it must be set before that.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def choose(runtime: params.Runtime) -> "torch.device":
    """Honour `runtime`, set the thread count, ask torch for repeatable kernels, and say what was chosen."""
    import torch

    quieten()
    torch.set_num_threads(runtime.threads or max(1, (os.cpu_count() or 1) // distributed.local_processes()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Of no use here, since nothing reads memory before writing it, and not for free.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cpu_only = runtime.device == "cpu"
    device = distributed.join(cpu_only) if distributed.processes() > 1 else _found(cpu_only=cpu_only)
    if runtime.device not in ("auto", device.type):
        raise UserError(
            f"runtime.device = {runtime.device!r}, but this machine offers {device.type!r} "
            f"(torch {torch.__version__}): "
            f"install a torch build for it, or set runtime.device to auto"
        )
    say(f"device: {describe(device)}")
    return device


def threads(device: "torch.device") -> int:
    """The CPU threads that compute, 0 where an accelerator does: sums are rounded in an order that depends on them."""
    import torch

    return torch.get_num_threads() if device.type == "cpu" else 0


def describe(device: "torch.device") -> str:
    """`cpu, 2 threads, bf16 AVX-512` or the accelerator's name."""
    import torch

    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _found(cpu_only: bool) -> "torch.device":
    """The best device of this machine, in accelerate's order: an accelerator where there is one, then the CPU."""
    from accelerate import PartialState

    device: torch.device = PartialState(cpu=cpu_only).device
    return device


def quieten() -> None:
    """Progress bars and advice of libraries that would drown our own lines; warnings and errors stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # PEFT asks transformers by a name that the next major version drops.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # bitsandbytes advises to install an optional kernel package, at every import, on machines that do not need it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # LLM.int8() quantizes from float16, and bitsandbytes says so of every layer of every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
