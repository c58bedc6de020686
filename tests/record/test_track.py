"""The record: complete, one for each experiment, in one place wherever the experiment ran.

The project here is the toy of tests/made/toy.py.
"""

import hashlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.core import contracts, params
from pipeline.core.contracts import Step
from pipeline.core.errors import UserError, without_passwords
from pipeline.record import address, identity, provenance, store, track
from tests import ROOT
from tests.made.toy import DVC_YAML, PARAMS, RECORDS, STAGE

PARAMS_OF = {
    "prepare": ["data"],
    "train": ["prompt", "lora", "train"],
    "infer": ["prompt"],
    "infer-tuned": ["prompt"],
    "compare": ["seeds"],
}


def _predictions_of(kind: str) -> Callable[[str], list[str]]:
    return lambda _: [f"out/predictions/base-{kind}.jsonl", f"out/predictions/base-{kind}.json"]


def _scores_of(kind: str) -> Callable[[str], list[str]]:
    return lambda _: [f"out/scores/base-{kind}.json"]


OUTS_OF: dict[str, Callable[[str], list[str]]] = {
    "prepare": lambda _: ["out/data/test.jsonl", "out/data/card.json"],
    "fetch": lambda _: ["out/models/base.json"],
    "quantize": lambda _: ["out/models/quantized.json"],
    "contamination": lambda _: ["out/contamination.json"],
    "train": lambda at: [
        f"out/adapters/{at}/adapter_model.safetensors",
        f"out/training/{at}.json",
    ],
    "infer": lambda _: ["out/predictions/base.jsonl"],
    "infer-tuned": lambda at: [f"out/predictions/tuned-{at}.jsonl"],
    "forget": lambda at: [f"out/forgetting/{at}.json"],
    "evaluate": lambda _: ["out/scores/base.json"],
    **{f"infer-{kind}": _predictions_of(kind) for kind in ("unquantized", "shots")},
    **{f"evaluate-{kind}": _scores_of(kind) for kind in ("unquantized", "shots")},
    "evaluate-tuned": lambda at: [f"out/scores/tuned-{at}.json"],
    "compare": lambda _: ["reports/metrics.json"],
}


class Toy:
    """A project folder whose stages have run; `lock` holds what DVC would have locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".dvc").mkdir(parents=True)
        (folder / "toy.py").write_text(STAGE)
        (folder / "params.yaml").write_text(PARAMS)
        self.reproduce()

    def given(self) -> Any:
        return YAML(typ="safe", pure=True).load((self.folder / "params.yaml").read_text())

    def reproduce(self, *changes: tuple[str, object]) -> None:
        """Set params (by dotted name), run all stages but track in this process, and lock the results."""
        given = self.given()
        for name, value in changes:
            *section, key = name.split(".")
            (given[section[0]] if section else given)[key] = value
        (self.folder / "params.yaml").write_text(json.dumps(given))
        toy: dict[str, Any] = {"__name__": "toy"}
        exec(compile(STAGE, "toy.py", "exec"), toy)
        toy["write"]("reports/index.html", "index.html")
        seeds = [str(seed) for seed in given["seeds"]]
        at_of = dict.fromkeys(("train", "infer-tuned", "forget", "evaluate-tuned"), seeds) | {
            "infer": ["base"],
            "evaluate": ["base"],
        }
        stages: dict[str, Any] = {}
        for stage, outs_of in OUTS_OF.items():
            for at in at_of.get(stage, [""]):
                toy["run"](stage.removesuffix("-tuned"), at)
                name = f"{stage}@{at}" if at else stage
                outs = [{"path": out, "md5": self.md5(out)} for out in outs_of(at)]
                stages[name] = {"cmd": "python toy.py", "outs": outs}
                if stage == "train":
                    self.cost(at)
                if sections := PARAMS_OF.get(stage):
                    stages[name]["params"] = {"params.yaml": {section: given[section] for section in sections}}
        # Through JSON: no two stages share an object that a test would change in both.
        self.lock: dict[str, Any] = json.loads(json.dumps({"schema": "2.0", "stages": stages}))
        self.write_lock()

    def write_lock(self) -> None:
        (self.folder / "dvc.lock").write_text(json.dumps(self.lock))

    def md5(self, out: str) -> str:
        return hashlib.md5((self.folder / out).read_bytes()).hexdigest()

    def cost(self, at: str) -> Path:
        """Note what training of one seed cost, as its stage does."""
        result = hashlib.sha256((self.folder / f"out/training/{at}.json").read_bytes()).hexdigest()
        path = self.folder / f"out/costs/training-{at}.json"
        path.parent.mkdir(exist_ok=True)
        cost = {"seconds": 12.5, "peak_memory_mb": 300.0, "energy_kwh": 0.002, "energy_meter": "RAPL"}
        path.write_text(json.dumps(cost | {"result_sha256": result}))
        return path

    def tracking(self) -> params.Tracking:
        return params.Tracking(**self.given()["tracking"])

    def write_curve(self, losses: Sequence[tuple[int, float]]) -> None:
        steps = [Step(step, 0.0, loss, 0.1, 1.0, 4, 10) for step, loss in losses]
        (self.folder / "out/training/17.csv").write_text(contracts.curve_text(steps))

    def track(self) -> None:
        track.record(self.given()["seeds"], self.tracking())

    def describe(self) -> str:
        return track.describe(self.given()["seeds"], self.tracking())

    @property
    def database(self) -> Path:
        return self.folder / ".mlflow" / "mlflow.db"


@pytest.fixture
def toy(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    folder = (tmp_path / "my project").resolve()  # a space, as in many a path
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    made = Toy(folder)
    made.database.parent.mkdir()
    shutil.copy(empty_database, made.database)
    return made


def client_of(database: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{database.as_posix()}")


def numbers(record: dict[str, Any]) -> list[tuple[str, float]]:
    """The fields of a record that are metrics: numbers, but no seed and no answer to yes or no."""
    return [(name, value) for name, value in record.items() if type(value) in (int, float) and name != "seed"]


def runs(database: Path, experiment: str = "toy") -> list[Any]:
    client = client_of(database)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def curve(database: Path, run: Any, metric: str) -> list[tuple[int, float]]:
    history = client_of(database).get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in history]


def artifacts(database: Path, run: Any) -> dict[str, str]:
    """Content by path, as a client downloads it."""
    from mlflow.artifacts import download_artifacts

    folder = Path(download_artifacts(run_id=run.info.run_id, tracking_uri=f"sqlite:///{database.as_posix()}"))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


class TestOneRun:
    def test_holds_everything(
        self, toy: Toy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DVC_EXP_NAME", "lucid-noon")
        toy.track()
        [run] = runs(toy.database)
        digest = json.loads((toy.folder / "out/receipt.json").read_text())
        assert digest == {"digest": run.data.tags["dvc.digest"]}
        printed = capsys.readouterr()
        assert printed.out == f"recorded: run lucid-noon ({run.info.run_id}) in sqlite:///{toy.database.as_posix()}\n"
        assert printed.err == ""

        assert (run.info.status, run.info.run_name) == ("FINISHED", "lucid-noon")
        assert run.data.tags["dvc.experiments"] == "lucid-noon"
        assert run.data.tags["device"] == "cpu"
        assert run.data.tags["version.torch"] == provenance.versions()["torch"]
        assert run.data.tags["mlflow.note.content"] == "**Better**: by 20."
        assert run.data.params == {
            "data.source": "here",
            "prompt.template": "{source}",
            "prompt.instructions": '{"who (?)": "Who"}',
            "lora.r": "8",
            "lora.dropout": "0.05",
            "lora.target_modules": '["q_proj", "v_proj"]',
            "seeds": "[17]",
            "train.learning_rate": "0.001",
        }
        sizes = {"read": 4, "rows": 3, "groups": 2}
        quantized, training = asdict(RECORDS["quantized"]), asdict(RECORDS["training"])
        assert run.data.metrics == {
            "examples": 2,
            "rouge1.base": 10.5,
            "rouge1.tuned": 30.5,
            "rouge1.ci_low": 19.0,
            **{f"data/{split}_{name}": size for split in ("train", "test") for name, size in sizes.items()},
            **{f"quantize/{name}": value for name, value in numbers(quantized)},
            **{f"training/{name}": value for name, value in numbers(training)},
            "validation/loss": 2.0,
            "train/epoch": 0.6,
            "train/loss": 1.25,
            "train/learning_rate": 0.1,
            "train/grad_norm": 1.0,
            "train/rows": 4,
            "train/tokens": 12,
            "cost/train-17_seconds": 12.5,
            "cost/train-17_peak_mb": 300.0,
            "cost/train-17_energy_kwh": 0.002,
        }
        assert run.data.metrics["quantize/perplexity_after"] == 9.5
        assert run.data.metrics["training/final_loss"] == 1.25
        assert run.data.tags["energy"] == "RAPL"
        assert curve(toy.database, run, "train/loss") == [(1, 3.5), (2, 2.5), (3, 1.25)]
        assert curve(toy.database, run, "validation/loss") == [(0, 3.0), (3, 2.0)]

        files = artifacts(toy.database, run)
        table = json.loads(files.pop("tables/predictions.json"))
        assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == [
            {
                "id": name,
                "aspect": "who",
                "source": f"text {name}",
                "reference": f"ref {name}",
                "base": f"base says {name}",
                "tuned": f"tuned-17 says {name}",
                "rouge1 base": 10.0 + n,
                "rouge1 tuned": 30.0 + n,
            }
            for n, name in enumerate(["a", "b"])
        ]
        assert json.loads(files.pop("versions.json"))["packages"] == provenance.versions()
        assert hashlib.sha256(files.pop("manifest.json").encode()).hexdigest() == run.data.tags["manifest.sha256"]
        names = {"adapter/17/adapter_config.json": "out/adapters/17/adapter_config.json"}
        names |= {"adapter/17/adapter_model.safetensors": "out/adapters/17/adapter_model.safetensors"}
        names |= {f"scores/{variant}.json": f"out/scores/{variant}.json" for variant in ("base", "tuned-17")}
        for variant in ("base-unquantized", "base-shots"):
            names |= {f"scores/{variant}.json": f"out/scores/{variant}.json"}
            names |= {f"predictions/{variant}.jsonl": f"out/predictions/{variant}.jsonl"}
        names |= {f"training/17.{kind}": f"out/training/17.{kind}" for kind in ("json", "csv")}
        names |= {"forgetting/17.json": "out/forgetting/17.json", "contamination.json": "out/contamination.json"}
        names |= {f"models/{name}.json": f"out/models/{name}.json" for name in ("base", "quantized")}
        names |= {"data/card.json": "out/data/card.json", "dvc.lock": "dvc.lock", "params.yaml": "params.yaml"}
        names |= {
            f"reports/{name}": f"{'reports' if name in ('metrics.json', 'index.html') else 'out/comparison'}/{name}"
            for name in (
                *("metrics.json", "comparison.json", "comparison.md", "index.html", "comparison.svg"),
                *("figures/ladder.svg", "tables/scores.csv"),
            )
        }
        assert files == {inside: (toy.folder / name).read_text() for inside, name in names.items()}

    def test_is_found_again(
        self, toy: Toy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert toy.describe().startswith("not recorded")
        monkeypatch.setenv("DVC_EXP_NAME", "first")
        toy.track()
        [before] = runs(toy.database)
        (toy.folder / "out/costs/training-17.json").unlink()
        monkeypatch.setenv("DVC_EXP_NAME", "second")
        toy.track()
        toy.track()
        [after] = runs(toy.database)
        assert capsys.readouterr().out.splitlines()[1].startswith(f"already recorded: run first ({after.info.run_id})")
        assert toy.describe() == f"run first ({after.info.run_id}) in sqlite:///{toy.database.as_posix()}"
        assert after.data.tags == before.data.tags | {"dvc.experiments": "first, second"}
        assert (after.data.metrics, after.data.params) == (before.data.metrics, before.data.params)
        assert (after.info.end_time, after.info.status) == (before.info.end_time, "FINISHED")

    def test_of_several_seeds_tells_them_apart(self, toy: Toy) -> None:
        toy.reproduce(("seeds", [17, 18]))
        toy.track()
        [run] = runs(toy.database)
        for seed in (17, 18):
            assert curve(toy.database, run, f"seed-{seed}/train/loss") == [(1, 3.5), (2, 2.5), (3, 1.25)]
            assert run.data.metrics[f"cost/train-{seed}_seconds"] == 12.5
        files = artifacts(toy.database, run)
        assert {"adapter/17/adapter_config.json", "adapter/18/adapter_config.json"} <= set(files)
        columns = json.loads(files["tables/predictions.json"])["columns"]
        assert columns == [
            *("id", "aspect", "source", "reference", "base", "tuned-17", "tuned-18"),
            *("rouge1 base", "rouge1 tuned-17", "rouge1 tuned-18"),
        ]

    def test_takes_long_curves_and_long_texts(self, toy: Toy) -> None:
        toy.reproduce(("prompt.template", "x" * 7000))
        toy.write_curve([(step, step / 2) for step in range(1, 2501)])
        toy.track()
        [run] = runs(toy.database)
        assert curve(toy.database, run, "train/loss") == [(step, step / 2) for step in range(1, 2501)]
        assert len(run.data.params["prompt.template"]) == 6000
        assert run.data.params["prompt.template"].endswith("x ... (cut: see params.yaml)")

    def test_is_named_by_its_commit(self, toy: Toy) -> None:
        git(toy.folder, "init", "--quiet")
        (toy.folder / ".gitignore").write_text("/out/\n/.mlflow/\n")
        git(toy.folder, "add", "--all")
        git(toy.folder, "commit", "--quiet", "--message", "first")
        sha = git(toy.folder, "rev-parse", "HEAD")
        toy.track()
        [run] = runs(toy.database)
        assert run.info.run_name == sha[:7]
        tags = run.data.tags
        assert (tags["mlflow.source.git.commit"], tags["dvc.commits"], tags["git.dirty"]) == (sha, sha, "false")

        toy.reproduce(("lora.r", 4))
        toy.track()
        [changed] = [one for one in runs(toy.database) if one.info.run_id != run.info.run_id]
        assert changed.info.run_name == f"{sha[:7]}+{changed.data.tags['dvc.digest'][:7]}"
        assert changed.data.tags["git.dirty"] == "true"


class TestIdentity:
    def test_a_param_that_changes_no_output_counts(self, toy: Toy) -> None:
        toy.track()
        toy.reproduce(("lora.dropout", 0.1))
        toy.track()
        assert sorted(run.data.params["lora.dropout"] for run in runs(toy.database)) == ["0.05", "0.1"]

    def test_the_cost_of_another_result_is_not_this_ones(self, toy: Toy) -> None:
        """What lies in the working directory may have come from a cache since the stage last ran here."""
        cost = toy.cost("17")
        cost.write_text(json.dumps(json.loads(cost.read_text()) | {"result_sha256": "another"}))
        toy.track()
        [run] = runs(toy.database)
        assert not [name for name in run.data.metrics if name.startswith("cost/")]

    def test_an_output_counts(self, toy: Toy) -> None:
        def digest() -> str:
            return identity.digest(identity.here([17]))

        first = digest()
        toy.lock["stages"]["fetch"]["outs"][0]["md5"] = "0" * 32
        toy.write_lock()
        assert digest() != first

    def test_stages_of_another_experiment_do_not_count(self, toy: Toy) -> None:
        first = identity.digest(identity.here([17]))
        stale = toy.lock["stages"]["train@17"] | {"params": {"params.yaml": {"lora": {"r": 1}}}}
        toy.lock["stages"] |= {"train@18": stale, "track": {"cmd": "x", "outs": [{"path": "r", "md5": "1" * 32}]}}
        toy.write_lock()
        assert identity.digest(identity.here([17])) == first
        toy.track()
        [run] = runs(toy.database)
        assert run.data.params["lora.r"] == "8"

    def test_where_a_commands_words_change_the_experiment_is_the_same(self, toy: Toy) -> None:
        first = identity.digest(identity.here([17]))
        toy.lock["stages"]["prepare"]["cmd"] = "python -m toy prepare"
        toy.lock["stages"] = dict(reversed(toy.lock["stages"].items()))
        toy.write_lock()
        assert identity.digest(identity.here([17])) == first


class TestRefusals:
    def test_missing_stages(self, toy: Toy) -> None:
        with pytest.raises(
            UserError, match=r"dvc.lock has no train@18, infer-tuned@18, forget@18, evaluate-tuned@18: run `dvc repro`"
        ):
            track.record([17, 18], toy.tracking())

    def test_no_lock(self, toy: Toy) -> None:
        (toy.folder / "dvc.lock").unlink()
        with pytest.raises(UserError, match=r"dvc.lock is missing: run `dvc repro`"):
            toy.track()

    def test_a_mixture_of_two_experiments(self, toy: Toy) -> None:
        toy.lock["stages"]["infer@base"]["params"]["params.yaml"]["prompt"]["template"] = "another"
        toy.write_lock()
        with pytest.raises(
            UserError, match=r"two experiments, prompt.template differs between infer@base and train@17"
        ):
            toy.track()

    def test_the_comparison_is_published_even_where_the_store_refuses(self, toy: Toy) -> None:
        toy.track()
        made = [path for path in (toy.folder / "out/comparison").rglob("*") if path.is_file()]
        assert len(made) == 5
        assert not (toy.folder / "reports/comparison.json").exists()
        for path in (path for path in made if path.name != "comparison.json"):
            published = toy.folder / "reports" / path.relative_to(toy.folder / "out/comparison")
            assert published.read_bytes() == path.read_bytes()
        (toy.folder / "out/comparison/comparison.md").write_text("**Worse**\n")
        toy.database.write_bytes(b"no database")
        with pytest.raises(UserError, match="refused"):
            toy.track()
        assert (toy.folder / "reports/comparison.md").read_text() == "**Worse**\n"

    def test_missing_outputs_are_all_named(self, toy: Toy) -> None:
        shutil.rmtree(toy.folder / "out/adapters/17")
        (toy.folder / "out/comparison/comparison.svg").unlink()
        with pytest.raises(UserError, match=r"(?s)outputs are missing.*comparison.svg\n.*out/adapters/17"):
            toy.track()

    @pytest.mark.parametrize("name", ["infer@base", "rouge (1)", "a//b", "../up", "/root", ""])
    def test_illegal_names(self, toy: Toy, name: str) -> None:
        (toy.folder / "reports/metrics.json").write_text(json.dumps({name: 1.0}))
        with pytest.raises(UserError, match=r"MLflow cannot hold these metrics:\n  - .* is not a metric's name"):
            toy.track()
        assert runs(toy.database) == []

    @pytest.mark.parametrize("value", [None, "much", [1.0], True])
    def test_what_is_no_number(self, toy: Toy, value: object) -> None:
        (toy.folder / "reports/metrics.json").write_text(json.dumps({"rouge1": {"base": value}}))
        with pytest.raises(UserError, match=r"metrics.json: rouge1.base = .* is not a number"):
            toy.track()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite(self, toy: Toy, value: float) -> None:
        toy.write_curve([(1, value)])
        with pytest.raises(UserError, match=rf"train/loss = {value} at step 1"):
            toy.track()

    @pytest.mark.parametrize(
        "path",
        ["out/adapters/17/adapter_model.safetensors", "out/predictions/base.jsonl", "out/data/test.jsonl",
         "out/scores/tuned-17.json", "out/models/quantized.json", "reports/metrics.json"],
    )  # fmt: skip
    def test_what_has_changed_on_the_disk_is_not_recorded(self, toy: Toy, path: str) -> None:
        """As DVC restores it from a cache that has rotted."""
        content = (toy.folder / path).read_text()
        (toy.folder / path).write_text(content + "\n")
        with pytest.raises(UserError, match=rf"(?s)nothing is recorded, .*- {path}: not what stage \w+"):
            toy.track()
        assert runs(toy.database) == []
        assert not (toy.folder / "out/receipt.json").exists()
        (toy.folder / path).write_text(content)
        toy.track()
        assert len(runs(toy.database)) == 1

    def test_predictions_of_another_split(self, toy: Toy) -> None:
        path = toy.folder / "out/predictions/tuned-17.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))
        with pytest.raises(
            UserError,
            match=r"tuned-17 \(predictions\) and the test split differ",
        ):
            toy.track()

    def test_a_deleted_experiment(self, toy: Toy) -> None:
        toy.track()
        client = client_of(toy.database)
        client.delete_experiment(client.get_experiment_by_name("toy").experiment_id)
        with pytest.raises(UserError, match="experiment toy was deleted: restore it with `mlflow experiments restore"):
            toy.track()

    def test_a_store_that_mlflow_refuses(self, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "bogus://me:secret@nowhere")
        with pytest.raises(UserError, match="the MLflow store bogus://nowhere refused") as caught:
            toy.track()
        assert "secret" not in str(caught.value)
        assert not (toy.folder / "out/receipt.json").exists()


class TestInterrupted:
    @pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
    def test_a_half_written_run_is_replaced(self, toy: Toy, status: str) -> None:
        toy.track()
        [run] = runs(toy.database)
        client = client_of(toy.database)
        client.update_run(run.info.run_id, status)
        assert toy.describe().startswith("not recorded")
        half = Path(run.info.artifact_uri.removeprefix("file://").replace("%20", " "))
        assert half.is_dir()
        toy.track()
        [whole] = runs(toy.database)
        assert whole.info.run_id != run.info.run_id
        assert (whole.info.status, whole.data.metrics) == ("FINISHED", run.data.metrics)
        assert not half.exists()

    @pytest.mark.parametrize("method", ["log_batch", "log_artifacts", "log_table"])
    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_a_run_that_fails_on_the_way_is_not_finished(
        self, toy: Toy, method: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow import MlflowClient

        def fail(*_: object, **__: object) -> None:
            raise error("planted")

        with monkeypatch.context() as planted:
            planted.setattr(MlflowClient, method, fail)
            with pytest.raises(error, match="planted"):
                toy.track()
        assert [run.info.status for run in runs(toy.database)] == ["FAILED"]
        assert not (toy.folder / "out/receipt.json").exists()
        toy.track()
        assert [run.info.status for run in runs(toy.database)] == ["FINISHED"]


class TestStore:
    def test_the_users_environment_wins(self, toy: Toy, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = toy.folder / "mine.db"
        shutil.copy(empty_database, mine)
        toy.reproduce(("tracking.uri", "sqlite:///other.db"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
        toy.track()
        assert len(runs(mine)) == 1
        assert not (toy.folder / "other.db").exists()

    @pytest.mark.parametrize(
        ("uri", "expected"),
        [
            (None, "sqlite:///{root}/.mlflow/mlflow.db"),
            ("sqlite:///records/my.db", "sqlite:///{root}/records/my.db"),
            ("sqlite:///my.db?timeout=9", "sqlite:///{root}/my.db?timeout=9"),
            ("sqlite:////srv/my.db", "sqlite:////srv/my.db"),
            ("http://localhost:5000", "http://localhost:5000"),
            ("postgresql+psycopg2://host/db", "postgresql+psycopg2://host/db"),
            ("databricks", "databricks"),
            ("databricks://profile", "databricks://profile"),
            ("mlruns", "{root_uri}/mlruns"),
        ],
    )
    def test_addresses(self, toy: Toy, uri: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        copy = toy.folder / ".dvc" / "tmp" / "exps" / "copy"
        copy.mkdir(parents=True)
        monkeypatch.chdir(copy)
        monkeypatch.setenv("DVC_ROOT", str(toy.folder))
        wanted = expected.format(root=toy.folder.as_posix(), root_uri=toy.folder.as_uri())
        if uri is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert address.tracking_uri(params.Tracking(uri=None, experiment="toy")) == wanted

    def test_an_experiment_in_a_copy_is_recorded_in_the_main_repository(
        self, toy: Toy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = toy.folder / ".dvc" / "tmp" / "exps" / "standalone" / "copy"
        for name in ("out", "reports", ".dvc/empty"):
            source = toy.folder / name
            shutil.copytree(source, copy / name) if source.exists() else (copy / name).mkdir(parents=True)
        for name in ("dvc.lock", "params.yaml"):
            shutil.copy(toy.folder / name, copy / name)
        monkeypatch.chdir(copy)
        monkeypatch.setenv("DVC_ROOT", str(toy.folder))
        toy.track()
        [run] = runs(toy.database)
        shutil.rmtree(copy)
        monkeypatch.chdir(toy.folder)
        expected = (toy.folder / "out/adapters/17/adapter_model.safetensors").read_text()
        assert artifacts(toy.database, run)["adapter/17/adapter_model.safetensors"] == expected
        assert run.info.artifact_uri.startswith((toy.folder / ".mlflow" / "artifacts").as_uri())
        assert not (toy.folder / "mlruns").exists()

    def test_an_experiment_that_another_machine_creates_meanwhile_is_taken(
        self, toy: Toy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tracking = params.Tracking(uri=f"sqlite:///{toy.database.as_posix()}", experiment="at once")
        with store.opened(tracking) as client:
            location = (toy.database.parent / "artifacts").as_uri()
            found = client.create_experiment(tracking.experiment, artifact_location=location)
            answers = iter([None, client.get_experiment_by_name(tracking.experiment)])
            monkeypatch.setattr(client, "get_experiment_by_name", lambda _: next(answers))
            assert store.experiment(client, tracking) == found

    def test_looking_creates_no_store(self, toy: Toy) -> None:
        shutil.rmtree(toy.folder / ".mlflow")
        assert toy.describe().startswith("not recorded: run `dvc repro`")
        assert not (toy.folder / ".mlflow").exists()

    def test_passwords_are_not_shown(self) -> None:
        assert without_passwords("http://me:secret@host:5000/a@b") == "http://host:5000/a@b"
        assert without_passwords("mysql://h/d?user=me&password=secret") == "mysql://h/d?user=me&password=..."
        assert str(UserError("no answer from https://hf_secret@host:1")) == "no answer from https://host:1"
        text = "https://host/x and a@b, //a b@c, hf:a/b@main, git@host:a/b"
        assert without_passwords(text) == text

    @pytest.mark.slow
    def test_three_processes_on_a_fresh_store(self, toy: Toy) -> None:
        """Two experiments, one of them twice at the same time: two runs, and a database that is whole."""
        shutil.rmtree(toy.folder / ".mlflow")
        folders = [toy.folder, toy.folder.with_name("same"), toy.folder.with_name("other")]
        for folder in folders[1:]:
            shutil.copytree(toy.folder, folder)
        os.chdir(folders[2])
        other = Toy.__new__(Toy)
        other.folder = folders[2]
        other.reproduce(("lora.r", 4))
        os.chdir(toy.folder)
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": f"sqlite:///{toy.database.as_posix()}",
            "PYTHONPATH": str(ROOT),
        }
        started = [
            subprocess.Popen(
                [sys.executable, "toy.py", "track"],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for folder in folders
        ]
        outcomes = [(*process.communicate(timeout=120), process.returncode) for process in started]
        assert [code for *_, code in outcomes] == [0, 0, 0], outcomes
        assert sorted(out.split(":")[0] for out, *_ in outcomes) == ["already recorded", "recorded", "recorded"]
        assert all(err == "" for _, err, _ in outcomes)
        assert [run.info.status for run in runs(toy.database)] == ["FINISHED", "FINISHED"]
        with sqlite3.connect(toy.database) as connection:
            assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        connection.close()


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def dvc(tmp_path: Path, empty_database: Path) -> Callable[..., str]:
    """A real DVC project in `tmp_path/project`; call with a command line."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / ".mlflow").mkdir()
    shutil.copy(empty_database, folder / ".mlflow" / "mlflow.db")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
    }

    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    git(folder, "init", "--quiet")
    git(folder, "config", "user.name", "Test")
    git(folder, "config", "user.email", "test@localhost")
    call("init", "--quiet")
    (folder / "toy.py").write_text(STAGE)
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / ".gitignore").write_text("/out/\n/.mlflow/\n__pycache__/\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "project")
    return call


@pytest.mark.slow
def test_every_way_of_running_dvc_ends_in_one_store(dvc: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "project"
    database = folder / ".mlflow" / "mlflow.db"

    def recorded() -> dict[tuple[str, str], str]:
        found = runs(database)
        assert {run.info.status for run in found} == {"FINISHED"}
        names = {(run.data.params["lora.r"], run.data.params["lora.dropout"]): run.info.run_name for run in found}
        assert len(names) == len(found)
        return names

    assert "\nrecorded: run" in dvc("repro")
    assert set(recorded()) == {("8", "0.05")}
    assert "Data and pipelines are up to date" in dvc("repro")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "result")
    assert "Data and pipelines are up to date" in dvc("repro")

    # A parameter that changes no output is an experiment all the same.
    assert "\nrecorded: run named " in dvc("exp", "run", "--name", "named", "--set-param", "lora.dropout=0.1")
    # In a temporary copy of the workspace, uncommitted dropout included.
    said = dvc("exp", "run", "--temp", "--name", "copy", "--set-param", "lora.r=4")
    assert "\nrecorded: run copy " in said
    names = recorded()
    first = names["8", "0.05"]
    assert names == {("8", "0.05"): first, ("8", "0.1"): "named", ("4", "0.1"): "copy"}

    # The copy's experiment again, in the workspace: nothing is trained, nothing is recorded twice.
    said = dvc("exp", "run", "--name", "again", "--set-param", "lora.r=4")
    assert "Stage 'train@17' is cached" in said
    assert "\nalready recorded: run copy " in said
    # Back to the first.
    git(folder, "checkout", "--quiet", ".")
    assert f"\nalready recorded: run {first} " in dvc("repro")
    assert recorded() == names
    for run in runs(database):
        weights = artifacts(database, run)["adapter/17/adapter_model.safetensors"]
        assert weights == f"weights 17 {run.data.params['lora.r']}"
