"""The experiment from end to end, as a user runs it: DVC, real stages, a tiny random Llama, MLflow.

The tests of this module are one story in one project folder and run in the order in which they stand.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import paths, records
from pipeline.record import identity
from pipeline.report import page
from tests.made.clone import SECRET, Finished, environment, make_clone
from tests.made.data import ASPECTS, SPLIT_GROUPS

pytestmark = pytest.mark.usefixtures("mlflow_calls_what_its_dependencies_deprecate")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def clone(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project that the story goes on in."""
    return finished.copy(tmp_path_factory.mktemp("story") / "clone")


@pytest.fixture
def dvc(clone: Path) -> Run:
    def run(*arguments: str, cwd: Path = clone) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["dvc", *arguments], cwd=cwd, env=environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return run


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def finished_runs(clone: Path) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{clone}/.mlflow/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lora-repro'")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    return list(runs)


EVERY = [
    "check", "prepare", "fetch", "quantize", "infer@base", "evaluate@base",
    "train@17", "infer-tuned@17", "evaluate-tuned@17", "forget@17", "compare", "track",
]  # fmt: skip
OF_TRAINING = ["check", *EVERY[6:]]


def test_a_mistake_in_the_parameters_is_one_clear_error(tmp_path: Path, tiny_model: Path, dvc: Run) -> None:
    folder, data = tmp_path / "clone", tmp_path / "source"
    folder.mkdir()
    data.mkdir()
    make_clone(folder, data, tiny_model)
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: fast"))
    result = dvc("repro", cwd=folder)
    assert result.returncode != 0
    assert "train.learning_rate = 'fast': input should be a valid number" in result.stdout
    assert "Traceback" not in result.stdout


def test_one_command_runs_everything(finished: Finished, clone: Path) -> None:
    assert sorted(ran(finished.printed)) == sorted(EVERY)
    metrics = records.read_json(clone / paths.METRICS)
    assert metrics["rouge1"]["ci_low"] <= metrics["rouge1"]["diff"] <= metrics["rouge1"]["ci_high"]
    for report in (paths.COMPARISON_MD, paths.COMPARISON_SVG, paths.FIGURES / "scores.svg"):
        assert (clone / report).stat().st_size > 500
        assert (clone / paths.published(report)).read_bytes() == (clone / report).read_bytes()
    lock = (clone / paths.DVC_LOCK).read_text()
    assert page.faults(clone / paths.REPORT_HTML, identity.digest_of(lock, [17])) == []
    data = re.search(r'id="data">(.*?)</script>', (clone / paths.REPORT_HTML).read_text(), flags=re.S)
    assert data is not None
    assert len(json.loads(data[1])["examples"]) == SPLIT_GROUPS["test"] * len(ASPECTS)
    (run,) = finished_runs(clone)
    assert run.data.params["lora.r"] == "4"
    assert run.data.metrics["rouge1.diff"] == metrics["rouge1"]["diff"]


def test_every_guard_is_in_the_report(finished: Finished) -> None:
    text = (finished.folder / paths.COMPARISON_MD).read_text()
    rows = dict(
        line.strip("| ").split(" | ", 1)
        for line in text.splitlines()
        if line.startswith("| ") and line.count(" | ") == 1
    )
    expected = {
        "test or validation examples in training": "0 exact, 0 near",
        "quantization or a device other than asked for": "14 layers of nf4.* computed on cpu",
        "a doubled BOS, or another prefix in inference than in training": "24 prompts start with one BOS at most",
        "training rows without a supervised token or a closing EOS": "in each of 16 rows; 0 dropped",
        "gradients through repacked 4-bit weights": "^0 layers repacked",
        "a loss or an adapter that is not finite": "largest gradient norm [0-9.]+, last loss [0-9.]+",
        "an adapter that is not applied": "it moves a logit by up to [0-9.]+",
        "outputs that depend on their batch": "rechecked alone are the same",
        "hidden decoding defaults, unequal prompts": "decoding settings, cpu with 1 threads",
    }
    assert [name for name in expected if not re.search(expected[name], rows.get(name, ""))] == []


def test_no_secret_of_the_environment_is_in_any_file_or_output(finished: Finished) -> None:
    assert SECRET not in finished.printed
    files = [path for path in finished.folder.rglob("*") if path.is_file()]
    folders = {path.relative_to(finished.folder).parts[0] for path in files}
    assert {"out", "reports", ".mlflow", ".dvc", "dvc.lock", ".git"} <= folders
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_again_nothing_runs_and_the_status_is_clean(dvc: Run) -> None:
    result = dvc("repro")
    assert result.returncode == 0
    assert ran(result.stdout) == []
    assert "Data and pipelines are up to date." in dvc("status", "dvc.yaml").stdout


def test_the_logged_adapter_loads_with_peft_alone_on_the_fetched_base(clone: Path, tmp_path: Path) -> None:
    import mlflow
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (run,) = finished_runs(clone)
    uri = f"sqlite:///{clone}/.mlflow/mlflow.db"
    downloaded = mlflow.artifacts.download_artifacts(
        run_id=run.info.run_id, artifact_path="adapter/17", dst_path=str(tmp_path), tracking_uri=uri
    )
    assert records.sha256_tree(Path(downloaded)) == records.sha256_tree(clone / paths.adapter(17))
    base = AutoModelForCausalLM.from_pretrained(clone / paths.BASE)
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits.detach()
    after = PeftModel.from_pretrained(base, downloaded)(ids).logits.detach()
    assert float((before - after).abs().max()) > 1e-3


def test_another_rank_runs_nothing_of_the_base(clone: Path, dvc: Run) -> None:
    result = dvc("exp", "run", "-S", "lora.r=2", "-n", "rank-2")
    assert result.returncode == 0, result.stdout
    stages = ran(result.stdout)
    assert sorted(stages) == sorted(OF_TRAINING)  # of those that do not depend on each other DVC takes any first
    assert (stages[0], stages[-2:]) == (OF_TRAINING[0], OF_TRAINING[-2:])
    assert sorted(run.data.params["lora.r"] for run in finished_runs(clone)) == ["2", "4"]


def test_going_back_computes_nothing_and_records_nothing_twice(clone: Path, dvc: Run) -> None:
    """`track` alone runs: it finds the run in the store, and publishes the comparison that the cache restored."""
    there = (clone / "reports/comparison.md").read_bytes()
    result = dvc("exp", "run", "-S", "lora.r=4")
    assert result.returncode == 0, result.stdout
    assert ran(result.stdout) == ["track"]
    for stage in OF_TRAINING[:-1]:
        assert f"Stage '{stage}' is cached" in result.stdout
    assert "already recorded: run " in result.stdout
    assert len(finished_runs(clone)) == 2
    assert (clone / "reports/comparison.md").read_bytes() != there


def lora_repro(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from pipeline.commands.cli import app; app()", *arguments],
        cwd=cwd, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_any_two_experiments_are_compared_wherever_their_scores_are(clone: Path) -> None:
    """In the cache, by the name of a DVC experiment or as a commit; in MLflow, when the cache has lost them."""
    git = ["git", "for-each-ref", "--format=%(objectname) %(refname:lstrip=-1)", "refs/exps"]
    refs = subprocess.run(git, cwd=clone, capture_output=True, text=True, check=True).stdout
    (commit,) = [line.split()[0] for line in refs.splitlines() if line.endswith(" rank-2")]
    (run,) = [run for run in finished_runs(clone) if run.data.params["lora.r"] == "4"]
    by_name = lora_repro("compare", "rank-2", run.info.run_id[:8], cwd=clone)
    assert by_name.returncode == 0, by_name.stdout
    assert "2 experiments, 8 test examples of 4 groups.\n" in by_name.stdout
    assert "Signature: `rouge-score" in by_name.stdout
    header, _, *rows = [line for line in by_name.stdout.splitlines() if line.startswith("|")]
    assert "lora.r" in header
    assert max(len(line) for line in by_name.stdout.splitlines() if line.startswith("|")) <= 80
    assert {(cells[2].strip(), cells[3].strip()) for cells in (row.split("|") for row in rows[:2])} == {
        ("rank-2", "2"),
        (run.info.run_name, "4"),
    }
    by_commit = lora_repro("compare", commit, run.info.run_id, cwd=clone)
    assert by_commit.stdout.replace(commit, "rank-2").count("rank-2") == by_name.stdout.count("rank-2")
    moved = clone / ".dvc" / "cache" / "files"
    moved.rename(clone / "lost")
    try:
        assert lora_repro("compare", "rank-2", run.info.run_id[:8], cwd=clone).stdout == by_name.stdout
    finally:
        (clone / "lost").rename(moved)


def test_a_pulled_experiment_is_compared_on_another_clone(clone: Path, dvc: Run, tmp_path: Path) -> None:
    remote, other = tmp_path / "remote.git", tmp_path / "other"

    def run(*command: str, cwd: Path) -> None:
        subprocess.run(command, cwd=cwd, env=environment(), check=True, capture_output=True)

    run("git", "clone", "-q", "--bare", str(clone), str(remote), cwd=tmp_path)
    run("git", "remote", "add", "shared", str(remote), cwd=clone)
    assert dvc("remote", "add", "--local", "-d", "store", str(tmp_path / "store")).returncode == 0
    for experiment in ("rank-2", "rank-4"):
        if experiment == "rank-4":
            assert dvc("exp", "save", "-n", experiment, "dvc.yaml").returncode == 0
        pushed = dvc("exp", "push", "shared", experiment)
        assert pushed.returncode == 0, pushed.stdout
    run("git", "clone", "-q", str(remote), str(other), cwd=tmp_path)
    missing = lora_repro("compare", "rank-2", "rank-4", cwd=other)
    assert missing.returncode == 1
    assert "no run has the name or id rank-2" in missing.stdout
    assert dvc("remote", "add", "--local", "-d", "store", str(tmp_path / "store"), cwd=other).returncode == 0
    pulled = dvc("exp", "pull", "origin", "rank-2", "rank-4", cwd=other)
    assert pulled.returncode == 0, pulled.stdout
    here, there = (lora_repro("compare", "rank-2", "rank-4", cwd=folder) for folder in (clone, other))
    assert there.returncode == 0, there.stdout

    def results(printed: str) -> list[list[str]]:
        """All cells but time and memory, which are in the store of the clone that spent them."""
        rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("|")]
        return [row[:-3] if number < 4 else row for number, row in enumerate(rows)]

    assert results(there.stdout) == results(here.stdout)
    assert {row[3]: row[-1] for row in results(there.stdout)[2:4]} == {"2": "4,096", "4": "8,192"}


def test_a_temporary_experiment_from_a_subfolder_ends_in_the_same_store(clone: Path, dvc: Run) -> None:
    result = dvc(
        "exp", "run", "--temp", "-S", "../params.yaml:train.learning_rate=5e-3", "../dvc.yaml", cwd=clone / "stages"
    )
    assert result.returncode == 0, result.stdout
    runs = finished_runs(clone)
    assert sorted(float(run.data.params["train.learning_rate"]) for run in runs) == [0.005, 0.01, 0.01]
    assert all(str(clone / ".mlflow") in run.info.artifact_uri for run in runs)
    assert not (clone / "stages" / ".mlflow").exists()


def test_a_mistake_later_on_loses_nothing(clone: Path, dvc: Run) -> None:
    text = (clone / "params.yaml").read_text()
    (clone / "params.yaml").write_text(text.replace("target_modules: all-linear", "target_modules: [qproj]"))
    result = dvc("repro")
    assert result.returncode != 0
    assert "lora.target_modules names qproj, which this model does not have" in result.stdout
    assert "Traceback" not in result.stdout
    (clone / "params.yaml").write_text(text)
    assert dvc("repro").returncode == 0
    assert len(finished_runs(clone)) == 3
    assert SPLIT_GROUPS["test"] * 2 == len((clone / "out/predictions/base.jsonl").read_text().splitlines())
