"""Layers in groups: what is stored, that both ways of holding them are one, and that gradients are right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pipeline.core import params
from pipeline.lora import adapter, start
from pipeline.model import checkpoint, groups, loss, pack, packed
from pipeline.model.groups import GroupLinear
from pipeline.model.prompt import Row
from pipeline.quantize import grouped
from tests.made import parameters

CPU = torch.device("cpu")
ROWS = [Row("a", "a", list(range(20, 40)), [50, 51, 52, 1]), Row("b", "b", list(range(60, 75)), [80, 81, 1])]


def layer(bias: bool, dtype: torch.dtype, outputs: int = 24, inputs: int = 128, group_size: int = 32) -> GroupLinear:
    """A layer with random codes and constants."""
    draw = torch.Generator().manual_seed(5)
    plain = torch.nn.Linear(inputs, outputs, bias, dtype=dtype).requires_grad_(False)
    codes = torch.randint(0, 16, (outputs, inputs), generator=draw, dtype=torch.uint8)
    shape = (outputs, inputs // group_size)
    scale, zero = 0.01 + 0.01 * torch.rand(shape, generator=draw), 15 * torch.rand(shape, generator=draw)
    return GroupLinear.of(plain, "hqq", codes, scale, zero)


def saved(tiny_model: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, group_size: int = 32) -> Path:
    """The tiny model by HQQ, as the stage saves it."""
    model = checkpoint.pretrained(tiny_model, CPU, dtype=dtype)
    settings: dict[str, Any] = {"method": "hqq", "double_quantization": False, "group_size": group_size}
    settings |= {"calibration_rows": 128, "int8_threshold": 6.0, "perplexity_tokens": 256}
    grouped.replace(model, params.Quantize(**settings), [])
    model.save_pretrained(folder)
    return folder


def test_every_pair_of_codes_is_unpacked_as_it_was_packed() -> None:
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    held = groups.packed(codes)
    assert held.shape == (256, 1)
    assert len(held.unique()) == 256
    assert torch.equal(groups.unpacked(held), codes)


def test_a_weight_is_its_code_less_the_zero_times_the_scale_of_its_group() -> None:
    one = layer(False, torch.float32)
    codes = groups.unpacked(one.weight)
    for row, column in ((0, 0), (3, 31), (3, 32), (23, 127)):
        scale, zero = float(one.scale[row, column // 32]), float(one.zero[row, column // 32])
        assert float(one.dense()[row, column]) == pytest.approx((int(codes[row, column]) - zero) * scale, rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_inputs_are_those_of_a_plain_layer_with_the_dequantized_weights(bias: bool) -> None:
    one = layer(bias, torch.float32)
    plain = torch.nn.Linear(128, 24, bias)
    plain.weight.data = one.dense()
    if bias:
        plain.bias.data = one.bias.data
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, truth = one(found), plain(expected)
    torch.testing.assert_close(y, truth)
    (y * y.detach().cos()).sum().backward()
    (truth * truth.detach().cos()).sum().backward()
    assert expected.grad is not None
    assert float(expected.grad.norm()) > 0
    torch.testing.assert_close(found.grad, expected.grad)


def test_no_unpacked_weight_is_kept_for_the_backward_pass() -> None:
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    one = layer(False, torch.float32)
    plain = torch.nn.Linear(128, 24, False).requires_grad_(False)
    for some in (one, plain):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            some(torch.randn(3, 128, requires_grad=True))
        assert bool(kept) == (some is plain)


def test_transformers_reads_what_was_saved_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    """Codes in bytes, and constants in float16, though the model is in bfloat16."""
    model = checkpoint.pretrained(saved(tiny_model, tmp_path), CPU)
    found = list(packed.in_groups(model))
    assert len(found) == 14
    assert {(one.method, one.group_size, one.dense_dtype) for _, one in found} == {("hqq", 32, torch.bfloat16)}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for name, one in found:
            assert (one.weight.dtype, one.scale.dtype, one.zero.dtype) == (torch.uint8, torch.float16, torch.float16)
            for part in ("weight", "scale", "zero"):
                assert torch.equal(getattr(one, part), file.get_tensor(f"{name}.{part}"))
    assert type(model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_of_holding_the_weights_give_the_same_logits(
    dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    folder = saved(tiny_model, tmp_path, dtype)
    on_the_fly, kept = checkpoint.pretrained(folder, CPU), checkpoint.pretrained(folder, CPU)
    packed.dequantize(kept)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        assert torch.equal(on_the_fly(ids).logits, kept(ids).logits)
    assert not any(isinstance(one, GroupLinear) for one in kept.modules())


def gradient(adapted: Any) -> torch.Tensor:
    adapted.zero_grad()
    loss.summed(adapted, pack.pack(pack.trees(ROWS), CPU)).backward()
    return torch.cat(
        [tensor.grad.flatten().float() for tensor in adapter.tensors(adapted).values() if tensor.grad is not None]
    )


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_gradients_of_an_adapter_are_those_on_the_dequantized_weights_also_after_an_evaluation(
    targets: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Fused layers and PEFT's own, layers with an adapter and without one."""
    folder = saved(tiny_model, tmp_path, torch.float32)
    lora = parameters.lora(target_modules=targets)
    pair = []
    for dense in (False, True):
        model = checkpoint.pretrained(folder, CPU)
        if dense:
            packed.dequantize(model)
        adapted = start.attach(model.requires_grad_(False), lora, 1)
        draw = torch.Generator().manual_seed(3)
        for _, tensor in sorted(adapter.tensors(adapted).items()):
            tensor.data = (torch.randn(tensor.shape, generator=draw) * 0.05).to(tensor.dtype)
        pair.append(adapted)
    truth = gradient(pair[1])
    assert float(truth.norm()) > 0
    for _ in range(2):
        torch.testing.assert_close(gradient(pair[0]), truth, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            pair[0].eval()(input_ids=torch.tensor([[5, 6, 7]]))
