"""The learning rate of every step: that of transformers' schedulers, in the warm-up one step ahead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import optimization

from pipeline.core.errors import UserError
from pipeline.lora import schedule
from tests.made.trainer import section

STEPS = 50


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 0.2929]),
    ],
)
def test_the_learning_rate_climbs_then_follows_its_schedule(name: str, expected: list[float]) -> None:
    given = section(schedule=name, warmup=1 / 3, learning_rate=1.0, decay=1 / 3 if name == "wsd" else None)
    assert [schedule.learning_rate(step, 6, given) for step in range(6)] == pytest.approx(expected, abs=1e-4)


def theirs(name: str, warmup: int, decay: int) -> list[float]:
    """The rates of transformers' scheduler for `STEPS` steps, and the one behind them."""
    dummy = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    made: dict[str, Callable[[], Any]] = {
        "linear": lambda: optimization.get_linear_schedule_with_warmup(dummy, warmup, STEPS),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(dummy, warmup, STEPS),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(dummy, warmup),
        "wsd": lambda: optimization.get_wsd_schedule(dummy, warmup, decay, STEPS, decay_type="1-sqrt"),
    }
    scheduler = made[name]()
    rates = []
    for _ in range(STEPS + 1):
        rates.append(scheduler.get_last_lr()[0])
        dummy.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("warmup", "first"), [(0, 0), (0.1, 5), (1, 1), (7, 7), (7.0, 7), (0.5, 25)])
@pytest.mark.parametrize(("name", "decay", "last"), [
    ("linear", None, 0), ("cosine", None, 0), ("constant", None, 0), ("wsd", None, 10), ("wsd", 0.3, 15),
])  # fmt: skip
def test_each_rate_is_that_of_transformers(
    name: str, decay: float | None, last: int, warmup: float, first: int
) -> None:
    given = section(schedule=name, warmup=warmup, decay=decay, learning_rate=2e-3)
    ours = [schedule.learning_rate(step, STEPS, given) for step in range(STEPS)]
    expected = theirs(name, first, last)
    assert ours[:first] == pytest.approx(expected[1 : first + 1], rel=1e-12)
    assert ours[first:] == pytest.approx(expected[first:STEPS], rel=1e-12)
    assert min(ours) > 0
    assert max(ours) == 2e-3


def test_a_warmup_of_one_step_is_none() -> None:
    for name in ("linear", "cosine", "constant", "wsd"):
        one, none = (section(schedule=name, warmup=warmup) for warmup in (1, 0))
        assert schedule.learning_rate(0, STEPS, one) == schedule.learning_rate(0, STEPS, none) == 1e-2


def test_a_schedule_that_training_is_too_short_for_is_refused() -> None:
    schedule.require(10, section(warmup=10))
    with pytest.raises(UserError, match=r"train.warmup = 11 steps, and training has 10: lower it, or raise"):
        schedule.require(10, section(warmup=11))
    schedule.require(10, section(schedule="wsd", warmup=5, decay=0.5))
    with pytest.raises(UserError, match=r"'wsd' has 6 steps of warm-up and 5 of decay, and training has 10"):
        schedule.require(10, section(schedule="wsd", warmup=6, decay=0.5))
