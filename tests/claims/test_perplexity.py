"""Perplexity under quantization: the forms are what the papers and bitsandbytes have, and ratios are paired."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from claims import lab, perplexity, register
from claims.evidence import Evidence
from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.model import checkpoint, packed
from pipeline.quantize import blocks
from pipeline.score.significance import Interval
from tests import ROOT
from tests.made.models import reading_bos

CPU = torch.device("cpu")


@pytest.fixture
def experiment(project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> params.Params:
    lab.BASE.parent.mkdir(parents=True)
    lab.BASE.symlink_to(tiny_model)
    monkeypatch.setattr(lab, "experiment", lambda: project)
    monkeypatch.setattr(perplexity, "WINDOW", 16)
    monkeypatch.setattr(perplexity, "WINDOWS", 12)
    return project


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def value(evidence: Evidence, name: str) -> float:
    found = evidence.values[name]
    assert isinstance(found, Interval)
    assert found.low <= found.value <= found.high
    return found.value


@pytest.mark.parametrize(
    ("claim", "measure"), [("llm-int8", perplexity.llm_int8), ("nf4-beats-fp4", perplexity.nf4_beats_fp4)]
)
@pytest.mark.usefixtures("experiment")
def test_a_measurement_has_what_its_conditions_name_and_ratios_are_those_of_perplexities(
    claim: str, measure: Callable[[], Evidence]
) -> None:
    evidence = measure()
    entry = register.load(ROOT / register.FILE)[claim]
    assert len(register.judge(entry, evidence).findings) == len(entry.reproduced_when)
    assert set(entry.published) - set(evidence.values) <= {"fp4_e3m0_ppl"}
    assert "12 windows of 16 tokens" in evidence.notes[0]
    ratios = [name for name in evidence.values if "_over_" in name]
    assert len(ratios) == {"llm-int8": 6, "nf4-beats-fp4": 4}[claim]
    for name in ratios:
        here, _, there = name.replace("double_over", "nf4_double_over").partition("_over_")
        expected = value(evidence, f"{here}_ppl") / value(evidence, f"{there}_ppl")
        assert value(evidence, name) == pytest.approx(expected)


def test_without_outliers_nothing_of_llm_int8_can_be_compared(
    experiment: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = register.load(ROOT / register.FILE)["llm-int8"]
    found = {}
    for threshold in (0.5, 100.0, 0.0):
        given = experiment.quantize.model_copy(update={"int8_threshold": threshold})
        monkeypatch.setattr(lab, "experiment", lambda given=given: experiment.model_copy(update={"quantize": given}))
        evidence = perplexity.llm_int8()
        found[threshold] = evidence.values["outlier_columns_percent"], register.judge(claim, evidence).verdict
    share, verdict = found.pop(0.5)
    assert isinstance(share, float)
    assert 0 < share < 100
    assert verdict in ("reproduced", "not reproduced", "inconclusive")
    assert found == dict.fromkeys((100.0, 0.0), (0, "not comparable at this scale"))
    assert evidence.not_comparable == perplexity.NO_OUTLIERS.format(threshold=0.0)


def test_outliers_are_columns_in_which_a_value_reaches_the_threshold() -> None:
    layer = torch.nn.Linear(4, 2)
    seen = perplexity.count_outliers([layer], 6.0)
    x = torch.tensor([[[0.0, -6.0, 5.9, 0.0], [7.0, 9.0, 0.0, 0.0]]])
    layer(x)
    layer(x[:, :1])
    assert seen == {"outliers": 2 + 1, "columns": 8}


def test_losses_are_those_of_each_token_after_the_first(experiment: params.Params) -> None:
    reading = perplexity._reading(experiment, CPU)
    model = checkpoint.pretrained(lab.BASE, CPU)
    reading.read("float", model)
    ids_nxW = reading.ids_nxW
    assert ids_nxW.shape == (12, 16)
    with torch.no_grad():
        log_nxWxV = model(ids_nxW).logits.double().log_softmax(-1)
    expected_n = -log_nxWxV[:, :-1].gather(2, ids_nxW[:, 1:, None])[..., 0].sum(-1)
    assert reading.losses["float"] == pytest.approx(expected_n.numpy(), rel=1e-5)


def test_windows_begin_as_the_model_reads_text(experiment: params.Params, tiny_model: Path, tmp_path: Path) -> None:
    assert experiment
    assert "without BOS, as the model reads text" in perplexity._reading(experiment, CPU).note
    lab.BASE.unlink()
    lab.BASE.symlink_to(reading_bos("gemma3_text", True, tiny_model, tmp_path / "m"))
    reading = perplexity._reading(experiment, CPU)
    assert (reading.ids_nxW[:, 0] == checkpoint.tokenizer(lab.BASE).bos_token_id).all()
    assert "12 windows of 16 tokens, each with a BOS first" in reading.note


def test_text_is_needed(experiment: params.Params) -> None:
    for probes in ([], [experiment.forget.probes[0].model_copy(update={"style": "chat"})]):
        without = experiment.forget.model_copy(update={"probes": probes})
        with pytest.raises(UserError, match="forget.probes has no probe of style plain"):
            perplexity._reading(experiment.model_copy(update={"forget": without}), CPU)


def test_less_text_than_the_register_says_is_refused(
    experiment: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "WINDOWS", 10_000)
    with pytest.raises(
        UserError, match=r"forget\.probes\.general\.source = .* holds [0-9,]+ whole windows of 16 tokens, not 10,000"
    ):
        perplexity._reading(experiment, CPU)


def test_a_ratio_is_paired(experiment: params.Params) -> None:
    loud_n = np.random.default_rng(0).uniform(10, 90, 12)
    ids_nxW = torch.zeros(12, 16, dtype=torch.long)
    losses = {"one": loud_n, "other": loud_n + 0.1 * 15}
    reading = perplexity.Reading(ids_nxW, [f"text {n // 2}" for n in range(12)], losses, experiment.compare, False)
    ratio, alone = reading.ratio("other", "one"), reading.ratio("one")
    assert ratio.low == pytest.approx(ratio.high) == pytest.approx(math.exp(0.1))
    assert alone.low < alone.value / 1.3
    assert alone.value == pytest.approx(math.exp(loud_n.mean() / 15))


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_four_bits_are_those_of_the_stage_quantize(experiment: params.Params, kind: str, double: bool) -> None:
    given = experiment.quantize.model_dump() | {"method": kind, "double_quantization": double}
    config = blocks.config(params.Quantize(**given), torch.float32)
    theirs = checkpoint.pretrained(lab.BASE, CPU, quantization_config=config)
    packed.dequantize(theirs)
    base = checkpoint.pretrained(lab.BASE, CPU)
    layers = list(perplexity._layers(base))
    assert len(layers) == 14
    for name, layer in base.named_modules():
        if layer in layers:
            mine = perplexity.bitsandbytes_4bit(layer.weight.data, kind, double)
            assert torch.equal(mine, theirs.get_submodule(name).weight)


@pytest.mark.parametrize("codes", [perplexity.INT4, perplexity.E2M1], ids=["int4", "e2m1"])
def test_weights_become_the_nearest_code_of_their_block(codes: list[float]) -> None:
    assert len(codes) == 15
    weight = random(4, 128)
    weight[0, :64] = 0
    found = perplexity.nearest(weight, codes).reshape(-1, 64)
    for block, mine in zip(weight.reshape(-1, 64), found, strict=True):
        candidates = torch.tensor(codes) * block.abs().max()
        nearest = candidates[(block[:, None] - candidates).abs().argmin(-1)]
        torch.testing.assert_close(mine, nearest)


def test_one_constant_a_row_and_a_column_is_what_bitsandbytes_multiplies_without_outliers() -> None:
    from bitsandbytes import functional

    weight, x = random(64, 96).half(), random(8, 96, 1).half()
    (of_x, x_scale, _), (of_weight, weight_scale, _) = map(functional.int8_vectorwise_quant, (x, weight))
    product = functional.int8_linear_matmul(of_x, of_weight)
    theirs = functional.int8_mm_dequant(product, x_scale, weight_scale)
    mine = perplexity.int8_forward(weight, row=True, column=True)(x[None])[0]
    # They multiply where we divide, so that a value between two integers may be rounded to the other.
    torch.testing.assert_close(mine, theirs, atol=0.05, rtol=0.0)
    assert (mine == theirs).float().mean() > 0.95


def test_a_constant_is_shared_by_what_it_should_be() -> None:
    weight, x = random(64, 96), random(8, 96, 1)
    x[0, 0], weight[0, 0] = 300.0, 300.0  # an outlier in one token, and in one output's weights
    exact = x @ weight.T
    errors = {
        (row, column): (perplexity.int8_forward(weight, row, column)(x) - exact)[1:, 1:].norm() / exact[1:, 1:].norm()
        for row, column in ((False, False), (True, False), (True, True))
    }
    assert errors[True, True] < 0.02 < errors[True, False] / 5 < errors[False, False] / 5
