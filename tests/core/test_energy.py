"""Energy: what a meter counted, by which meter; never what codecarbon estimated."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.core import energy, params, paths, records, stage

FAKE = """
from types import SimpleNamespace
HARDWARE, GIVEN, STOPPED = [], [], []
class OfflineEmissionsTracker:
    def __init__(self, **given):
        GIVEN.append(given)
    def start(self):
        self._hardware = HARDWARE
    def stop(self):
        STOPPED.append(self)
        self.final_emissions_data = SimpleNamespace(cpu_energy=0.002, gpu_energy=0.03, ram_energy=0.5)
"""


@pytest.fixture
def codecarbon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A codecarbon whose meters a test chooses (HARDWARE); without a GPU of NVIDIA's."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "codecarbon"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "fake" / "codecarbon" / "core").mkdir(parents=True)
    (tmp_path / "fake" / "codecarbon" / "__init__.py").write_text(FAKE)
    (tmp_path / "fake" / "codecarbon" / "core" / "__init__.py").touch()
    (tmp_path / "fake" / "codecarbon" / "core" / "gpu.py").write_text("def is_nvidia_system(): return True\n")
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setattr(energy, "RAPL", tmp_path / "powercap")
    import codecarbon as fake

    yield fake
    for name in [name for name in sys.modules if name.partition(".")[0] == "codecarbon"]:
        del sys.modules[name]
    logging.getLogger("codecarbon").disabled = False


def hardware(kind: str, mode: str | None = None) -> Any:
    return type(kind, (), {"_mode": mode})()


def measured() -> energy.Reading:
    with energy.metered() as end:
        return end()


RAM = hardware("RAM")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([hardware("CPU", "intel_rapl")], {"energy_kwh": 0.002, "energy_meter": "RAPL"}),
        ([hardware("CPU", "cpu_load"), hardware("GPU")], {"energy_kwh": 0.03, "energy_meter": "NVML"}),
        ([hardware("CPU", "intel_rapl"), hardware("GPU")], {"energy_kwh": 0.032, "energy_meter": "RAPL and NVML"}),
        (
            [hardware("AppleSiliconChip"), hardware("AppleSiliconChip")],
            {"energy_kwh": 0.032, "energy_meter": "powermetrics"},
        ),
    ],
)
def test_what_meters_counted_is_added_up_and_they_are_named(
    codecarbon: Any, parts: list[Any], expected: dict[str, Any]
) -> None:
    codecarbon.HARDWARE += [RAM, *parts]
    assert measured() == expected
    assert len(codecarbon.STOPPED) == 1
    given = codecarbon.GIVEN[0]
    assert given["output_methods"] == given["output_handlers"] == []
    assert given["emissions_endpoint"] is None


@pytest.mark.parametrize("mode", ["cpu_load", "constant"])
def test_an_estimate_is_not_reported(codecarbon: Any, mode: str) -> None:
    codecarbon.HARDWARE += [RAM, hardware("CPU", mode)]
    assert measured() == {"energy_meter": "n/a: this machine shows no meter (RAPL, NVML, powermetrics)"}


def test_a_meter_that_may_not_be_read_is_named(
    codecarbon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codecarbon.HARDWARE += [RAM, hardware("CPU", "cpu_load")]
    counter = tmp_path / "powercap" / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir(parents=True)
    counter.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert str(measured()["energy_meter"]).startswith(f"n/a: {counter} may not be read by this user")


def test_a_meter_that_counts_nothing_measures_nothing(codecarbon: Any) -> None:
    codecarbon.HARDWARE += [hardware("CPU", "intel_rapl")]
    original = codecarbon.OfflineEmissionsTracker.stop

    def stop(self: Any) -> None:
        original(self)
        self.final_emissions_data = SimpleNamespace(cpu_energy=0.0, gpu_energy=0.0)

    codecarbon.OfflineEmissionsTracker.stop = stop
    assert measured() == {"energy_meter": "n/a: RAPL counted nothing"}


def test_a_stage_that_fails_stops_the_measurement(codecarbon: Any) -> None:
    with pytest.raises(ZeroDivisionError), energy.metered():
        raise ZeroDivisionError
    assert len(codecarbon.STOPPED) == 1


def test_without_codecarbon_a_stage_says_so_in_its_costs(
    project: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project
    monkeypatch.setattr(energy, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    stage.run("prepare", lambda _: None, result=paths.split("test"))
    cost = records.read_json(paths.costs(paths.split("test")))
    assert str(cost["energy_meter"]).startswith(
        "n/a: codecarbon is not installed (pip install --require-hashes -r lock/energy.txt"
    )
    assert "energy_kwh" not in cost
