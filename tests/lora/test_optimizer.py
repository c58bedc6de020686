"""The optimizer: as asked for where the device has it, near AdamW in 8 bits, and the same after a kill."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.lora import optimizer, train
from pipeline.model import loss
from tests.made.trainer import LORA, fresh, section, some_trees, trainer

SUMMED = loss.summed


def stepped(name: str, steps: int, **changes: Any) -> torch.Tensor:
    """One matrix of 64x96 that follows the same gradients."""
    draw = torch.Generator().manual_seed(3)
    matrix = torch.randn(64, 96, generator=draw)
    one = optimizer.build([matrix], section(optimizer=name, **changes))
    for group in one.param_groups:
        group["lr"] = 1e-2
    for _ in range(steps):
        matrix.grad = torch.randn(64, 96, generator=draw)
        one.step()
    return matrix


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_in_8_bits_it_stays_near_adamw(decay: float) -> None:
    exact, near = (stepped(name, 20, weight_decay=decay) for name in ("adamw", "adamw8bit"))
    moved = (exact - stepped("adamw", 0)).norm()
    assert 0 < (near - exact).norm() < 0.15 * moved


def test_moments_are_in_8_bits_and_small_ones_in_float32() -> None:
    wide, narrow = torch.zeros(64, 96), torch.zeros(8, 8)
    one = optimizer.build([wide, narrow], section(optimizer="adamw8bit"))
    for tensor in (wide, narrow):
        tensor.grad = torch.ones_like(tensor)
    one.step()
    assert one.state[wide]["state1"].dtype == one.state[wide]["state2"].dtype == torch.uint8
    assert one.state[narrow]["state1"].dtype == torch.float32


def test_training_in_8_bits_lowers_the_loss_as_adamw_does(tiny_model: Path) -> None:
    losses = {}
    for name in ("adamw", "adamw8bit"):
        one = trainer(tiny_model, optimizer=name)
        for _ in range(10):
            one.step(some_trees(), 0.0)
        losses[name] = [step.loss for step in one.log]
    assert losses["adamw8bit"][0] == losses["adamw"][0]
    assert losses["adamw8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.05)
    assert losses["adamw8bit"][-1] < 0.7 * losses["adamw8bit"][0]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_model: Path, tmp_path: Path, name: str) -> None:
    whole, first, second = (trainer(tiny_model, optimizer=name) for _ in range(3))
    for _ in range(6):
        whole.step(some_trees(), 0.0)
    for _ in range(3):
        first.step(some_trees(), 0.0)
    first.save(tmp_path)
    second.resume(tmp_path)
    for _ in range(3):
        second.step(some_trees(), 0.0)
    assert second.log == whole.log
    for key, master in whole.masters.items():
        assert torch.equal(master, second.masters[key]), key


@pytest.mark.parametrize(
    ("name", "device", "instead"),
    [
        ("adamw8bit", "mps", "adamw"),
        ("paged-adamw8bit", "cpu", "adamw or adamw8bit"),
        ("paged-adamw8bit", "mps", "adamw"),
    ],
)
def test_what_a_device_cannot_do_is_refused(name: str, device: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"train.optimizer = '{name}' needs .*runs on {device}: set it to {instead}$"):
        optimizer.require(name, torch.device(device))


def test_what_a_device_can_do_is_let_through() -> None:
    for name, devices in optimizer.DEVICES.items():
        for device in devices:
            optimizer.require(name, torch.device(device))


def test_pages_are_asked_for_with_the_parameters_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA alone has pages: here the class is a stand-in, and bitsandbytes' own says that it pages."""
    import bitsandbytes

    seen: list[Any] = []
    assert bitsandbytes.optim.PagedAdamW8bit([torch.zeros(2)]).is_paged

    def paged(_: Any, **options: Any) -> str:
        seen.append(options)
        return "paged"

    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW8bit", paged)
    built: Any = optimizer.build([torch.zeros(2)], section(optimizer="paged-adamw8bit", beta2=0.95, weight_decay=0.1))
    assert built == "paged"
    assert seen == [{"betas": (0.9, 0.95), "weight_decay": 0.1}]


def test_the_schema_knows_the_same_names() -> None:
    assert set(optimizer.DEVICES) == set(params.Train.model_fields["optimizer"].annotation.__args__)  # type: ignore[union-attr]


def test_gradients_of_float16_are_those_of_float32(tiny_model: Path) -> None:
    """Of the sum, divided in float32: the planted factor takes the gradient of a mean out of float16's range."""
    norms = []
    for dtype in (torch.float32, torch.float16):
        lora = LORA.model_copy(update={"dropout": 0.0})
        one = train.Trainer(fresh(tiny_model, lora).to(dtype), section(), seed=7, steps=10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "summed", lambda model, packed: 1e-3 * SUMMED(model, packed))
            one.step(some_trees() * 5, 0.0)
        norms.append(one.log[0].grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
