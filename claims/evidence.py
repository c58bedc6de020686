"""Evidence for a claim: measured values by name, with notes for the reader. `claims.register` makes the verdict.

A measurement is a function without arguments in the module of its subject. A stage of `claims/dvc.yaml` runs it by the
claim's id.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import paths, records, stage
from pipeline.score.significance import Interval

OUT = paths.OUT / "claims"
"""Everything that the claims' pipeline computes."""

Value = float | Interval | list[float]
"""A number, a number with its interval, or one number for each training seed."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Values by name, with units in the name or in the register's text.

    `notes`: sentences for the reader. `uses`: results of other stages (paths below `out/claims`) whose cost is part of
    this measurement's. `not_run`: what was missing, if nothing could be measured (`a GPU with 24 GB`).
    `not_comparable`: why the values say nothing about the claim at this scale.
    """

    values: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)
    not_run: str | None = None
    not_comparable: str | None = None

    def __post_init__(self) -> None:
        bad = [name for name, value in self.values.items() if not all(map(math.isfinite, numbers(value)))]
        if bad:
            raise ValueError(f"evidence that is not finite: {', '.join(bad)}")


def numbers(value: Value) -> list[float]:
    """All numbers of a value."""
    if isinstance(value, Interval):
        return [value.value, value.low, value.high]
    return value if isinstance(value, list) else [value]


def largest(values: Iterable[float]) -> float:
    """The largest value; NaN if any value is, which `max` may pass over: no layer may hide another's fault."""
    return float(np.max(list(values)))


def least(values: Iterable[float]) -> float:
    """The smallest value; NaN if any value is, as in `largest`."""
    return float(np.min(list(values)))


def path(claim: str) -> Path:
    """The file of one claim's evidence."""
    return OUT / "evidence" / f"{claim}.json"


def read(claim: str) -> Evidence:
    content = records.read_json(path(claim))
    return Evidence(**content | {"values": {name: _value(value) for name, value in content["values"].items()}})


def write(claim: str, evidence: Evidence) -> None:
    records.write_json(path(claim), asdict(evidence))


def main(measurements: Mapping[str, Callable[[], Evidence]]) -> None:
    """The command line of a subject: measure the claims that are named, and write their evidence."""
    parser = argparse.ArgumentParser()
    parser.add_argument("claims", nargs="+", choices=list(measurements), metavar="claim")
    for claim in parser.parse_args().claims:
        stage.process(f"claim-{claim}", partial(_take, claim, measurements[claim]), result=path(claim))


def _take(claim: str, measurement: Callable[[], Evidence]) -> None:
    write(claim, measurement())


def _value(content: Any) -> Value:
    return Interval(**content) if isinstance(content, dict) else content
