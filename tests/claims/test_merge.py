"""Merging on a tiny model: equal up to rounding in float32, not in 4 bits; and that a wrong merge is noticed."""

import copy
from typing import Any

import pytest
import torch

from claims import lab, merge, register
from pipeline.core import params
from pipeline.model import checkpoint
from pipeline.quantize import blocks
from pipeline.score.significance import Interval
from tests import ROOT

REGISTER = register.load(ROOT / register.FILE)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "ROUNDS", 3)
    monkeypatch.setattr(merge, "NEW_TOKENS", 4)
    monkeypatch.setattr(merge, "SPREAD", 0.1)


@pytest.fixture
def placed(claims_base: params.Params) -> params.Params:
    """The claims' base, and the same in NF4."""
    config = blocks.config(params.Quantize(**claims_base.quantize.model_dump() | {"method": "nf4"}), torch.float32)
    model = checkpoint.pretrained(lab.BASE, torch.device("cpu"), quantization_config=config)
    model.save_pretrained(lab.quantized("nf4"))
    return claims_base


def failed(values: dict[str, Any]) -> set[str]:
    """The values, but for times, that are not as the register asks."""
    conditions = [one for one in REGISTER["merge"].reproduced_when if "time" not in one.value]
    return {one.value for one in conditions if not register._finding(one, values).holds}


def test_merged_is_unmerged_but_for_4_bits(placed: params.Params) -> None:
    found = merge.merged().values
    assert placed.lora.r == 4
    assert failed(dict(found)) == set()
    assert found["answers"] == 8
    exact, rounded = found["logit_difference_float64"], found["logit_difference"]
    assert isinstance(exact, float)
    assert isinstance(rounded, float)
    assert exact <= rounded < 1e-4
    assert 0 < found["logit_rounding_of_base"] < 1e-4  # type: ignore[operator]
    lost = found["nf4_update_lost"]
    assert isinstance(lost, float)
    assert lost > 0.1
    for name in ("merged", "unmerged"):
        assert isinstance(found[f"{name}_over_base_time"], Interval)


def test_a_merge_at_another_scale_is_noticed(placed: params.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.01 * delta(self, name))
    assert placed.lora.alpha == 8
    assert "logit_difference" in failed(dict(merge.merged().values))


def test_a_merge_that_does_nothing_is_not_reproduced(placed: params.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beside an adapter that acts, nor beside one that does nothing either, to which it is equal."""
    from peft.tuners.lora import LoraModel

    assert placed.seeds
    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)
    found = merge.merged()
    assert {"logit_difference", "logit_change_from_base"} <= failed(dict(found.values))
    assert found.values["answers_changed_from_base"] == 0
    assert register.judge(REGISTER["merge"], found).verdict == "not reproduced"
    monkeypatch.setattr(merge, "twins", lambda base, _: (copy.deepcopy(base), copy.deepcopy(base)))
    found = merge.merged()
    assert failed(dict(found.values)) == {"logit_change_from_base"}
    assert register.judge(REGISTER["merge"], found).verdict == "not reproduced"
