"""The measurements of ROUGE, and that they notice a ROUGE that is another."""

from typing import Any

import pytest

from claims import register, rouge
from pipeline.core import params
from pipeline.score import metrics
from pipeline.score.significance import Interval
from tests import ROOT

REGISTER = register.load(ROOT / register.FILE)


def test_our_rouge_is_the_papers() -> None:
    found = rouge.parity()
    assert found.values["rouge2_s4"] == pytest.approx(200 / 3)
    assert register.judge(REGISTER["rouge-parity"], found).verdict == "reproduced"


@pytest.mark.parametrize("broken", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_a_rouge_that_is_off_is_not_reproduced(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    each = metrics._Rouge.each

    def off(metric: Any, statistics_nxk: metrics.Floats) -> metrics.Floats:
        return each(metric, statistics_nxk) + (1e-6 if metric.name == broken else 0)

    monkeypatch.setattr(metrics._Rouge, "each", off)
    monkeypatch.setattr(rouge, "PAIRS", 20)
    assert register.judge(REGISTER["rouge-parity"], rouge.parity()).verdict == "not reproduced"


def test_counts_of_the_check_itself() -> None:
    one, other = ("a", "b", "a", "c"), ("a", "a", "b", "c")
    assert rouge._common(one, other) == 3  # a a c, or a b c
    assert rouge._by_grams(one, other, n=1) == 100
    assert rouge._by_grams(one, other, n=2) == pytest.approx(100 / 3)  # a b
    assert rouge._by_grams(("a",), other, n=2) == 0


def test_stemming_is_measured_on_the_same_texts(claims_base: params.Params) -> None:
    assert claims_base.compare.bootstrap_samples == 1000
    found = rouge.stemming()
    for name in ("lead1_rouge1", "lead3_rouge2", "lead3_rougel"):
        rise, plain, stemmed = (found.values[f"{name}_{part}"] for part in ("rise", "without", "with"))
        assert isinstance(rise, Interval)
        assert isinstance(plain, float)
        assert isinstance(stemmed, float)
        assert rise.value == pytest.approx(stemmed - plain, abs=1e-9)
        assert rise.low <= rise.value <= rise.high
    # "runs" and "run", say, do not both occur in these few words: stemming changes nothing.
    assert register.judge(REGISTER["stemming"], found).verdict == "not reproduced"
