"""The registry: a version an adapter, a champion that has earned it, and a reason for every decision.

Runs are written by `track` as they always are, with planted scores; no model computes but in the test of loading.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.commands import cli
from pipeline.commands import promote as registry
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import Validation
from pipeline.core.errors import UserError
from pipeline.core.records import Example, Prediction
from pipeline.record import address, looks, seal, store
from pipeline.record.bounds import Bounds
from pipeline.record.looks import Looks
from pipeline.record.runs import DIGEST, NOTE, TEST, Record
from tests import ROOT
from tests.made.experiment import COMPARE, examples, plant, scores_of
from tests.made.records import training

pytestmark = pytest.mark.usefixtures("mlflow_calls_what_its_dependencies_deprecate")

GIVEN = {
    "evaluate.metrics": '["rouge1", "rouge2", "rougeL"]',
    "evaluate.use_stemmer": "false",
    "evaluate.rouge_tokenizer": "latin",
    "evaluate.bleu_tokenizer": "13a",
    "evaluate.language": "null",
    "compare.decide_by": '["rouge1", "rouge2"]',
    "model.source": "pip:some-model==1/model",
    "quantize.method": "nf4",
}


class Project:
    """A folder with a store; `record` writes a run whose adapters keep given shares of the references' words."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        content["tracking"] |= {"uri": None, "experiment": "toy"}
        content["compare"] = COMPARE.model_dump(mode="json")
        content["evaluate"]["metrics"] = ["rouge1", "rouge2", "rougeL"]
        YAML().dump(content, paths.PARAMS)
        self.given = params.load()

    def record(
        self,
        name: str,
        shares: dict[int, float],
        losses: dict[int, float] | None = None,
        rows: list[Example] | None = None,
        adapter: Path | None = None,
        digest: str | None = None,
        draw: int = 0,
    ) -> str:
        """The id of a new run; `losses` are the validation losses, 1.0 where not given;
        another `draw` keeps other words."""
        rows = rows or examples(40)
        shutil.rmtree("out", ignore_errors=True)
        keep = {paths.variant(seed): share for seed, share in shares.items()}
        plant(rows, {"base": 0.3, **{f"tuned-{100 + i}": 0.5 for i in range(draw)}, **keep})
        files: list[tuple[Path, str | None]] = [(paths.scores(variant), "scores") for variant in ("base", *keep)]
        for seed in shares:
            loss = (losses or {}).get(seed, 1.0)
            contracts.write(paths.training_summary(seed), training(seed, kept_loss=loss))
            if adapter is None:
                records.write_text(paths.adapter(seed) / "adapter_model.safetensors", f"{name} {seed}")
            else:
                shutil.copytree(adapter, paths.adapter(seed))
            files += [(paths.training_summary(seed), "training"), (paths.adapter(seed), f"adapter/{seed}")]
        texts = {
            paths.variant(seed) if len(shares) > 1 else "tuned": [
                row.text for row in records.read_rows(paths.predictions(paths.variant(seed)), Prediction)
            ]
            for seed in shares
        }
        record = Record(
            name=name,
            tags={DIGEST: digest or name, TEST: scores_of("base").test_sha256, NOTE: f"**Better**: {name}."},
            params={**GIVEN, "seeds": json.dumps(list(shares))},
            metrics=[],
            predictions={"id": [row.id for row in rows], "reference": [row.target for row in rows], **texts},
            files=files,
        )
        tracking = self.given.tracking
        with store.opened(tracking) as client:
            run = store._write(client, store.experiment(client, tracking), record, Bounds.of(tracking))
            return str(run.info.run_id)

    def promote(self, name: str, **change: Any) -> None:
        registry.register_and_decide(name, change.get("model"), self.given, change.get("dry_run", False))

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=address.tracking_uri(self.given.tracking))

    def versions(self, model: str = "toy") -> dict[int, str]:
        """The names of the runs that versions are of, by number."""
        found = self.client.search_model_versions(f"name = '{model}'")
        return {int(one.version): self.client.get_run(one.run_id).info.run_name for one in found}

    def champion(self) -> int | None:
        [model] = self.client.search_registered_models()
        number = model.aliases.get("champion")
        return None if number is None else int(number)


@pytest.fixture
def project(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    folder = tmp_path / "my project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (folder / ".mlflow").mkdir()
    shutil.copy(empty_database, folder / ".mlflow" / "mlflow.db")
    return Project(folder)


def result(capsys: pytest.CaptureFixture[str]) -> str:
    """What the line `result` says."""
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("result")]
    return line.removeprefix("result").strip()


def test_the_first_champion_must_be_better_than_its_base(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.record("no-gain", {1: 0.3})
    project.promote("no-gain")
    said = "there is no champion: the adapter is not shown to be better than its base (no difference shown)"
    assert result(capsys) == said
    assert (project.versions(), project.champion()) == ({1: "no-gain"}, None)
    project.record("good", {1: 0.7})
    project.promote("good")
    assert result(capsys) == "champion moves to version 2: it is better than its base, and there was none"
    assert (project.versions(), project.champion()) == ({1: "no-gain", 2: "good"}, 2)


def test_the_champion_moves_on_a_significant_gain_only(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for name, share, expected in (
        ("good", 0.7, "champion moves to version 1: it is better than its base, and there was none"),
        ("close", 0.71, "champion stays version 1: no difference from version 1 is shown"),
        ("poor", 0.5, "champion stays version 1: it is worse than version 1"),
        ("best", 0.95, "champion moves to version 4: it is better than version 1"),
        ("good", 0.7, "champion stays version 4: it is worse than version 4"),
        ("best", 0.95, "champion stays version 4: it is this adapter"),
    ):
        if name not in project.versions().values():
            project.record(name, {1: share}, draw=int(name == "close"))
        project.promote(name)
        assert result(capsys) == expected
    assert project.versions() == {1: "good", 2: "close", 3: "poor", 4: "best"}
    assert project.champion() == 4


def test_it_says_why_with_the_figures_of_the_same_rows(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.record("good", {1: 0.7})
    before = scores_of("tuned-1").corpus["rouge1"]
    project.promote("good")
    project.record("best", {1: 0.95})
    after = scores_of("tuned-1").corpus["rouge1"]
    capsys.readouterr()
    project.promote("best")
    printed = capsys.readouterr().out
    figures = f"ROUGE-1 {before:.1f} → {after:.1f} (+{after - before:.1f}, +"
    assert f"champion  version 1 (run good): {figures}" in printed
    assert (
        "looks     The test split has been looked at 2 times: so many experiments here were scored on it. This is look "
        "2: intervals of 99.1667 %, p up to 0.0083." in printed
    )
    [version] = versions_of(project, "best")
    assert figures in version.tags["against_champion"]
    assert version.description == "Better: best."
    expected = {"verdict": "better", "seed": "1", "validation_loss": "1.000000", "dvc.digest": "best"}
    expected |= {"base_model": "pip:some-model==1/model", "quantization": "nf4"}
    assert version.tags.items() >= expected.items()
    assert version.tags["test_sha256"] == scores_of("base").test_sha256
    assert version.tags["adapter_sha256"] == records.sha256_tree(paths.adapter(1))


def versions_of(project: Project, run: str) -> list[Any]:
    numbers = [number for number, name in project.versions().items() if name == run]
    return [project.client.get_model_version("toy", str(number)) for number in numbers]


def test_after_very_many_looks_no_p_value_is_small_enough(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.record("good", {1: 0.9})
    monkeypatch.setattr(looks, "among", lambda *_: Looks(80, 80, 0))
    project.promote("good", dry_run=True)
    assert "So small a p cannot be shown: take a new test split." in capsys.readouterr().out


def test_of_several_seeds_validation_chooses_not_the_test_set(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.record("seeds", {1: 0.95, 2: 0.7, 3: 0.9}, losses={1: 2.0, 2: 1.5, 3: 1.9})
    project.promote("seeds")
    printed = capsys.readouterr().out
    assert "adapter   seed 2 of run seeds" in printed
    assert "validation loss 1.5000, the lowest of 3 seeds" in printed
    [version] = versions_of(project, "seeds")
    assert (version.tags["seed"], version.source.rpartition("/")[2]) == ("2", "2")


def test_the_loss_is_that_of_the_adapter_which_was_kept(tmp_path: Path) -> None:
    validation = [Validation(0, 3.0), Validation(5, 1.0), Validation(9, 2.0)]
    contracts.write(tmp_path / "17.json", training(17, validation=validation, kept_loss=1.0))
    assert registry._loss(tmp_path / "17.json") == 1.0


def test_a_dry_run_says_the_same_and_writes_nothing(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.record("good", {1: 0.7})
    project.promote("good", dry_run=True)
    printed = capsys.readouterr().out
    assert "it would be a new version of toy" in printed
    assert "champion would move to a new version: it is better than its base, and there was none" in printed
    assert project.client.search_registered_models() == []


def test_another_test_set_or_another_way_of_scoring_is_refused(project: Project) -> None:
    project.record("good", {1: 0.7})
    project.promote("good")
    rows = [replace(row, target=f"{row.target} more", references=[]) for row in examples(40)]
    project.record("elsewhere", {1: 0.9}, rows=rows)
    with pytest.raises(UserError, match=r"(?s)elsewhere.*was tested on other examples than run good.*--model toy-2"):
        project.promote("elsewhere")
    assert project.versions() == {1: "good"}
    project.promote("elsewhere", model="toy-2")
    assert project.versions("toy-2") == {1: "elsewhere"}


def test_a_run_that_was_changed_in_the_store_is_refused(project: Project) -> None:
    run_id = project.record("good", {1: 0.7})
    [file] = Path(".mlflow").rglob(f"{run_id}/artifacts/adapter/1/adapter_model.safetensors")
    file.write_text("other weights")
    with pytest.raises(UserError, match=r"(?s)run good .*cannot be trusted.*adapter_model.safetensors is not"):
        project.promote("good")
    assert project.client.search_registered_models() == []


@pytest.mark.parametrize("at", ["create_registered_model", "create_model_version", "set_registered_model_alias"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_what_a_kill_leaves_is_mended_by_running_it_again(
    project: Project, at: str, after: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    project.record("good", {1: 0.7})
    real = getattr(MlflowClient, at)

    def killed(self: Any, *arguments: Any, **named: Any) -> None:
        if after:
            real(self, *arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, at, killed)
        with pytest.raises(KeyboardInterrupt):
            project.promote("good")
    capsys.readouterr()
    project.promote("good")
    assert result(capsys).startswith("champion")
    assert (project.versions(), project.champion()) == ({1: "good"}, 1)


def test_a_champion_that_moved_meanwhile_is_compared_with_again(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, share in (("good", 0.7), ("best", 0.95), ("better", 0.85)):
        project.record(name, {1: share})
    project.promote("good")
    real, seen = registry._decide, []

    def decide(one: Any, base: Any, champion: Any, runs: Any, given: Any) -> Any:
        seen.append(champion.version)
        if len(seen) == 1:
            project.promote("best")
        return real(one, base, champion, runs, given)

    monkeypatch.setattr(registry, "_decide", decide)
    project.promote("better")
    assert "result    champion stays version 2: it is worse than version 2" in capsys.readouterr().out
    assert project.champion() == 2


def test_a_run_recorded_anew_takes_over_from_the_one_it_replaces(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = project.record("good", {1: 0.7})
    project.promote("good")
    project.client.delete_run(run_id)
    project.record("good again", {1: 0.7}, digest="good")
    project.promote("good again")
    assert "champion moves to version 2: it is the adapter of version 1, whose run was recorded anew" in (
        capsys.readouterr().out
    )
    assert project.champion() == 2


def test_a_champion_whose_scores_are_gone_is_one_clear_error(project: Project) -> None:
    run_id = project.record("good", {1: 0.7})
    project.promote("good")
    project.client.delete_run(run_id)
    project.record("best", {1: 0.95})
    with pytest.raises(UserError, match="champion is version 1 of toy, and no run here holds its scores: restore"):
        project.promote("best")


@pytest.mark.parametrize("model", ["a/b", "a:b", "it's", " a", ""])
def test_a_name_that_the_registry_does_not_take_is_refused(project: Project, model: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a registered model"):
        project.promote("good", model=model)


@pytest.mark.usefixtures("project")
def test_the_run_of_this_folder_is_the_default_and_must_be_there() -> None:
    shown = CliRunner().invoke(cli.app, ["promote"])
    assert shown.exit_code == 1
    assert shown.stderr == "error: dvc.lock is missing: run `dvc repro`, which makes it, or name a run\n"


def test_the_alias_leads_to_the_runs_own_adapter(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by MLflow's own client, as a user would; registering adds nothing to the run."""
    from mlflow.artifacts import download_artifacts

    run_id = project.record("good", {1: 0.9, 2: 0.8}, losses={2: 0.5})
    project.promote("good")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.tracking_uri(project.given.tracking))
    (tmp_path / "champion").mkdir()
    folder = Path(download_artifacts("models:/toy@champion", dst_path=str(tmp_path / "champion")))
    assert records.sha256_tree(folder) == records.sha256_tree(paths.adapter(2)) != records.sha256_tree(paths.adapter(1))
    [run] = store.stored(project.given.tracking)
    held = store.read_back(project.given.tracking, run_id, tmp_path / "back")
    assert seal.faults(run, held, tmp_path / "back") == []
