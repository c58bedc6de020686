"""The learning rate of each step: a linear warm-up, then one of four schedules.

The first step has a rate above zero, and the last step of the warm-up has the peak: step s of w has (s + 1) / w of it.
In transformers' schedulers it has s / w, so that the first step changes nothing. After the warm-up they agree.

wsd (warm-up, stable, decay; arXiv 2405.18392): the rate stays at the peak, and falls in the last steps, after the share
p of these to 1 - sqrt(p) of it, the form that the paper proposes.
"""

import math

from pipeline.core import params
from pipeline.core.errors import UserError


def require(steps: int, train: params.Train) -> None:
    """UserError if training has fewer steps than warm-up and decay take."""
    warmup, decay = _warmup(steps, train), _decay(steps, train)
    if warmup > steps:
        raise UserError(
            f"train.warmup = {train.warmup:g} steps, and training has {steps}: lower it, or raise train.epochs"
        )
    if warmup + decay > steps:
        raise UserError(
            f"train.schedule = 'wsd' has {warmup} steps of warm-up and {decay} of decay, and training has {steps}: "
            "lower train.warmup or train.decay"
        )


def learning_rate(step: int, steps: int, train: params.Train) -> float:
    """The learning rate of step `step` (from 0) of `steps`."""
    warmup = _warmup(steps, train)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if train.schedule == "linear":
        factor = 1 - progress
    elif train.schedule == "cosine":
        factor = (1 + math.cos(math.pi * progress)) / 2
    elif train.schedule == "wsd":
        decay = _decay(steps, train)
        factor = 1 - math.sqrt(max(0, step - (steps - decay)) / max(1, decay))
    else:
        factor = 1.0
    return train.learning_rate * factor


def _warmup(steps: int, train: params.Train) -> int:
    """Steps of the warm-up: `train.warmup` is a share of all steps below 1, and a number of steps from 1 on."""
    return round(train.warmup * steps) if train.warmup < 1 else int(train.warmup)


def _decay(steps: int, train: params.Train) -> int:
    """Steps in which wsd's rate falls; 0 with other schedules."""
    share = params.DECAY if train.decay is None else train.decay
    return round(share * steps) if train.schedule == "wsd" else 0
