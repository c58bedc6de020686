"""The device: taken in order, and never another than the one asked for."""

import pytest
import torch

from pipeline import device, params
from pipeline.errors import UserError


def runtime(name: str, threads: int = 0) -> params.Runtime:
    given = {"device": name, "threads": threads, "processes": 1, "keep_dequantized": True, "vllm": None}
    return params.Runtime.model_validate(given)


def test_what_is_asked_for_is_used_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert device.choose(runtime("cpu", threads=1)) == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert "device: cpu, 1 threads" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_an_error(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_found", lambda **_: torch.device("cpu"))
    with pytest.raises(UserError, match=f"runtime.device = '{wanted}', but this machine offers 'cpu'"):
        device.choose(runtime(wanted))


def test_auto_takes_the_accelerator_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_found", lambda cpu_only: torch.device("cpu" if cpu_only else "mps"))
    assert device.choose(runtime("auto")).type == "mps"
    assert device.choose(runtime("cpu")).type == "cpu"
