"""Bits as they are stored, and perplexity under quantization: sizes by hand, planted faults."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from claims import bits, lab, register
from pipeline.core import params
from pipeline.core.records import Example
from pipeline.model import checkpoint
from pipeline.quantize import blocks
from pipeline.score.significance import Interval
from tests import ROOT
from tests.made.models import reading_bos

REGISTER = register.load(ROOT / register.FILE)


@pytest.fixture
def quantized(claims_base: params.Params) -> Path:
    """The base in NF4 with double quantization, written by the libraries."""
    config = blocks.config(params.Quantize(**claims_base.quantize.model_dump() | {"method": "nf4"}), torch.float32)
    model = checkpoint.pretrained(lab.BASE, torch.device("cpu"), quantization_config=config)
    model.save_pretrained(lab.quantized("nf4"))
    return lab.quantized("nf4") / "model.safetensors"


def test_bits_are_those_of_values_and_constants(quantized: Path) -> None:
    found = bits.nf4().values
    assert len(bits.quantized_layers(quantized)) == 14
    assert found["nf4_bits"] == 4.5
    assert found["nf4_constants_bits"] == 0.5
    # Of layers this small, 64 times 64 and less, one constant in 256 would be less than the one that each has.
    parameters = {"q": 4096, "k": 2048, "v": 2048, "o": 4096, "gate": 8192, "up": 8192, "down": 8192}
    constants = sum(8 * n / 64 + 32 * math.ceil(n / 64 / 256) for n in parameters.values())
    assert found["nf4_double_constants_bits"] == pytest.approx(constants / sum(parameters.values()))
    full, qlora = found["llama_65b_full_gb"], found["llama_65b_qlora_gb"]
    assert isinstance(full, float)
    assert isinstance(qlora, float)
    assert full > 780
    assert qlora < 48


def test_values_of_more_than_4_bits_are_noticed(quantized: Path) -> None:
    held = load_file(quantized)
    padded = {name: torch.cat([one, one]) if name.endswith("weight") else one for name, one in held.items()}
    save_file(padded, quantized)
    found = bits.nf4().values["nf4_double_bits"]
    assert isinstance(found, float)
    assert found > 8


def test_without_double_quantization_the_claim_fails(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = quantized.with_name("single.safetensors")
    bits.write_single(lab.BASE / "model.safetensors", bits.quantized_layers(quantized), single)
    shutil.move(single, quantized)
    monkeypatch.setattr(bits, "write_single", lambda *given: shutil.copy(quantized, given[-1]))
    assert register.judge(REGISTER["nf4-bits"], bits.nf4()).verdict == "not reproduced"


def test_llama_cpps_types_take_their_bits_and_cost_what_they_do(claims_base: params.Params) -> None:
    found = bits.gguf().values
    assert claims_base.compare.confidence == 0.95
    assert [found[f"{name}_bits"] for name in ("q8_0", "q5_1", "q5_0", "q4_0")] == [8.5, 6.0, 5.5, 4.5]
    # Percent add up, nearly: the last over the base by three steps, or at once.
    steps = [
        found[f"{name}_percent"] for name in ("q8_0_over_base", "q5_1_over_q8_0", "q5_0_over_q5_1", "q4_0_over_q5_0")
    ]
    product = 1.0
    for step in steps:
        assert isinstance(step, Interval)
        assert step.low <= step.value <= step.high
        product *= 1 + step.value / 100
    base, last = found["base_perplexity"], found["q4_0_perplexity"]
    assert isinstance(base, float)
    assert isinstance(last, float)
    assert last / base == pytest.approx(product)
    assert last != base


def test_a_base_of_q4_1_is_rigged_against_q5_1() -> None:
    """Values on 15 even steps: of 31 steps none but the ends fits, and all others are pushed outward."""
    from gguf import GGMLQuantizationType, quants

    draw = np.random.Generator(np.random.PCG64(1))
    steps = np.concatenate([np.tile([0.0, 15.0], (256, 1)), draw.integers(0, 16, (256, 30))], axis=1)
    even = (steps - 7.5).astype(np.float32)
    found = {}
    for label, weight in (("even", even), ("blurred", bits.blurred(even, draw))):
        for name in ("Q5_0", "Q5_1"):
            kind = GGMLQuantizationType[name]
            sums_3 = bits.products(weight, quants.dequantize(quants.quantize(weight, kind), kind))
            found[label, name] = bits.errors("x", sums_3)
    assert found["even", "Q5_1"]["x_gain_percent"] > 1
    assert found["blurred", "Q5_1"]["x_gain_percent"] < 0.1
    assert found["blurred", "Q5_1"]["x_error_percent"] < found["blurred", "Q5_0"]["x_error_percent"]


@pytest.mark.parametrize("bos", [True, False])
def test_abstracts_begin_as_the_model_reads_text(bos: bool, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = checkpoint.tokenizer(reading_bos("gemma3_text", bos, tiny_model, tmp_path / "m"))
    rows = [
        Example(str(at), "a", "a", source, "t", "l") for at, source in enumerate(["red cat", "a \u4e16", "red cat"])
    ]
    found = bits.abstracts(tokenizer, rows, 96)
    assert found == [tokenizer(text).input_ids for text in ("red cat", "a \u4e16")]
    assert [ids[0] == tokenizer.convert_tokens_to_ids("<|bos|>") for ids in found] == [bos, bos]


def test_a_rise_is_in_percent_of_perplexity(claims_base: params.Params) -> None:
    counts_n = np.array([10.0, 30.0])
    rise = bits.rise(np.array([0.1, 0.3]), counts_n, claims_base.compare)
    assert rise.value == rise.low == rise.high == pytest.approx(100 * (math.exp(0.01) - 1))
