"""Which device computes, and with how many threads. A device that was asked for and is not there is an error."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.model import processes as distributed

if TYPE_CHECKING:
    import torch

# With this setting cuBLAS repeats its results; it is read when CUDA starts, so it must be set before that.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"
"""torch reads it when it is imported: operations without a kernel for Metal are then computed on the CPU, silently."""


def choose(runtime: params.Runtime) -> "torch.device":
    """Honour `runtime`, set the thread count, ask torch for repeatable kernels, and say what was chosen."""
    import torch

    quieten()
    torch.set_num_threads(runtime.threads or max(1, (os.cpu_count() or 1) // distributed.local_processes()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Of no use here, since nothing reads memory before writing it, and not for free.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cpu_only = runtime.device == "cpu"
    if distributed.count() > 1:
        device = distributed.join(cpu_only, one_model=runtime.sharding == "tensor")
    else:
        device = _found(cpu_only=cpu_only)
    if runtime.device not in ("auto", device.type):
        raise UserError(
            f"runtime.device = {runtime.device!r}, but this machine offers {device.type!r} "
            f"(torch {torch.__version__}): "
            f"install a torch build for it, or set runtime.device to auto"
        )
    if device.type == "mps":
        _require_metal_alone()
    say(f"device: {describe(device)}")
    return device


def require(device: "torch.device", dtype: str) -> None:
    """UserError for a dtype that the device would only emulate, or not compute at all."""
    import torch

    if dtype != "bfloat16":
        return
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"model.dtype = 'bfloat16', which {torch.cuda.get_device_name(device)} only emulates: set it to float16, "
            f"or to float32 for twice the memory"
        )
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UserError(
            "model.dtype = 'bfloat16', which MPS computes from macOS 14 on: set it to float16, or update macOS"
        )


@contextmanager
def repeatable(device: "torch.device") -> Iterator[None]:
    """Backward passes that repeat their results on CUDA as well: its attention adds in any order unless torch is told
    to fail rather than to warn."""
    import torch

    if device.type != "cuda":
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


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

    before = os.environ.get(FALLBACK)
    device: torch.device = PartialState(cpu=cpu_only).device
    if before is None:  # accelerate sets it, too late for this process, but not for those that it starts
        os.environ.pop(FALLBACK, None)
    return device


def _require_metal_alone() -> None:
    """Nothing but this machine's Metal computes: UserError where torch would fall back to the CPU without a word.

    On macOS 26 bitsandbytes loads kernels from a model hub if the package `kernels` is there, whatever version the hub
    has: that is switched off, and its own ones for torch are used, as on earlier versions.
    """
    import torch

    if os.environ.get(FALLBACK, "0") not in ("", "0"):
        raise UserError(
            f"{FALLBACK} = {os.environ[FALLBACK]}: what MPS lacks would be computed on the CPU unseen: unset it, or "
            f"set runtime.device to cpu"
        )
    if torch.backends.mps.is_available():
        from bitsandbytes.backends.mps import ops

        ops._kernel_load_failed = True


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
