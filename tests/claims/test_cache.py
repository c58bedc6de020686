"""Expanding key-value heads: equal logits, a larger cache; and that unequal ones are noticed."""

from typing import Any

import pytest
import torch

from claims import cache, lab, register
from claims.evidence import Evidence
from pipeline.core import params
from pipeline.model import checkpoint
from pipeline.score.significance import Interval
from tests import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CONTEXT", 32)
    monkeypatch.setattr(cache, "ROUNDS", 3)


def test_a_model_with_more_key_value_heads_says_the_same_and_holds_more(claims_base: params.Params) -> None:
    assert claims_base.runtime.threads == 1
    found = cache.grouped_query().values
    # Keys and values, 2 layers, 2 heads of 16 numbers of 4 bytes; and 4 heads.
    assert found["bytes_per_token_grouped"] == found["held_bytes_per_token_grouped"] == 512
    assert found["bytes_per_token_expanded"] == found["held_bytes_per_token_expanded"] == 1024
    difference, ratio = found["logit_difference"], found["expanded_over_grouped_time"]
    assert isinstance(difference, float)
    assert 0 <= difference < 1e-5
    assert isinstance(ratio, Interval)
    as_fast = found | {"expanded_over_grouped_time": Interval(1.0, 1.0, 1.0)}
    [*_, faster] = register.judge(register.load(ROOT / register.FILE)["gqa-cache"], Evidence(as_fast)).findings
    assert faster.text.startswith("expanded_over_grouped_time")
    assert faster.holds is False


def test_heads_in_another_order_are_noticed(claims_base: params.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(weight: torch.Tensor, times: int, _: int) -> torch.Tensor:
        return weight.repeat(times, 1, 1)

    monkeypatch.setattr(torch.Tensor, "repeat_interleave", interleaved)
    assert claims_base.runtime.device == "cpu"
    model = checkpoint.pretrained(lab.BASE, CPU)
    assert cache.logit_difference(model, cache.expand(model), torch.arange(5, 20)[None]) > 1e-3


def test_a_step_decodes_behind_the_whole_context(claims_base: params.Params) -> None:
    """Its logit is that of the same text computed at once."""
    assert claims_base.seeds
    model = checkpoint.pretrained(lab.BASE, CPU)
    draw = torch.Generator().manual_seed(cache.SEED)
    ids_1xL = torch.randint(3, model.config.vocab_size, (1, 32), generator=draw)
    with torch.inference_mode():
        once: Any = model(torch.cat([ids_1xL, ids_1xL[:, :1]], 1)).logits[0, -1, 0]
    assert cache.step(model)() == pytest.approx(float(once), abs=1e-5)
