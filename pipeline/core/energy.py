"""The energy that a stage took, on machines with a meter for it.

codecarbon (the extra `energy`) reads RAPL, NVML and powermetrics. Without a meter it estimates from the processor's
load and rated power, and it always estimates main memory. Estimates are not reported. A meter counts the whole
processor, or all GPUs, including the work of other programs. If only the GPUs have a meter, the figure covers only
them.
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
"""RAPL's counters overflow after some minutes and must be read more often than that."""
# codecarbon's modes of following the CPU that read a meter, with the meters' names. All other modes estimate.
CPU_METERS = {"intel_rapl": "RAPL", "intel_power_gadget": "Intel Power Gadget", "windows_emi": "EMI"}

Reading = dict[str, object]


@contextmanager
def metered() -> Iterator[Callable[[], Reading]]:
    """Measure the block. Yields a function that ends the measurement and returns the reading.

    A reading has `energy_kwh` and `energy_meter`. If nothing was measured, it has `energy_meter` alone: `n/a:
    <reason>`.
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
    """A started tracker that uses no network, writes no file and prints nothing.

    codecarbon demands a country for the emissions, which are not used.
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
    """The energy that meters counted, without estimates."""
    from codecarbon.core import gpu

    data: Any = getattr(tracker, "final_emissions_data", None)
    kwh: dict[str, float] = {}
    # codecarbon shows in no public place whether it measured or estimated. Its version is pinned (lock/energy.txt).
    for one in getattr(tracker, "_hardware", []):
        kind, mode = type(one).__name__, getattr(one, "_mode", None)
        if kind == "CPU" and mode in CPU_METERS:
            kwh[CPU_METERS[mode]] = data.cpu_energy
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
    for path in RAPL.glob("intel-rapl*/energy_uj"):
        if not os.access(path, os.R_OK):
            return f"{path} may not be read by this user (sudo chmod -R a+r {RAPL})"
    return "this machine shows no meter (RAPL, NVML, powermetrics)"


def _none(reason: str) -> Reading:
    return {"energy_meter": f"n/a: {reason}"}
