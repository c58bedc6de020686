"""A sweep: mistakes before anything is queued, the truth at the end, one whole run for each experiment."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from bench import kills, parallel
from pipeline.core.errors import UserError
from pipeline.search import grid
from tests import ROOT


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return tmp_path


@pytest.mark.usefixtures("here")
def test_every_combination_is_made_and_checked() -> None:
    made = grid.expand(["lora.r=4,8", "train.learning_rate=1e-4,1e-3"])
    assert [str(one) for one in made] == [
        "lora.r=4 train.learning_rate=0.0001",
        "lora.r=4 train.learning_rate=0.001",
        "lora.r=8 train.learning_rate=0.0001",
        "lora.r=8 train.learning_rate=0.001",
    ]
    grid.check(made)


@pytest.mark.usefixtures("here")
def test_all_mistakes_are_found_before_anything_is_queued() -> None:
    with pytest.raises(UserError) as caught:
        grid.check(grid.expand(["lora.rank=4,8"]))
    assert "nothing was queued" in str(caught.value)
    assert "rank" in str(caught.value)
    with pytest.raises(UserError) as caught:
        grid.check(grid.expand(["lora.r=4,0,many"]))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  - lora.r = 0",
        "  - lora.r = 'many'",
    ]
    with pytest.raises(UserError, match="-S lora.r=4,8"):
        grid.expand([])
    with pytest.raises(UserError, match="-S takes"):
        grid.expand(["lora.r 4"])


def test_tools_that_are_missing_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(UserError, match="`dvc` is not on the PATH"):
        patch.setenv("PATH", "/nowhere")
        grid.sweep(["lora.r=4,8"], 1)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    subprocess.run(["git", "init", "-q"], check=True)
    for name in ("NAME", "EMAIL"):
        monkeypatch.delenv(f"GIT_COMMITTER_{name}", raising=False)
    with pytest.raises(UserError, match=r"git has no user.name"):
        grid.sweep(["lora.r=4,8"], 1)
    for name in ("NAME", "EMAIL"):
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", "a@example.org")
    with pytest.raises(UserError, match="there is no commit"):
        grid.sweep(["lora.r=4,8"], 1)


def test_what_dvc_prints_in_another_encoding_is_still_its_message(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC prints in the user's locale, such as ISO-8859-1."""
    programs = here / "programs"
    programs.mkdir()
    dvc = programs / "dvc"
    dvc.write_text("#!/bin/sh\nprintf 'ERROR: caf\\351 is locked\\n'\nexit 1\n")
    dvc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match="dvc could not queue: ERROR: caf\ufffd is locked"):
        list(grid._queue([], ["lora.r=4"]))
    assert grid._dvc("queue", "status") == "ERROR: caf\ufffd is locked\n"


@pytest.mark.slow
def test_two_workers_on_a_fresh_store_and_one_failure(tmp_path: Path) -> None:
    project = tmp_path / "project"
    parallel.make_project(project)
    done = parallel.sweep(project, 2, f"lora.r=4,{parallel.FAILING_RANK},6")
    assert done.returncode == 1, done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("1 of 3 experiments failed: ")
    name = last.rpartition(" ")[2]
    assert f"{name} (lora.r={parallel.FAILING_RANK}): failed" in done.stdout
    assert "rank 5 is planted to fail" in done.stdout
    assert "0/3 " in done.stdout  # begun while none had ended: seen as it happens
    assert 'Traceback (most recent call last):\n  File "<string>"' not in done.stdout
    assert parallel.runs(project) == {rank: ["FINISHED"] for rank in ("4", "6")}
    assert done.stdout.count("Running stage 'infer@base'") == 1  # before the workers, and by none of them
    queued = re.findall(r"^queued (\S+):", done.stdout, re.M)
    assert len(queued) == 3
    logs = [kills.run(project, "queue", "logs", one).stdout for one in queued]
    assert all("Running stage 'train@17'" in log and "Running stage 'infer@base'" not in log for log in logs)


def test_of_two_repros_at_once_the_second_is_refused(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    wait = "while not os.path.exists('go'): time.sleep(0.05)"
    code = ["import os, time", "open('begun', 'w')", wait, "open('out', 'w')"]
    (project / "wait.py").write_text("\n".join(code))
    (project / "dvc.yaml").write_text("stages:\n  wait:\n    cmd: python wait.py\n    outs: [out]\n")
    for command in ("git init -q", "dvc init -q"):
        subprocess.run(command.split(), cwd=project, check=True, env=kills.environment(project))
    first = kills.start(project, "repro")
    deadline = time.monotonic() + 60
    while not (project / "begun").exists():
        assert time.monotonic() < deadline
    second = kills.run(project, "repro")
    assert second.returncode != 0
    assert "busy" in second.stdout, second.stdout
    assert f"(PID {first.pid}): " in second.stdout
    (project / "go").touch()
    assert first.communicate()[0].count("Running stage") == 1
    assert first.returncode == 0
