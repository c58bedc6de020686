"""A comparison of methods: what its file may say, that each arm's rate is chosen by validation, and that nothing is
repeated."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.core import params, paths
from pipeline.core.errors import UserError
from pipeline.search import arms
from tests import ROOT
from tests.made.search import done, log, start

PLAN: dict[str, Any] = {
    "reference": "plain",
    "common": {"data.limits.train": 60, "train.epochs": 1},
    "rates": [1e-3, 1e-2],
    "rate_seed": 17,
    "seeds": [17, 18],
    "arms": {"plain": {}, "small": {"lora.r": 4, "lora.alpha": 8}, "fixed": {"lora.rslora": True, arms.RATE: 5e-3}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


def written(**changes: Any) -> Path:
    path = Path("methods.yaml")
    YAML().dump(PLAN | changes, path)
    return path


@pytest.mark.usefixtures("folder")
def test_a_file_with_arms_is_a_comparison() -> None:
    plan = arms.load(written())
    assert arms.is_comparison(Path("methods.yaml"))
    assert not arms.is_comparison(ROOT / "sweeps/example.yaml")
    assert not arms.is_comparison(Path("none.yaml"))
    assert plan.rates_of("plain") == [1e-3, 1e-2]
    assert plan.rates_of("fixed") == [5e-3]
    assert plan.overrides("small") == {"data.limits.train": 60, "train.epochs": 1, "lora.r": 4, "lora.alpha": 8}


@pytest.mark.usefixtures("folder")
def test_the_comparison_of_the_repository_is_sound() -> None:
    plan = arms.load(ROOT / "sweeps/methods.yaml")
    assert len(plan.arms) >= 8
    assert len(plan.seeds) >= 3


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": "none"}, "reference = 'none' is none of the arms: plain, small, fixed"),
        (
            {"arms": {"plain": {}, "b": {"generation.num_beams": 4}}},
            "arms.b.generation.num_beams: only lora.*, train.*",
        ),
        ({"arms": {"plain": {}, "b": {"data.limits.train": 4}}}, "arms.b.data.limits.train: only lora.*, train.*"),
        (
            {"common": {"compare.confidence": 0.9}},
            "common.compare.confidence: only lora.*, train.*, quantize.*, data.*",
        ),
        ({"arms": {"plain": {}, "b": {"lora.rank": 4}}}, "arms.b.lora.rank: there is no such parameter"),
        ({"common": {"data.limits.trains": 4}}, "common.data.limits.trains: there is no such parameter"),
        ({"arms": {"plain": {}, "b": {"lora.r": 0}}}, "arms.b: lora.r = 0: input should be greater than or equal to 1"),
        ({"arms": {"plain": {}, "b c": {}}}, "arms.b c: an arm's name has letters, digits, - and _ only"),
        ({"arms": {"plain": {}}}, "arms = {'plain': {}}: dictionary should have at least 2 items"),
        ({"seeds": [17, 17]}, "arms.plain: seeds must differ"),
        ({"rates": []}, "rates = []: list should have at least 1 item"),
    ],
)
def test_mistakes_are_named_before_anything_runs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        arms.load(written(**changes))
    assert said in str(caught.value)


@pytest.mark.usefixtures("folder")
def test_all_parameters_of_a_trial_are_those_of_its_arm() -> None:
    plan = arms.load(written())
    content = params.load().model_dump(mode="json")
    found = {(arm, rate): job for arm, rate, job in arms._trials(plan, "methods", content)}
    assert list(found) == [("plain", 1e-3), ("plain", 1e-2), ("small", 1e-3), ("small", 1e-2), ("fixed", 5e-3)]
    job = found["small", 1e-2]
    assert job.overrides == (
        "data.limits.train=60", "train.epochs=1", "lora.r=4", "lora.alpha=8", "train.learning_rate=0.01", "seeds=[17]",
    )  # fmt: skip
    assert (job.given["data"]["limits"]["train"], job.given["lora"]["r"], job.seeds) == (60, 4, [17])
    assert len({one.name for one in found.values()}) == 5
    assert params.load().model_dump(mode="json") == content


@pytest.mark.slow
def test_each_arm_is_tested_at_its_best_rate_and_nothing_is_repeated(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    YAML().dump(
        {
            "reference": "low",
            "common": {},
            "rates": [1e-2, 1e-3],
            "rate_seed": 17,
            "seeds": [17, 18],
            "arms": {"low": {"lora.r": 6}, "high": {"lora.r": 9, arms.RATE: 2e-2}},
        },
        project / "arms.yaml",
    )
    monkeypatch.chdir(project)
    for key, value in (("LOG", str(log(project))), ("PYTHONPATH", str(ROOT)), ("DVC_NO_ANALYTICS", "1")):
        monkeypatch.setenv(key, value)
    path = Path("arms.yaml")
    plan = arms.load(path)
    low, high = arms.compared(plan, path, 1)
    assert (low.arm, low.rate, low.losses) == ("low", 1e-3, {1e-2: 2.21, 1e-3: 2.201})
    assert (high.arm, high.rate, high.losses) == ("high", 2e-2, {2e-2: 2.12})
    trained = [line for line in done(project) if line.startswith("train")]
    assert sorted(trained) == sorted(
        ["train 6 0.01", "train 6 0.001", "train 9 0.02", "train 6 0.001", "train 9 0.02"]
    ), "seed 17 of each winner is not trained again"
    refs = subprocess.run(["git", "for-each-ref", "refs/exps"], capture_output=True, text=True, check=True).stdout
    assert low.experiment in refs
    assert high.experiment in refs
    count = len(done(project))
    assert arms.compared(plan, path, 1) == [low, high]
    assert len(done(project)) == count
    assert not [one for one in paths.SWEEPS.glob("arms/arms-*") if one.is_dir()], "a clone is left"


@pytest.mark.slow
def test_a_failed_trial_is_named_when_the_others_have_ended(project: Path) -> None:
    content = PLAN | {"common": {}, "arms": {"plain": {"lora.r": 8}, "bad": {"lora.r": 5}}, "seeds": [17]}
    YAML().dump(content, project / "arms.yaml")
    process = start(project, "sweep", "arms.yaml")
    printed = process.communicate()[0]
    assert process.returncode == 1
    assert "error: 2 trials failed; the same command tries them again:" in printed
    assert "rank 5 is planted to fail" in printed
    assert sum(line.startswith("train 8") for line in done(project)) == 2
