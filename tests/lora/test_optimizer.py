"""The optimizer: as asked for where the device has it, that of its library, near AdamW in 8 bits, the same after a
kill."""

from collections.abc import Callable
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


def by_its_library(name: str, tensor: torch.Tensor, decay: float) -> Any:
    """The optimizer as its library has it, with the options that docs/training.md names."""
    from transformers.optimization import Adafactor

    if name == "adafactor":
        return Adafactor([tensor], lr=1e-2, weight_decay=decay, scale_parameter=False, relative_step=False)
    if name == "muon":
        return torch.optim.Muon([tensor], lr=1e-2, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW([tensor], lr=1e-2, weight_decay=decay, betas=(0.9, 0.999))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("name", "beta2"), [("adamw", 0.999), ("adamw", None), ("adafactor", None), ("muon", None)])
def test_each_is_that_of_its_library_to_the_bit(name: str, beta2: float | None, decay: float) -> None:
    draw = torch.Generator().manual_seed(3)
    matrix = torch.randn(64, 96, generator=draw)
    one = by_its_library(name, matrix, decay)
    for _ in range(20):
        matrix.grad = torch.randn(64, 96, generator=draw)
        one.step()
    assert torch.equal(stepped(name, 20, beta2=beta2, weight_decay=decay), matrix)
    assert not torch.equal(stepped(name, 20, beta2=beta2, weight_decay=0.1 - decay), matrix)


def test_adafactor_computes_what_its_paper_says() -> None:
    """arXiv 1804.04235, algorithm 4 without the scale of the parameter: factored moments, updates clipped at 1."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(64, 96, generator=draw).double()
    row, column = torch.zeros(64, 1, dtype=torch.float64), torch.zeros(1, 96, dtype=torch.float64)
    for t in range(1, 21):
        g = torch.randn(64, 96, generator=draw).double()
        beta2 = 1 - t**-0.8
        row = beta2 * row + (1 - beta2) * (g**2).mean(1, keepdim=True)
        column = beta2 * column + (1 - beta2) * (g**2).mean(0, keepdim=True)
        u = g / (row @ column / row.mean()).sqrt()
        x -= 1e-2 * u / max(1.0, float(u.square().mean().sqrt()))
    assert torch.allclose(stepped("adafactor", 20, beta2=None).double(), x, atol=1e-5)


def test_the_steps_of_muon_are_nearly_orthogonal_and_a_fifth_of_the_learning_rate() -> None:
    """arXiv 2502.16982, section 2.2: the root mean square of an update is 0.2 times the learning rate, here 1e-2."""
    step = stepped("muon", 0, beta2=None) - stepped("muon", 1, beta2=None)
    values = torch.linalg.svdvals(step)
    assert float(values.max() / values.min()) < 2.5
    assert float(torch.linalg.svdvals(torch.randn(64, 96)).max() / values.min()) > 2.5
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 1e-2, rel=0.2)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_matrix_that_begins_at_zero_moves_with_the_learning_rate(name: str) -> None:
    """As B does. torch's Adafactor takes steps of a thousandth of it there, so it is not the one that is used."""

    def moved(build: Callable[[torch.Tensor], Any]) -> float:
        matrix = torch.zeros(64, 96)
        one = build(matrix)
        for group in one.param_groups:
            group["lr"] = 1e-2
        matrix.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(4))
        one.step()
        return float(matrix.square().mean().sqrt())

    beta2 = 0.999 if name == "adamw" else None
    assert 0.15e-2 < moved(lambda matrix: optimizer.build([matrix], section(optimizer=name, beta2=beta2))) < 1.1e-2
    assert moved(lambda matrix: torch.optim.Adafactor([matrix])) < 2e-5


def test_muon_leaves_what_is_no_matrix_to_adamw_and_both_survive_a_checkpoint(tmp_path: Path) -> None:
    def made() -> tuple[list[torch.Tensor], Any]:
        tensors = [torch.ones(8), torch.ones(8, 4)]
        return tensors, optimizer.build(tensors, section(optimizer="muon", beta2=None))

    def step(tensors: list[torch.Tensor], one: Any, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        for group in one.param_groups:
            group["lr"] = 1e-2
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=draw)
        one.step()

    whole, first, second = made(), made(), made()
    alone = [torch.ones(8), torch.ones(8, 4)]
    expected = (by_its_library("adamw", alone[0], 0.0), by_its_library("muon", alone[1], 0.0))
    for number in range(4):
        step(*whole, number)
        for tensor, wanted, grad in zip(alone, expected, [tensor.grad for tensor in whole[0]], strict=True):
            tensor.grad = grad
            wanted.step()
        if number < 2:
            step(*first, number)
    assert all(map(torch.equal, whole[0], alone))
    torch.save(first[1].state_dict(), tmp_path / "state.pt")
    second[1].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for to, tensor in zip(second[0], first[0], strict=True):
        to.copy_(tensor)
    for number in range(2, 4):
        step(*second, number)
    assert all(map(torch.equal, whole[0], second[0]))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_in_8_bits_it_stays_near_adamw(decay: float) -> None:
    exact, near = (stepped(name, 20, weight_decay=decay) for name in ("adamw", "adamw8bit"))
    moved = (exact - stepped("adamw", 0)).norm()
    assert 0 < (near - exact).norm() < 0.15 * moved


def test_moments_are_in_8_bits_and_small_ones_in_float32() -> None:
    wide, narrow = torch.zeros(64, 96), torch.zeros(8, 8)
    one: Any = optimizer.build([wide, narrow], section(optimizer="adamw8bit"))
    for tensor in (wide, narrow):
        tensor.grad = torch.ones_like(tensor)
    one.step()
    assert one.state[wide]["state1"].dtype == one.state[wide]["state2"].dtype == torch.uint8
    assert one.state[narrow]["state1"].dtype == torch.float32


@pytest.mark.parametrize(("name", "rate"), [("adafactor", 1e-2), ("muon", 5e-2)])
def test_training_lowers_the_loss(tiny_model: Path, name: str, rate: float) -> None:
    """With AdamW's learning rate; Muon's steps are a fifth of it, and AdamW's first ones about all of it."""
    one = trainer(tiny_model, optimizer=name, beta2=None, learning_rate=rate)
    for _ in range(10):
        one.step(some_trees(), 0.0)
    assert one.log[-1].loss < 0.7 * one.log[0].loss


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


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "muon"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_model: Path, tmp_path: Path, name: str) -> None:
    beta2 = None if name in params.WITHOUT_BETA2 else 0.999
    whole, first, second = (trainer(tiny_model, optimizer=name, beta2=beta2) for _ in range(3))
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
        ("adamw8bit", "mps", "adamw or adafactor or muon"),
        ("paged-adamw8bit", "cpu", "adamw or adamw8bit or adafactor or muon"),
        ("paged-adamw8bit", "mps", "adamw or adafactor or muon"),
    ],
)
def test_what_a_device_cannot_do_is_refused(name: str, device: str, instead: str) -> None:
    with pytest.raises(UserError, match=f"train.optimizer = '{name}' needs .*runs on {device}: set it to {instead}$"):
        optimizer.require(name, torch.device(device))


def test_what_a_device_can_do_is_let_through() -> None:
    for name, devices in params.OPTIMIZERS.items():
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
    assert set(params.OPTIMIZERS) == set(params.Train.model_fields["optimizer"].annotation.__args__)  # type: ignore[union-attr]


def test_gradients_of_float16_are_those_of_float32(tiny_model: Path) -> None:
    """Of the sum, divided in float32: the planted factor takes the gradient of a mean out of float16's range."""
    norms = []
    for dtype in (torch.float32, torch.float16):
        lora = LORA.model_copy(update={"dropout": 0.0})
        one = train.Trainer(fresh(tiny_model, lora).to(dtype), section(), seed=7, steps=10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "summed", lambda *given: 1e-3 * SUMMED(*given))
            one.step(some_trees() * 5, 0.0)
        norms.append(one.log[0].grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
