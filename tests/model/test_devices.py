"""The device: taken in order, and never another than the one asked for."""

import os
from types import SimpleNamespace

import accelerate
import pytest
import torch

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.model import devices
from tests.made import parameters


def runtime(name: str, threads: int = 0) -> params.Runtime:
    return parameters.runtime(device=name, threads=threads)


def test_what_is_asked_for_is_used_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert devices.choose(runtime("cpu", threads=1)) == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert "device: cpu, 1 threads" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_an_error(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_found", lambda **_: torch.device("cpu"))
    with pytest.raises(UserError, match=f"runtime.device = '{wanted}', but this machine offers 'cpu'"):
        devices.choose(runtime(wanted))


def test_auto_takes_the_accelerator_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_found", lambda cpu_only: torch.device("cpu" if cpu_only else "mps"))
    assert devices.choose(runtime("auto")).type == "mps"
    assert devices.choose(runtime("cpu")).type == "cpu"


# What an accelerator must decide, with the accelerator faked


def test_bfloat16_is_refused_where_a_gpu_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        devices.require(torch.device("cuda"), "float16")
        if native:
            devices.require(torch.device("cuda"), "bfloat16")
    with pytest.raises(UserError, match="model.dtype = 'bfloat16', which Tesla T4 only emulates: set it to float16"):
        devices.require(torch.device("cuda"), "bfloat16")


def test_bfloat16_on_metal_needs_macos_14(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (15, 13):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, _, v=version: v >= major)
        devices.require(torch.device("mps"), "float16")
        if version >= 14:
            devices.require(torch.device("mps"), "bfloat16")
    with pytest.raises(UserError, match="which MPS computes from macOS 14 on: set it to float16"):
        devices.require(torch.device("mps"), "bfloat16")


def test_a_cpu_takes_every_dtype() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        devices.require(torch.device("cpu"), dtype)


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("0", False), ("", False), (None, False)])
def test_a_silent_fallback_from_metal_to_the_cpu_is_refused(
    value: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_found", lambda **_: torch.device("mps"))
    monkeypatch.delenv(devices.FALLBACK, raising=False)
    if value is not None:
        monkeypatch.setenv(devices.FALLBACK, value)
    if refused:
        with pytest.raises(UserError, match="PYTORCH_ENABLE_MPS_FALLBACK = 1: what MPS lacks would be computed on the"):
            devices.choose(runtime("auto"))
    else:
        assert devices.choose(runtime("auto")).type == "mps"


def test_a_fallback_that_accelerate_turns_on_is_not_left_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(cpu: bool) -> SimpleNamespace:
        os.environ[devices.FALLBACK] = "1"
        return SimpleNamespace(device=torch.device("cpu" if cpu else "mps"))

    monkeypatch.setattr(accelerate, "PartialState", state)
    monkeypatch.delenv(devices.FALLBACK, raising=False)
    assert devices.choose(runtime("auto")).type == "mps"
    assert devices.FALLBACK not in os.environ
    monkeypatch.setenv(devices.FALLBACK, "1")  # the user's own stays, and is refused
    with pytest.raises(UserError, match=devices.FALLBACK):
        devices.choose(runtime("auto"))


def test_kernels_that_no_pin_covers_are_not_fetched_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS 26 with the package `kernels`, which bitsandbytes would ask a hub through."""
    from bitsandbytes.backends.mps import ops

    monkeypatch.setattr(ops, "_kernel_load_failed", False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_found", lambda **_: torch.device("mps"))
    monkeypatch.delenv(devices.FALLBACK, raising=False)
    devices.choose(runtime("mps"))
    assert ops._get_kernel() is None


def test_backward_passes_on_cuda_are_told_to_repeat_themselves() -> None:
    """torch's attention adds in any order on CUDA as long as it may warn of it instead of failing."""
    devices.choose(runtime("cpu"))
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    with devices.repeatable(torch.device("cpu")):
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(ZeroDivisionError), devices.repeatable(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise ZeroDivisionError
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
