"""The results of arms: `out/claims/arms/<arm>.json`, which `claims.arms` writes and `claims.adapters` reads."""

from dataclasses import dataclass
from pathlib import Path

from claims.evidence import OUT
from pipeline.core import records

UNTUNED = "untuned"
"""Stands for the seed of an arm that is not trained."""


@dataclass(frozen=True, slots=True)
class Look:
    """An evaluation after `step` steps: the validation loss, and on general text the loss, the cross-entropy against
    the base's distribution, and that distribution's entropy, which is the lower bound. In nats per token."""

    step: int
    loss: float
    general_loss: float
    cross_entropy: float
    entropy: float


@dataclass(frozen=True, slots=True)
class Run:
    """One tuned model. `sums`: the loss of each validation group of `Result.groups`, in nats."""

    parameters: int
    steps: int
    sums: list[float]
    looks: list[Look]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of an arm. `tokens`: supervised tokens of each validation group. `runs`: by seed, or `UNTUNED`."""

    groups: list[str]
    tokens: list[int]
    rows: int
    runs: dict[str, Run]

    def losses(self) -> list[float]:
        """The mean validation loss of each run, in nats per token."""
        return [sum(run.sums) / sum(self.tokens) for run in self.runs.values()]


def path(name: str) -> Path:
    return OUT / "arms" / f"{name}.json"


def read(name: str) -> Result:
    content = records.read_json(path(name))
    runs = {
        seed: Run(**run | {"looks": [Look(**look) for look in run["looks"]]}) for seed, run in content["runs"].items()
    }
    return Result(**content | {"runs": runs})
