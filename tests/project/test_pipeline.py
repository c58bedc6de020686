"""The experiment from end to end, as a user runs it: DVC, real stages, a tiny random Llama, MLflow.

Each test has a copy of a finished project, or reads the one that all share.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import paths, records, yaml12
from pipeline.record import identity
from pipeline.report import page
from tests.made.clone import SECRET, Finished, environment, make_clone
from tests.made.data import ASPECTS, SPLIT_GROUPS
from tests.made.parameters import edit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mlflow_calls_what_its_dependencies_deprecate")]

Done = subprocess.CompletedProcess[str]


def dvc(folder: Path, *arguments: str) -> Done:
    return subprocess.run(
        ["dvc", *arguments], cwd=folder, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture
def clone(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished project."""
    return finished.copy(tmp_path / "clone")


@pytest.fixture(scope="module")
def of_two_ranks(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The finished project, of rank 4, in which the experiment `rank-2` has run as well. Not to be changed."""
    folder = finished.copy(tmp_path_factory.mktemp("ranks") / "clone")
    result = dvc(folder, "exp", "run", "-S", "lora.r=2", "-n", "rank-2")
    assert result.returncode == 0, result.stdout
    return Finished(folder, result.stdout)


@pytest.fixture
def two_ranks(of_two_ranks: Finished, tmp_path: Path) -> Path:
    """A copy of it."""
    return of_two_ranks.copy(tmp_path / "ranks")


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
    "check", "prepare", "fetch", "prompts", "contamination", "quantize", "infer@base", "evaluate@base",
    "infer-unquantized", "evaluate-unquantized", "infer-shots", "evaluate-shots",
    "train@17", "infer-tuned@17", "evaluate-tuned@17", "forget@17", "compare", "track",
]  # fmt: skip
OF_TRAINING = ["check", *EVERY[12:]]


def test_a_mistake_in_the_parameters_is_one_clear_error(tmp_path: Path, tiny_model: Path) -> None:
    folder, data = tmp_path / "clone", tmp_path / "source"
    folder.mkdir()
    data.mkdir()
    make_clone(folder, data, tiny_model)
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("learning_rate: 0.01", "learning_rate: fast"))
    result = dvc(folder, "repro")
    assert result.returncode != 0
    assert "train.learning_rate = 'fast': input should be a valid number" in result.stdout
    assert "Traceback" not in result.stdout


def test_one_command_runs_everything(finished: Finished) -> None:
    clone = finished.folder
    assert sorted(ran(finished.printed)) == sorted(EVERY)
    metrics = records.read_json(clone / paths.METRICS)
    assert metrics["rouge1"]["ci_low"] <= metrics["rouge1"]["diff"] <= metrics["rouge1"]["ci_high"]
    for report in (paths.COMPARISON_MD, paths.COMPARISON_SVG, paths.FIGURES / "ladder.svg"):
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


def test_again_nothing_runs_and_the_status_is_clean(clone: Path) -> None:
    result = dvc(clone, "repro")
    assert result.returncode == 0
    assert ran(result.stdout) == []
    assert "Data and pipelines are up to date." in dvc(clone, "status", "dvc.yaml").stdout


def test_the_logged_adapter_loads_with_peft_alone_on_the_fetched_base(finished: Finished, tmp_path: Path) -> None:
    import mlflow
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    clone = finished.folder
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


def test_another_rank_runs_nothing_of_the_base(of_two_ranks: Finished) -> None:
    stages = ran(of_two_ranks.printed)
    assert sorted(stages) == sorted(OF_TRAINING)  # of those that do not depend on each other DVC takes any first
    assert (stages[0], stages[-2:]) == (OF_TRAINING[0], OF_TRAINING[-2:])
    assert sorted(run.data.params["lora.r"] for run in finished_runs(of_two_ranks.folder)) == ["2", "4"]


def test_going_back_computes_nothing_and_records_nothing_twice(two_ranks: Path) -> None:
    """`track` alone runs: it finds the run in the store, and publishes the comparison that the cache restored."""
    there = (two_ranks / "reports/comparison.md").read_bytes()
    result = dvc(two_ranks, "exp", "run", "-S", "lora.r=4")
    assert result.returncode == 0, result.stdout
    assert ran(result.stdout) == ["track"]
    for stage in OF_TRAINING[:-1]:
        assert f"Stage '{stage}' is cached" in result.stdout
    assert "already recorded: run " in result.stdout
    assert len(finished_runs(two_ranks)) == 2
    assert (two_ranks / "reports/comparison.md").read_bytes() != there


def lora_repro(*arguments: str, cwd: Path) -> Done:
    return subprocess.run(
        [sys.executable, "-c", "from pipeline.commands.cli import app; app()", *arguments],
        cwd=cwd, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_any_two_experiments_are_compared_wherever_their_scores_are(two_ranks: Path) -> None:
    """In the cache, by the name of a DVC experiment or as a commit; in MLflow, when the cache has lost them."""
    clone = two_ranks
    git = ["git", "for-each-ref", "--format=%(objectname) %(refname:lstrip=-1)", "refs/exps"]
    refs = subprocess.run(git, cwd=clone, capture_output=True, text=True, check=True).stdout
    (commit,) = [line.split()[0] for line in refs.splitlines() if line.endswith(" rank-2")]
    (run,) = [run for run in finished_runs(clone) if run.data.params["lora.r"] == "4"]
    by_name = lora_repro("compare", "rank-2", run.info.run_id[:8], cwd=clone)
    assert by_name.returncode == 0, by_name.stdout
    assert "2 experiments, 8 test examples of 4 groups.\n" in by_name.stdout
    assert "Signature: `form:NFC|rouge-score" in by_name.stdout
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


def test_a_pulled_experiment_is_compared_on_another_clone(two_ranks: Path, tmp_path: Path) -> None:
    clone, remote, other = two_ranks, tmp_path / "remote.git", tmp_path / "other"

    def run(*command: str, cwd: Path) -> None:
        subprocess.run(command, cwd=cwd, env=environment(), check=True, capture_output=True)

    run("git", "clone", "-q", "--bare", str(clone), str(remote), cwd=tmp_path)
    run("git", "clone", "-q", str(remote), str(other), cwd=tmp_path)
    run("git", "remote", "add", "shared", str(remote), cwd=clone)
    for folder in (clone, other):
        run("dvc", "remote", "add", "--local", "-d", "store", str(tmp_path / "store"), cwd=folder)
    run("dvc", "exp", "run", "-S", "lora.r=4", cwd=clone)
    run("dvc", "exp", "save", "-n", "rank-4", "dvc.yaml", cwd=clone)
    for experiment in ("rank-2", "rank-4"):
        pushed = dvc(clone, "exp", "push", "shared", experiment)
        assert pushed.returncode == 0, pushed.stdout
    missing = lora_repro("compare", "rank-2", "rank-4", cwd=other)
    assert missing.returncode == 1
    assert "no run has the name or id rank-2" in missing.stdout
    pulled = dvc(other, "exp", "pull", "origin", "rank-2", "rank-4")
    assert pulled.returncode == 0, pulled.stdout
    here, there = (lora_repro("compare", "rank-2", "rank-4", cwd=folder) for folder in (clone, other))
    assert there.returncode == 0, there.stdout

    def results(printed: str) -> list[list[str]]:
        """All cells but time and memory, which are in the store of the clone that spent them."""
        rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("|")]
        return [row[:-3] if number < 4 else row for number, row in enumerate(rows)]

    assert results(there.stdout) == results(here.stdout)
    assert {row[3]: row[-1] for row in results(there.stdout)[2:4]} == {"2": "4,096", "4": "8,192"}


def test_a_temporary_experiment_from_a_subfolder_ends_in_the_same_store(clone: Path) -> None:
    override = "../params.yaml:train.learning_rate=5e-3"
    result = dvc(clone / "stages", "exp", "run", "--temp", "-S", override, "../dvc.yaml")
    assert result.returncode == 0, result.stdout
    runs = finished_runs(clone)
    assert sorted(float(run.data.params["train.learning_rate"]) for run in runs) == [0.005, 0.01]
    assert all(str(clone / ".mlflow") in run.info.artifact_uri for run in runs)
    assert not (clone / "stages" / ".mlflow").exists()


def test_a_mistake_later_on_loses_nothing(clone: Path) -> None:
    text = (clone / "params.yaml").read_text()
    (clone / "params.yaml").write_text(text.replace("target_modules: all-linear", "target_modules: [qproj]"))
    result = dvc(clone, "repro")
    assert result.returncode != 0
    assert "lora.target_modules names qproj, which this model does not have" in result.stdout
    assert "Traceback" not in result.stdout
    (clone / "params.yaml").write_text(text)
    assert dvc(clone, "repro").returncode == 0
    assert len(finished_runs(clone)) == 1
    assert SPLIT_GROUPS["test"] * 2 == len((clone / "out/predictions/base.jsonl").read_text().splitlines())


def test_what_is_wrong_with_test_prompts_is_found_before_training_and_its_remedy_trains_nothing_else(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    data = Path(shutil.copytree(yaml12.read(paths.PARAMS)["data"]["source"], tmp_path / "data"))
    test = data / "test.jsonl"
    *rows, last = map(json.loads, test.read_text().splitlines())

    def given(source: str) -> None:
        test.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last | {"source": source, "group": "z"}]))
        edit(data={"source": str(data), "sha256": records.sha256_tree(data)})

    given("red cat runs " * 80)
    failed = dvc(clone, "repro")
    assert failed.returncode != 0
    assert "1 of 8 test prompts are longer than prompt.max_tokens = 200" in failed.stdout
    assert ran(failed.stdout) == ["check", "prepare", "prompts"]
    given("red cat runs here at last")
    done = dvc(clone, "repro")
    assert done.returncode == 0, done.stdout
    assert not {"quantize", "train@17", "forget@17"} & set(ran(done.stdout)), "a new test split trains nothing"
    assert {"prompts", "infer@base", "infer-tuned@17"} <= set(ran(done.stdout))


def test_a_sealed_test_split_is_opened_once_by_a_command_that_says_what_came_before(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    refused = lora_repro("unseal", cwd=clone)
    assert refused.returncode == 1
    assert "error: evaluate.split is test, so `dvc repro` scores the test split itself" in refused.stdout

    shutil.rmtree(clone / ".mlflow")  # nobody has looked at the test split of another rank
    edit(lora={"r": 2}, evaluate={"split": "validation"})
    early = lora_repro("unseal", cwd=clone)
    assert early.returncode == 1
    assert "error: nothing is unsealed:" in early.stdout
    done = dvc(clone, "repro")
    assert done.returncode == 0, done.stdout
    (chosen,) = finished_runs(clone)
    ids = {json.loads(line)["id"] for line in paths.split("validation").read_text().splitlines()}
    answered = [path for path in paths.PREDICTIONS.glob("*.jsonl") if path.read_text()]
    assert {json.loads(line)["id"] for path in answered for line in path.read_text().splitlines()} == ids
    assert paths.published(paths.COMPARISON_MD).read_text().split("**")[1].startswith(("On the validation", "No verd"))
    assert "`lora-repro unseal` scores this experiment on the test split, once." in paths.COMPARISON_MD.read_text()
    assert "The validation split has been looked at once, by this experiment." in done.stdout
    promoted = lora_repro("promote", cwd=clone)
    assert promoted.returncode == 1
    assert "was scored on the validation split, which is for choosing" in promoted.stdout
    kept = {path: path.read_bytes() for path in (paths.PARAMS, paths.DVC_LOCK, paths.COMPARISON_MD)}

    planned = lora_repro("unseal", "--dry-run", cwd=clone)
    assert planned.returncode == 0, planned.stdout
    assert len(finished_runs(clone)) == 1
    opened = lora_repro("unseal", cwd=clone)
    assert opened.returncode == 0, opened.stdout
    assert not {"quantize", "train@17", "forget@17"} & set(ran(opened.stdout)), "training is not repeated"
    assert "infer@base" not in ran(opened.stdout), "the base answered the test split before, with another rank"
    assert "infer-tuned@17" in ran(opened.stdout)
    assert "recorded before this experiment answered the split." in opened.stdout
    assert {path: path.read_bytes() for path in kept} == kept
    (tested,) = [run for run in finished_runs(clone) if run.info.run_id != chosen.info.run_id]
    assert (tested.data.tags["split"], chosen.data.tags["split"]) == ("test", "validation")
    assert tested.data.tags["answers.digest"] == chosen.data.tags["answers.digest"]

    edit(compare={"confidence": 0.9})
    assert dvc(clone, "repro").returncode == 0
    again = lora_repro("unseal", cwd=clone)
    assert again.returncode == 1
    assert "was scored on the test split already by another rule of the decision, and once is all: run " in again.stdout
    assert len(finished_runs(clone)) == 3
