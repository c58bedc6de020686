"""Which device computes, and with how many threads. It is an error if the requested device is not there."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.model import processes

if TYPE_CHECKING:
    import torch

FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"
"""With this variable, read when torch is imported, the CPU silently computes operations without a kernel for Metal."""


def choose(runtime: params.Runtime) -> "torch.device":
    """The device that `runtime` asks for. Sets the number of threads and asks torch for repeatable kernels.

    Of several processes, this also joins the others. UserError if this machine does not offer the device.
    """
    import torch

    quieten()
    # With this setting cuBLAS repeats its results. It is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(runtime.threads or max(1, (os.cpu_count() or 1) // processes.local_processes()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling costs time, and nothing here reads memory before writing it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    cpu_only = runtime.device == "cpu"
    if processes.count() > 1:
        device = processes.join(cpu_only, one_model=runtime.sharding == "tensor")
    else:
        device = _found(cpu_only=cpu_only)
    if runtime.device not in ("auto", device.type):
        raise UserError(
            f"runtime.device = {runtime.device!r}, but this machine offers {device.type!r} "
            f"(torch {torch.__version__}): install a torch build for it, or set runtime.device to auto"
        )
    if device.type == "mps":
        _require_metal_alone()
    say(f"device: {describe(device)}")
    return device


def require(device: "torch.device", dtype: str) -> None:
    """UserError for a dtype that the device would only emulate, or cannot compute."""
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
    """Let backward passes repeat their results on CUDA as well.

    There attention adds in any order, unless torch is set to fail rather than to warn.
    """
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
    """The number of CPU threads, on which the order of rounding depends; 0 where an accelerator computes."""
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
    if before is None:  # accelerate sets it: too late for this process, but in time for those that it starts
        os.environ.pop(FALLBACK, None)
    return device


def _require_metal_alone() -> None:
    """Let only this machine's Metal compute; UserError where torch would silently fall back to the CPU.

    On macOS 26 bitsandbytes loads kernels from a model hub, in the hub's version, if the package `kernels` is there.
    This is switched off, so that it uses its own kernels for torch, as on earlier versions. It has no public setting.
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
    """Switch off progress bars and advice of libraries, which would drown our own lines; warnings and errors stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # PEFT uses a name that the next major version of transformers drops.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # At every import bitsandbytes advises to install an optional kernel package, also where it is not needed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # LLM.int8() quantizes from float16, and bitsandbytes says so for every layer of every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
