"""The training curves of an experiment, short enough to be drawn and kept in git."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import contracts, paths
from pipeline.core.contracts import TrainingSummary, Validation

POINTS = 400
"""The most points of a curve. In a longer training each point is the mean of an equal number of steps."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One seed's losses in nats a token. `training` holds pairs of step and loss."""

    seed: int
    training: list[tuple[int, float]]
    validation: list[Validation]


def read(seeds: Sequence[int]) -> list[Curve]:
    """The curve of each seed. UserError if an output of training is missing."""
    return [
        Curve(
            seed,
            thinned([(step.step, step.loss) for step in contracts.read_curve(paths.training_log(seed))]),
            contracts.read(paths.training_summary(seed), TrainingSummary).validation,
        )
        for seed in seeds
    ]


def thinned(steps: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` points: the steps, or means of equal numbers of steps, each at its middle step."""
    size = -(-len(steps) // POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)] if steps else []
    return [(part[len(part) // 2][0], sum(loss for _, loss in part) / len(part)) for part in parts]
