"""The claims that train: arms and variants on a tiny model, and what is made of them by hand."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from claims import adapters, arms, full_tuning, gain, inputs, lab, register, results, training, variants
from claims.evidence import Evidence
from claims.results import Look, Result, Run
from pipeline import forget
from pipeline.core import contracts, params, paths, records
from pipeline.core.errors import UserError
from pipeline.lora import adapter, start, train
from pipeline.model import checkpoint, devices, pack, windows
from pipeline.model.prompt import Encoder
from pipeline.score import reference_lines
from pipeline.score.significance import Interval
from tests import ROOT
from tests.made.records import base_facts

REGISTER = register.load(ROOT / register.FILE)
DECLARED = training.load(ROOT / training.FILE)
SMALL: dict[str, Any] = {
    "training_seeds": [17, 18, 19],
    "tasks": {"default": {"train": 8, "validation": None, "test": 4}},
    "cut": {"train": 12, "validation": 6, "batch_size": 2, "watch_every": 2, "general_tokens": 100},
    "arms": {
        "untuned": {"base": "none", "lora": None, "learning_rate": None, "watch": False},
        "r4": {"base": "nf4", "lora": {"r": 4, "target_modules": "all-linear"}, "learning_rate": 1e-2, "watch": True},
        "full": {"base": "none", "lora": None, "learning_rate": 1e-3, "watch": True},
    },
}


@pytest.fixture
def inputs_made(project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> params.Params:
    """A project with what the arms and variants start from, made by the claims' own stages."""
    monkeypatch.setattr(lab, "experiment", lambda *_: project)
    shutil.copytree(tiny_model, lab.BASE)
    contracts.write(lab.BASE_FACTS, base_facts(sha256=records.sha256_tree(lab.BASE)))
    shutil.move(paths.DATA, lab.data("default"))
    for method in ("none", "nf4"):
        inputs.quantize_base(method)
    training.FILE.parent.mkdir()
    YAML().dump(SMALL, training.FILE)
    return project


# What is declared


def test_queries_and_values_alone_have_as_many_parameters() -> None:
    """LoRA's count, r (in + out) for each layer of the default model: 576 wide, keys and values 192, MLP 1536."""
    queries, values, output, mlp = 576 + 576, 576 + 192, 576 + 576, 3 * (576 + 1536)
    everything = 30 * (queries + 2 * values + output + mlp)
    all_linear, qv = (DECLARED.arms[name].lora for name in ("r16", "qv"))
    assert all_linear is not None
    assert qv is not None
    assert qv.r * 30 * (queries + values) == pytest.approx(all_linear.r * everything, rel=0.003)


def test_the_pipeline_has_a_stage_for_every_seed_and_task() -> None:
    stages = YAML(typ="safe", pure=True).load((ROOT / "claims" / "dvc.yaml").read_text())["stages"]
    matrix = stages["variant"]["matrix"]
    assert matrix == {"task": list(DECLARED.tasks), "which": [variants.BASE, *DECLARED.training_seeds]}


def test_the_pipeline_s_measurements_depend_on_the_arms_that_they_read() -> None:
    stages = YAML(typ="safe", pure=True).load((ROOT / "claims" / "dvc.yaml").read_text())["stages"]
    for claim, measure in adapters.MEASUREMENTS.items():
        asked: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, "read", reader(asked))
            patch.setattr(lab, "experiment", lambda: params.load(ROOT / "params.yaml"))
            measured = measure()
        declared = {dep for dep in stages[claim]["deps"] if dep.startswith("out/")}
        assert declared == {results.path(name).as_posix() for name in asked} == set(measured.uses), claim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": None}, "nothing is trained"),
        ({"lora": None}, "quantized weights cannot be trained"),
    ],
)
def test_an_arm_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = SMALL | {"arms": {"r4": SMALL["arms"]["r4"] | changes}}
    YAML().dump(content, tmp_path / "training.yaml")
    with pytest.raises(UserError, match=message):
        training.load(tmp_path / "training.yaml")


@pytest.mark.usefixtures("inputs_made")
def test_what_is_not_declared_is_named_with_what_is() -> None:
    with pytest.raises(UserError, match="arms has no r5, but untuned, r4, full"):
        arms.run("r5")
    with pytest.raises(UserError, match="training_seeds has no 5, but 17, 18, 19"):
        variants.run("default", "5")
    with pytest.raises(UserError, match="tasks has no samsum, but default"):
        variants.run("samsum", "17")


def test_rows_are_spread_over_whole_groups() -> None:
    rows = [records.Example(f"{g}/{n}", str(g), "", "s", "t", "s") for g in range(10) for n in range(3)]
    assert [row.id for row in training.spread(rows, 6)] == [f"{g}/{n}" for g in (0, 5) for n in range(3)]
    assert training.spread(rows, None) == training.spread(rows, 30) == rows


# Arms


@pytest.mark.usefixtures("inputs_made")
def test_an_adapter_s_arm_learns_and_a_killed_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    tuned = arms.tuned

    def watched(bench: arms.Bench, seed: str) -> Run:
        calls.append(seed)
        if calls == ["17", "18"]:
            raise KeyboardInterrupt
        return tuned(bench, seed)

    monkeypatch.setattr(arms, "tuned", watched)
    with pytest.raises(KeyboardInterrupt):
        arms.run("r4")
    assert not results.path("r4").exists()
    arms.run("r4")
    assert calls == ["17", "18", "18", "19"]
    found = results.read("r4")
    assert list(found.runs) == ["17", "18", "19"]
    assert (found.rows, len(found.groups)) == (12, 3)
    for run in found.runs.values():
        assert [look.step for look in run.looks] == [2, 4, 6]
        assert run.looks[-1].loss < run.looks[0].loss
        assert run.looks[-1].loss == pytest.approx(sum(run.sums) / sum(found.tokens))
        assert all(look.cross_entropy > look.entropy for look in run.looks)
    assert len(set(found.losses())) == 3
    assert not (paths.SCRATCH / "claims" / "arm-r4").exists()


@pytest.mark.usefixtures("inputs_made")
def test_full_tuning_trains_every_weight_and_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[full_tuning.Both] = []
    load = full_tuning.load

    def kept(device: torch.device) -> full_tuning.Both:
        loaded.append(load(device))
        return loaded[-1]

    monkeypatch.setattr(full_tuning, "load", kept)
    arms.run("untuned")
    arms.run("full")
    found = results.read("full")
    both = loaded[0]
    assert {run.parameters for run in found.runs.values()} == {sum(one.numel() for one in both.base.parameters())}
    for (name, here), there in zip(both.tuned.named_parameters(), both.base.parameters(), strict=True):
        assert not torch.equal(here, there), name
    untouched = checkpoint.pretrained(lab.quantized("none"), torch.device("cpu"))
    assert all(torch.equal(*pair) for pair in zip(both.base.parameters(), untouched.parameters(), strict=True))
    (before,) = results.read("untuned").losses()
    assert all(loss < before for loss in found.losses())
    entropies = {look.entropy for run in found.runs.values() for look in run.looks}
    assert max(entropies) == pytest.approx(min(entropies))
    assert all(run.looks[-1].cross_entropy > run.looks[0].cross_entropy for run in found.runs.values())


def test_sums_are_the_trainer_s_loss(inputs_made: params.Params) -> None:
    with lab.lab("loss", {paths.QUANTIZED: lab.quantized("none"), paths.DATA: lab.data("default")}, {}):
        encoder = Encoder(checkpoint.tokenizer(), inputs_made.prompt, 512)
        rows = [encoder.row(one) for one in records.read_rows(paths.split("validation"), records.Example)]
        trees = pack.trees(rows)
        base = checkpoint.pretrained(paths.QUANTIZED, torch.device("cpu")).requires_grad_(False).eval()
        trainer = train.Trainer(start.attach(base, inputs_made.lora, 17), inputs_made.train, 17, 1)
        found = arms.sums(trainer.model, trees, 64)
        assert sum(found) / sum(tree.supervised for tree in trees) == pytest.approx(trainer.loss(trees, "all"))
        alone = [arms.sums(trainer.model, [tree], 64)[0] for tree in trees]
        assert found == pytest.approx(alone, rel=1e-5)


def test_within_disable_adapter_both_is_the_base(inputs_made: params.Params) -> None:
    links = {paths.QUANTIZED: lab.quantized("none"), paths.QUANTIZED_FACTS: lab.quantized("none").with_suffix(".json")}
    with lab.lab("both", links, {}):
        both = full_tuning.load(devices.choose(inputs_made.runtime))
    for tensor in both.tuned.parameters():
        tensor.data.mul_(1.5)
    window = windows.Tokens("a", list(range(20, 40)))
    (found,) = forget.measure(both, [window.row()], "both")
    (alone,) = forget.measure(full_tuning.Both(both.base, both.base), [window.row()], "base")
    assert found.base == alone.base == alone.tuned
    assert found.tuned != found.base
    assert both.active is both.tuned


# Variants


@pytest.mark.usefixtures("inputs_made")
def test_base_and_tuned_answer_and_are_compared() -> None:
    for which in (variants.BASE, "17", "18", "19"):
        variants.run("default", which)
    assert len(records.read_rows(variants.folder("default", "17") / variants.PREDICTIONS, records.Prediction)) == 4
    assert (variants.folder("default", "17") / "adapter" / adapter.WEIGHTS).exists()
    assert records.read_json(variants.folder("default", "17") / "training.json")["rows"] == 8
    found = gain.measure("default")
    names = ("rouge1_base", "rouge1_tuned", "rouge1_gain", "rouge2_over_wrong_aspect", "rouge2_over_base_cut")
    assert all(isinstance(found.values[name], Interval) for name in names)
    base, tuned, difference = (found.values[name] for name in names[:3])
    assert isinstance(base, Interval)
    assert isinstance(tuned, Interval)
    assert isinstance(difference, Interval)
    assert difference.value == pytest.approx(tuned.value - base.value)
    assert [Path(one).parent.name for one in found.uses] == ["base", "17", "18", "19"]
    assert all(Path(one).is_file() for one in found.uses)
    judged = register.judge(REGISTER["tuned-beats-base"], found)
    assert len(judged.findings) == 5

    with pytest.MonkeyPatch.context() as patch:
        one_group = reference_lines.Texts("alone", "", "", [["red"], ["red"], [], []])
        patch.setattr(reference_lines, "texts", lambda *_: [one_group])
        assert not any(name.endswith("_over_alone") for name in gain.measure("default").values)

    decoding = variants.folder("default", "18") / variants.DECODING
    records.write_json(decoding, records.read_json(decoding) | {"threads": 3})
    with pytest.raises(UserError, match=r"claims/dvc\.yaml`:\n.*threads: seed 18 has 3, base has 1"):
        gain.measure("default")


# Measurements


def result(losses: float | list[float], looks: list[tuple[float, float]] | None = None, pairs: int = 10) -> Result:
    """An arm by hand: pairs of texts of 10 and 30 tokens, the first with twice the loss a token of the second."""
    seeds = [results.UNTUNED] if isinstance(losses, float) else ["17", "18", "19"]
    given = [losses] if isinstance(losses, float) else losses
    runs = {}
    for seed, loss in zip(seeds, given, strict=True):
        unit = 40 * loss / 50
        shift = loss - given[0]
        seen = [Look(5 * (i + 1), at + shift, 3.0, there, 2.0) for i, (at, there) in enumerate(looks or [])]
        runs[seed] = Run(1, 25, [20 * unit, 30 * unit] * pairs, seen)
    return Result([f"text {number}" for number in range(2 * pairs)], [10, 30] * pairs, 150, runs)


def planted() -> dict[str, Result]:
    """Arms that give what the papers claim."""
    return {
        "untuned": result(3.4),
        "untuned-nf4": result(3.5),
        "r16": result([2.70, 2.71, 2.69]),
        "r16-nf4": result([2.72, 2.725, 2.70]),
        "qv": result([2.8, 2.81, 2.79]),
        "r1": result([2.9, 2.91, 2.89]),
        "r4": result([2.72, 2.73, 2.71]),
        "r64": result([2.6, 2.61, 2.59], [(3.0, 2.2), (2.6, 2.4)]),
        "r8": result([2.7, 2.71, 2.69], [(3.1, 2.1), (2.7, 2.2)]),
        "full": result([2.5, 2.51, 2.49], [(2.9, 2.6), (2.5, 3.0)]),
    }


def reader(asked: list[str]) -> Callable[[str], Result]:
    """Reads planted arms, and notes which."""

    def read(name: str) -> Result:
        asked.append(name)
        return planted()[name]

    return read


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> dict[str, Evidence]:
    known = planted()
    monkeypatch.setattr(results, "read", known.__getitem__)
    monkeypatch.setattr(lab, "experiment", lambda: params.load(ROOT / "params.yaml"))
    return {claim: measure() for claim, measure in adapters.MEASUREMENTS.items()}


@pytest.mark.parametrize("claim", adapters.MEASUREMENTS)
def test_what_the_papers_claim_is_reproduced(claim: str, evidence: dict[str, Evidence]) -> None:
    assert register.judge(REGISTER[claim], evidence[claim]).verdict == "reproduced"


@pytest.mark.parametrize(
    ("claim", "arm", "losses"),
    [
        ("qlora-recovers", "untuned-nf4", 3.3),
        ("qlora-recovers", "r16-nf4", [2.75, 2.76, 2.74]),
        ("all-linear", "qv", [2.6, 2.6, 2.6]),
        ("small-rank", "r1", [2.5, 2.5, 2.5]),
        ("small-rank", "r64", [2.5, 2.5, 2.5]),
    ],
)
def test_the_opposite_is_not_reproduced(
    claim: str, arm: str, losses: float | list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = planted() | {arm: result(losses)}
    monkeypatch.setattr(results, "read", known.__getitem__)
    monkeypatch.setattr(lab, "experiment", lambda: params.load(ROOT / "params.yaml"))
    assert register.judge(REGISTER[claim], adapters.MEASUREMENTS[claim]()).verdict == "not reproduced"


def test_one_seed_that_disagrees_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    known = planted() | {"qv": result([2.8, 2.81, 2.6])}
    monkeypatch.setattr(results, "read", known.__getitem__)
    monkeypatch.setattr(lab, "experiment", lambda: params.load(ROOT / "params.yaml"))
    assert register.judge(REGISTER["all-linear"], adapters.all_linear()).verdict == "inconclusive"


def test_one_text_that_decides_alone_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower for every seed, but by the first of twenty texts."""
    r16 = result([2.70, 2.71, 2.69])
    runs = {seed: replace(run, sums=[run.sums[0] + 40, *run.sums[1:]]) for seed, run in r16.runs.items()}
    known = planted() | {"r16": r16, "qv": replace(r16, runs=runs)}
    monkeypatch.setattr(results, "read", known.__getitem__)
    monkeypatch.setattr(lab, "experiment", lambda: params.load(ROOT / "params.yaml"))
    found = adapters.all_linear()
    gap = found.values["qv_over_all_linear"]
    assert isinstance(gap, Interval)
    assert gap.value == pytest.approx(40 / 400)
    assert gap.low < 0
    assert register.judge(REGISTER["all-linear"], found).verdict == "inconclusive"


def test_a_mean_difference_holds_the_chance_of_seeds() -> None:
    """Texts do not differ: left is the SD of the seeds' differences, 0.01 / root 3, with 2 degrees of freedom."""

    def even(losses: list[float]) -> Result:
        found = result(losses)
        by_token = {seed: sum(run.sums) / sum(found.tokens) for seed, run in found.runs.items()}
        runs = {
            seed: replace(run, sums=[by_token[seed] * count for count in found.tokens])
            for seed, run in found.runs.items()
        }
        return replace(found, runs=runs)

    one, two = even([1.0, 1.2, 1.4]), even([1.09, 1.30, 1.51])
    gap = adapters.mean_difference(two, one, params.load(ROOT / "params.yaml").compare)
    half = 4.303 * 0.01 / 3**0.5
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.1, 0.1 - half, 0.1 + half), rel=1e-3)


def test_a_gap_has_an_interval_over_texts(evidence: dict[str, Evidence]) -> None:
    """Two texts, with losses a token of 0.16 and 0.08, and of 0.1 together: the jackknife gives 0.12 and 0.04."""
    gap = adapters.difference(result(3.5, pairs=1), result(3.4, pairs=1), params.load(ROOT / "params.yaml").compare)
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.1, 0.1 - 12.706 * 0.04, 0.1 + 12.706 * 0.04), rel=1e-4)
    excess = evidence["qlora-recovers"].values["excess"]
    assert excess == pytest.approx([0.02 - 0.025, 0.015 - 0.025, 0.01 - 0.025])


def test_forgetting_is_compared_at_the_loss_that_all_reach(evidence: dict[str, Evidence]) -> None:
    values = evidence["forgets-less"].values
    assert values["loss_matched"] == pytest.approx([2.7, 2.71, 2.69])
    matched = [values[f"cross_entropy_{name}_matched"] for name in ("full", "r64", "r8")]
    # Seed 17: full is half way from 2.9 to 2.5, r64 three quarters from 3.0 to 2.6, r8 at its end.
    assert [some[0] for some in matched if isinstance(some, list)] == pytest.approx([2.8, 2.35, 2.2])


def test_a_curve_is_read_where_it_first_comes_down() -> None:
    curve = [(3.0, 2.0), (2.0, 4.0), (2.5, 5.0), (1.0, 6.0)]
    assert adapters.at_loss(curve, 2.2) == pytest.approx(3.6)
    assert adapters.at_loss(curve, 2.0) == pytest.approx(4.0)
    assert adapters.at_loss(curve, 1.0) == pytest.approx(6.0)
    with pytest.raises(ValueError, match="does not come down to 0.5"):
        adapters.at_loss(curve, 0.5)


def test_results_come_back_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = planted()["full"]
    records.write_json(results.path("full"), asdict(given))
    assert results.read("full") == given
