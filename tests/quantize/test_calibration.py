"""What the layers of a block read is what they read in the model itself, whose earlier blocks are already quantized."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.model import checkpoint
from pipeline.model.groups import linears
from pipeline.quantize import calibration
from tests.made.models import of_family

CPU = torch.device("cpu")
WINDOWS = [list(range(5, 25)), list(range(40, 60)), list(range(80, 87)), list(range(30, 50))]


def read(model: Any) -> dict[str, torch.Tensor]:
    """The sums of x x' over all windows, of the model as it is."""
    sums: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            x = given[0].flatten(0, -2).float()
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in linears(model)]
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=torch.tensor([window]))
    for one in hooks:
        one.remove()
    return sums


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_each_block_reads_what_the_replaced_ones_before_it_write(family: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family(family, tied=True, tiny_model=tiny_model, folder=tmp_path / "m")
    model = checkpoint.pretrained(folder, CPU, dtype=torch.float32)
    untouched = read(model)
    seen = []
    for number, products in enumerate(calibration.blocks(model, WINDOWS)):
        now = read(model)
        for name, found in products.items():
            torch.testing.assert_close(found, now[name], rtol=1e-4, atol=1e-4)
            if number:
                assert not torch.allclose(found, untouched[name], rtol=1e-2)
        for name in products:
            model.get_submodule(name).weight.data *= 0.5
        seen += list(products)
    assert sorted(seen) == sorted(name for name, _ in linears(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_read_one_input_share_its_products(tiny_model: Path) -> None:
    model = checkpoint.pretrained(tiny_model, CPU, dtype=torch.float32)
    products = next(calibration.blocks(model, WINDOWS))
    places = {name.rpartition(".")[2]: id(one) for name, one in products.items()}
    assert places["q_proj"] == places["k_proj"] == places["v_proj"]
    assert places["gate_proj"] == places["up_proj"]
    assert len(set(places.values())) == 4
