"""A base by GPTQ and by HQQ, as the stage leaves it and later stages take it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.model import checkpoint, load, memory, packed
from pipeline.model.groups import GroupLinear
from pipeline.quantize import calibration, grid, quantize
from tests.made.records import base_facts

CPU = torch.device("cpu")


def asked(project: params.Params, method: str, group_size: int = 64, rows: int = 128) -> params.Quantize:
    settings = {"method": method, "double_quantization": False, "group_size": group_size, "calibration_rows": rows}
    return project.quantize.model_copy(update=settings)


def stage(
    project: params.Params, tiny_model: Path, method: str, dtype: str = "float32", group_size: int = 64, rows: int = 128
) -> QuantizedFacts:
    shutil.copytree(tiny_model, paths.BASE)
    contracts.write(paths.BASE_FACTS, base_facts(dtype=dtype, sha256=records.sha256_tree(paths.BASE)))
    quantize.write_quantized(asked(project, method, group_size, rows), project.runtime)
    return contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)


@pytest.mark.parametrize("method", ["gptq", "hqq"])
def test_the_stage_writes_a_checkpoint_that_later_stages_load_and_its_facts(
    method: str, project: params.Params, tiny_model: Path
) -> None:
    facts = stage(project, tiny_model, method)
    # 4 bits, and two constants of 16 bits for 64 weights.
    assert facts.bits_per_parameter == 4.5
    assert (facts.method, facts.group_size, facts.double_quantization) == (method, 64, False)
    assert facts.quantized_layers == len(facts.layers) == 14
    assert 0.03 < min(facts.layers.values()) < max(facts.layers.values()) < 0.2
    assert facts.perplexity_after != facts.perplexity_before
    assert facts.perplexity_after == pytest.approx(facts.perplexity_before, rel=0.2)
    assert (facts.calibration_tokens is None) == (method == "hqq")
    assert facts.sha256 == records.sha256_tree(paths.QUANTIZED)
    unpacked, on_the_fly = (load.quantized(CPU, keep_dequantized=keep) for keep in (True, False))
    assert sum(isinstance(layer, GroupLinear) for layer in on_the_fly.modules()) == 14
    assert not any(isinstance(layer, GroupLinear) for layer in unpacked.modules())
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        torch.testing.assert_close(on_the_fly(ids).logits, unpacked(ids).logits)
    exact = checkpoint.pretrained(paths.BASE, CPU)
    for name, error in facts.layers.items():
        weight, found = (model.get_submodule(name).weight.detach() for model in (exact, unpacked))
        assert float((weight - found).norm() / weight.norm()) == pytest.approx(error, rel=1e-4)
    base = memory.Base.stored(paths.QUANTIZED, facts)
    assert base.packed_bytes == pytest.approx(facts.bytes, rel=0.05)


@pytest.mark.parametrize("method", ["gptq", "hqq"])
def test_groups_of_other_sizes_cost_what_their_constants_take(
    method: str, project: params.Params, tiny_model: Path
) -> None:
    facts = stage(project, tiny_model, method, "bfloat16", group_size=32)
    assert facts.bits_per_parameter == 5.0
    loaded = load.quantized(CPU, keep_dequantized=False)
    with pytest.raises(UserError, match=r"quantize.group_size = 64 was asked for, but the loaded model has 32"):
        packed.require_effective(loaded, replace(facts, group_size=64))
    other = "hqq" if method == "gptq" else "gptq"
    wrong = f"'{other}' with 14 layers was asked for, but .* has 14 layers of {{'{method}'}}"
    with pytest.raises(UserError, match=wrong):
        packed.require_effective(loaded, replace(facts, method=other))


def test_a_stage_that_is_run_again_writes_the_same_bytes(project: params.Params, tiny_model: Path) -> None:
    first = stage(project, tiny_model, "gptq")
    shutil.rmtree(paths.OUT / "models")
    assert stage(project, tiny_model, "gptq") == first


def test_groups_that_do_not_fill_a_layer_are_refused_before_anything_is_loaded(
    project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="quantize.group_size = 128 does not divide 64, the inputs of linear layers"):
        stage(project, tiny_model, "hqq", group_size=128)


def test_gptq_reads_training_sources_spread_over_the_split_and_no_answer(
    project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    original = calibration.blocks

    def noting(model: Any, windows: list[list[int]]) -> Any:
        read.extend(windows)
        return original(model, windows)

    monkeypatch.setattr(calibration, "blocks", noting)
    facts = stage(project, tiny_model, "gptq", rows=3)
    tokenizer = checkpoint.tokenizer(paths.BASE)
    train = records.read_rows(paths.split("train"), records.Example)
    sources = list(dict.fromkeys(row.source for row in train))
    wanted = [sources[at * len(sources) // 3] for at in range(3)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in read]
    assert texts == [source.strip() for source in wanted]
    assert facts.calibration_tokens == sum(map(len, read))
    assert len(sources) > 3


def test_gptq_keeps_the_outputs_of_a_real_layer_better_than_rounding(project: params.Params, tiny_model: Path) -> None:
    """On what the first block of the model reads of the training sources."""
    stage(project, tiny_model, "gptq")
    exact, found = checkpoint.pretrained(paths.BASE, CPU), load.quantized(CPU, keep_dequantized=True)
    windows = quantize._calibration(checkpoint.tokenizer(paths.BASE), 128, 256)
    for name, products in next(calibration.blocks(exact, windows)).items():
        weight = exact.get_submodule(name).weight.data
        in_groups = weight.unflatten(1, (-1, 64))
        scale, zero = grid.span(in_groups)
        nearest = ((grid.nearest(in_groups / scale, zero.round()) - zero.round()) * scale).flatten(1)
        lost, plain = (
            float(torch.einsum("oi,ij,oj->", weight - other, products, weight - other))
            for other in (found.get_submodule(name).weight.data, nearest)
        )
        assert lost < plain, name


def test_training_sources_of_one_token_in_all_are_refused(project: params.Params, tiny_model: Path) -> None:
    rows = records.read_rows(paths.split("train"), records.Example)
    records.write_rows(paths.split("train"), [replace(row, source="") for row in rows])
    with pytest.raises(
        UserError, match=r"train.jsonl are one token in all, too few to calibrate gptq: name more train"
    ):
        stage(project, tiny_model, "gptq")
