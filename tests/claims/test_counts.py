"""Counts of parameters against the papers' figures, and against counting by hand."""

import pytest

from claims import counts, register
from tests import ROOT

REGISTER = register.load(ROOT / register.FILE)


def test_adapters_are_as_large_as_the_paper_says_on_gpt3_and_not_on_gpt2() -> None:
    gpt3, gpt2 = counts.lora_gpt3(), counts.lora_gpt2()
    assert register.judge(REGISTER["lora-params"], gpt3).verdict == "reproduced"
    judgment = register.judge(REGISTER["lora-params-gpt2"], gpt2)
    assert judgment.verdict == "not reproduced"
    assert [finding.holds for finding in judgment.findings] == [True, True, False, False]
    assert gpt2.values["gpt2_medium"] == 393_216
    assert gpt2.values["gpt2_large"] == 737_280


def test_llamas_have_as_many_parameters_as_the_paper_says() -> None:
    found = counts.llama()
    assert register.judge(REGISTER["llama-architecture"], found).verdict == "reproduced"
    assert found.values["llama_6.7b"] == 6_738_415_616  # what Meta's checkpoint holds


def test_another_width_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "LLAMA", counts.LLAMA | {"32.5b": (6656, 52, 61)})
    judgment = register.judge(REGISTER["llama-architecture"], counts.llama())
    assert [finding.holds for finding in judgment.findings] == [True, True, False, True]
