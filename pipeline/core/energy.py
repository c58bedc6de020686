"""The energy that a stage took, where the machine has a meter for it.

codecarbon (the extra `energy`) reads RAPL, NVML and powermetrics. Where it finds no meter it estimates, from the load
and the rated power of the processor: that is no measurement, and is not reported. Main memory it always estimates. A
meter counts the whole processor, or all GPUs, whatever else they do at that time; where the GPUs alone have one, the
figure is theirs.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RAPL = Path("/sys/class/powercap")
SECONDS_BETWEEN_READINGS = 15.0
"""Counters of RAPL start again from zero after some minutes: they must be read more often than that."""
# codecarbon's name of a meter of the CPU -> ours. All its other ways to follow a CPU are estimates.
CPU_METERS = {"intel_rapl": "RAPL", "intel_power_gadget": "Intel Power Gadget", "windows_emi": "EMI"}

Reading = dict[str, object]


@contextmanager
def metered() -> Iterator[Callable[[], Reading]]:
    """Yield a function that ends the measurement.

    It returns `energy_kwh` and `energy_meter`, or `energy_meter` alone: `n/a` with the reason.
    """
    if find_spec("codecarbon") is None:
        yield lambda: _none("codecarbon is not installed (pip install --require-hashes -r lock/energy.txt)")
        return
    tracker = _started()
    ended = False

    def end() -> Reading:
        nonlocal ended
        ended = True
        tracker.stop()
        return _reading(tracker)

    try:
        yield end
    finally:
        if not ended:
            tracker.stop()


def _started() -> Any:
    """A running tracker of codecarbon that uses no network, file or lock, and prints nothing.

    The country is for emissions, which are not used.
    """
    logging.getLogger("codecarbon").disabled = True
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code="USA",
        measure_power_secs=SECONDS_BETWEEN_READINGS,
        output_methods=[],
        output_handlers=[],
        emissions_endpoint=None,
        tracking_mode="machine",
        allow_multiple_runs=True,
        log_level="critical",
    )
    tracker.start()
    return tracker


def _reading(tracker: Any) -> Reading:
    """The measured energy and its meters, without what codecarbon estimated."""
    from codecarbon.core import gpu

    data: Any = getattr(tracker, "final_emissions_data", None)
    kwh: dict[str, float] = {}
    for one in getattr(tracker, "_hardware", []):
        kind = type(one).__name__
        if kind == "CPU" and getattr(one, "_mode", None) in CPU_METERS:
            kwh[CPU_METERS[one._mode]] = data.cpu_energy
        elif kind == "GPU":
            kwh["NVML" if gpu.is_nvidia_system() else "AMD SMI"] = data.gpu_energy
        elif kind == "AppleSiliconChip":  # once for the CPU, once for the GPU
            kwh["powermetrics"] = data.cpu_energy + data.gpu_energy
    if not kwh:
        return _none(_why_not())
    if sum(kwh.values()) <= 0:
        return _none(f"{' and '.join(kwh)} counted nothing")
    return {"energy_kwh": sum(kwh.values()), "energy_meter": " and ".join(kwh)}


def _why_not() -> str:
    closed = [path for path in RAPL.glob("intel-rapl*/energy_uj") if not os.access(path, os.R_OK)]
    if closed:
        return f"{closed[0]} may not be read by this user (sudo chmod -R a+r {RAPL})"
    return "this machine shows no meter (RAPL, NVML, powermetrics)"


def _none(reason: str) -> Reading:
    return {"energy_meter": f"n/a: {reason}"}
