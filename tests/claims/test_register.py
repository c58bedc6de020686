"""The register of claims: what it refuses, and what evidence makes of a claim."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from claims import evidence, full, gain, register
from claims.evidence import Evidence
from claims.register import Claim, Finding
from pipeline.commands import use
from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.score.significance import Interval
from tests import ROOT
from tests.made.claims import EXACT

IDS = {
    "rouge-parity", "tuned-beats-base", "tuned-beats-base-mt", "llm-int8", "merge", "lora-params", "nf4-bits",
    "qlora-recovers", "nf4-beats-fp4", "gqa-cache", "llama-architecture", "all-linear", "small-rank", "forgets-less",
    "gguf-bits", "stemming", "llama13b-gpt3", "samsum-7b",
}  # fmt: skip
"""The claims that were researched before anything was measured; none may be dropped because of its verdict."""


def claim(*conditions: dict[str, Any], **change: Any) -> Claim:
    when = list(conditions) or EXACT["reproduced_when"]
    return Claim.model_validate({**EXACT, "reproduced_when": when, **change})


def verdict(value: evidence.Value, **condition: Any) -> str:
    return register.judge(claim({"value": "x", **condition}), Evidence({"x": value})).verdict


def test_the_register_can_be_read_and_holds_every_researched_claim() -> None:
    assert set(register.load(ROOT / register.FILE)) >= IDS


def test_every_full_claim_has_a_recipe_that_exists_or_says_that_there_is_none() -> None:
    claims = {name: one for name, one in register.load(ROOT / register.FILE).items() if one.kind == "FULL"}
    assert {name for name, one in claims.items() if one.recipe is None} == {"llama13b-gpt3"}
    for one in claims.values():
        if one.recipe is not None:
            recipe = YAML(typ="safe").load(ROOT / use.FOLDER / f"{one.recipe}.yaml")
            assert recipe["needs"].get("gpu_gb") == one.needs.gpu_gb
            assert recipe["needs"].get("hub") is one.needs.hub is True


@pytest.mark.parametrize(
    ("tuned", "base", "wanted"),
    [(52.0, 30.0, "reproduced"), (49.0, 30.0, "not reproduced"), (52.0, 53.0, "not reproduced")],
)
def test_a_published_score_is_met_and_tuning_raises_it(tuned: float, base: float, wanted: str) -> None:
    """The scores are those of `reports/metrics.json`, beside which other figures stand."""
    scores = {name: {"base": base / by, "tuned": tuned / by} for name, by in (("rouge1", 1), ("rouge2", 1.93))}
    metrics: dict[str, Any] = {"chrf": {"base": 1.0, "tuned": 2.0}, "rows": 819, "rougeL": {"base": 1.0}, **scores}
    evidence = full._scores(metrics)
    assert set(evidence.values) == {"rouge1", "rouge1_base", "rouge2", "rouge2_base"}
    assert register.judge(register.load(ROOT / register.FILE)["samsum-7b"], evidence).verdict == wanted


def test_what_a_machine_lacks_is_told_and_what_this_project_does_not_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(use, "gpus", lambda: [("small", 12.0)])
    monkeypatch.setattr(full, "_reaches_the_hub", lambda: False)
    assert full.measure("samsum-7b").not_run == "a GPU with 19 GB, the Hugging Face hub"
    monkeypatch.setattr(use, "gpus", lambda: [("large", 80.0)])
    monkeypatch.setattr(full, "_reaches_the_hub", lambda: True)
    assert full.measure("llama13b-gpt3").not_run == "benchmarks that this project does not score"


def test_what_a_gain_s_conditions_name_is_what_its_recipe_scores() -> None:
    claims = register.load(ROOT / register.FILE)
    lines = {"default": ("wrong_aspect", "base_cut"), "ui-fr-en": ("copy",)}
    for claim, measure in gain.MEASUREMENTS.items():
        assert isinstance(measure, partial)
        (task,) = measure.args
        scored = use.experiment(task, params.load(ROOT / "params.yaml")).evaluate.metrics
        known = {f"{name}_{end}" for name in scored for end in ("gain", *(f"over_{line}" for line in lines[task]))}
        assert {one.value for one in claims[claim].reproduced_when} <= known, claim


def test_a_claim_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    file = tmp_path / "claims.yaml"
    YAML().dump({"claims": {name: copy.deepcopy(EXACT) for name in ("sum", "product")}}, file)
    assert register.one("sum", file).claim == "twice two"
    with pytest.raises(UserError, match="there is no claim quotient, but sum, product"):
        register.one("quotient", file)


def test_a_planted_wrong_value_turns_the_verdict() -> None:
    measured = Evidence({"product": 4})
    assert register.judge(claim(), measured).verdict == "reproduced"
    judgment = register.judge(claim(published={"four": 5}), measured)
    assert judgment.verdict == "not reproduced"
    assert judgment.findings == [Finding("product (4) = published.four (5)", False)]


@pytest.mark.parametrize(
    ("value", "condition", "wanted"),
    [
        (4.004, {"equals": 4.0, "within": 0.005}, "reproduced"),
        (4.006, {"equals": 4.0, "within": 0.005}, "not reproduced"),
        (1.0, {"above": 1.0}, "not reproduced"),
        (1.0, {"at_least": 1.0}, "reproduced"),
        (1.0, {"below": 1.0}, "not reproduced"),
        (1.0, {"at_most": 1.0}, "reproduced"),
        (Interval(2.0, 0.5, 3.0), {"above": 0.0}, "reproduced"),
        (Interval(2.0, -0.5, 3.0), {"above": 0.0}, "inconclusive"),
        (Interval(-2.0, -3.0, -0.5), {"above": 0.0}, "not reproduced"),
        (Interval(1.0, 0.96, 1.04), {"equals": 1.0, "within": 0.05}, "reproduced"),
        (Interval(1.0, 0.94, 1.04), {"equals": 1.0, "within": 0.05}, "inconclusive"),
        (Interval(1.2, 1.1, 1.3), {"equals": 1.0, "within": 0.05}, "not reproduced"),
        # Both ends are far, on either side: the interval holds the value and more.
        (Interval(1.0, 0.5, 1.5), {"equals": 1.0, "within": 0.05}, "inconclusive"),
        ([1.0, 2.0, 3.0], {"above": 0.0}, "reproduced"),
        ([1.0, -2.0, 3.0], {"above": 0.0}, "inconclusive"),
        ([-1.0, -2.0, -3.0], {"above": 0.0}, "not reproduced"),
    ],
)
def test_conditions(value: evidence.Value, condition: dict[str, Any], wanted: str) -> None:
    assert verdict(value, **condition) == wanted


def test_seeds_are_compared_one_by_one() -> None:
    one = claim({"value": "full", "above": "lora"})
    assert register.judge(one, Evidence({"full": [3.0, 2.0], "lora": [2.5, 1.0]})).verdict == "reproduced"
    assert register.judge(one, Evidence({"full": [3.0, 1.0], "lora": [2.5, 2.0]})).verdict == "inconclusive"
    with pytest.raises(UserError, match="full has 2 values and lora 3"):
        register.judge(one, Evidence({"full": [3.0, 1.0], "lora": [2.5, 2.0, 1.0]}))


@pytest.mark.parametrize("lora", [Interval(2.0, 1.0, 3.0), [1.0, 2.0], [1.0, 2.0, 3.0]])
def test_an_interval_is_compared_with_one_number_alone(lora: evidence.Value) -> None:
    """Its ends are no seeds."""
    for values in ({"full": Interval(5.0, 4.0, 6.0), "lora": lora}, {"full": lora, "lora": Interval(5.0, 4.0, 6.0)}):
        with pytest.raises(UserError, match="full is compared with lora, but an interval"):
            register.judge(claim({"value": "full", "above": "lora"}), Evidence(dict(values)))


def test_one_failed_condition_outweighs_an_undecided_one() -> None:
    both = claim({"value": "a", "above": 0.0}, {"value": "b", "above": 0.0})
    values: dict[str, evidence.Value] = {"a": Interval(1.0, -1.0, 2.0), "b": -1.0}
    assert register.judge(both, Evidence(values)).verdict == "not reproduced"


def test_what_was_not_run_has_no_findings() -> None:
    judgment = register.judge(claim(), Evidence(not_run="a GPU with 24 GB"))
    assert (judgment.verdict, judgment.findings) == ("not run", [])


def test_what_is_not_comparable_keeps_its_findings() -> None:
    judgment = register.judge(claim(), Evidence({"product": 4}, not_comparable="no outliers at this size"))
    assert judgment.verdict == "not comparable at this scale"
    assert len(judgment.findings) == 1


def test_a_condition_on_what_was_not_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"quotient(.|\n)*there are product, published\.four"):
        register.judge(claim({"value": "quotient", "above": 0.0}), Evidence({"product": 4}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "DIR"}, "distance must say"),
        ({"recipe": "default"}, "belongs to kind FULL"),
        ({"reproduced_when": [{"value": "x"}]}, "exactly one"),
        ({"reproduced_when": [{"value": "x", "above": 1.0, "below": 2.0}]}, "has 2"),
        ({"reproduced_when": [{"value": "x", "above": 1.0, "within": 2.0}]}, "within goes with equals"),
        ({"reproduced_when": [{"value": "x", "above": "published.five"}]}, "published.five"),
        ({"reproduced_when": [{"value": "published.four", "above": 3.0}]}, "published.four is not measured"),
        ({"reproduced_when": [{"value": "x", "at_least": "x"}]}, "x is compared with itself"),
        ({"reproduced_when": []}, "reproduced_when"),
        ({"treshold": 3}, "treshold"),
    ],
)
def test_a_register_that_would_not_say_what_it_means_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "claims.yaml"
    YAML().dump({"claims": {"sum": {**EXACT, **change}}}, file)
    with pytest.raises(UserError, match=message):
        register.load(file)


def test_evidence_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = Evidence({"a": 1.5, "b": Interval(1.0, 0.0, 2.0), "c": [1.0, 2.0]}, ["careful"], ["out/x"], None, "small")
    evidence.write("sum", written)
    assert evidence.read("sum") == written


def test_evidence_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite: b"):
        Evidence({"a": 1.0, "b": [1.0, float("nan")]})


def test_the_largest_of_what_is_no_number_is_none() -> None:
    assert (evidence.largest([1.0, 3.0, 2.0]), evidence.least([1.0, 3.0, 2.0])) == (3.0, 1.0)
    for extreme in (evidence.largest, evidence.least):
        with pytest.raises(ValueError, match="not finite: x"):
            Evidence({"x": extreme([1.0, float("nan"), 2.0])})


def test_numbers_are_shown_for_people() -> None:
    assert register.shown(134515008) == "134,515,008"
    assert register.shown(Interval(1.23456, -0.5, 2.0)) == "1.235, -0.5 to 2"
    assert register.shown([1.0, 2.25]) == "1, 2.25"
