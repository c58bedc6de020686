"""Around a stage: alone, without leftovers of the dead, with checkpoints that do not pile up."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from pipeline.commands import mend
from pipeline.core import params, paths, stage
from pipeline.core.errors import UserError
from pipeline.model import processes, resume
from tests import ROOT

HOLD = (
    "import sys; from pipeline.core.stage import alone\n"
    "with alone('train@17'): print('held', flush=True); sys.stdin.read()"
)


def test_a_stage_that_still_runs_refuses_the_next_with_its_pid(
    project: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project
    called: list[params.Declared] = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(SystemExit, match="1"):
            stage.run("train", called.append, seed=17)
        said = capsys.readouterr().err
        assert f"train@17 is being computed by another process, pid {other.pid}, " in said
        assert f"`kill {other.pid}`" in said
        stage.run("prepare", called.append)  # another stage may run; only its name is its own
        other.kill()
    stage.run("train", called.append, seed=17)  # the lock and the number that a dead process left refuse nobody
    assert len(called) == 2
    assert not list(paths.SCRATCH.glob("*.pid"))


def test_an_interrupted_stage_says_so(
    project: params.Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project
    monkeypatch.setattr(sys, "argv", ["prepare.py"])

    def interrupted(_: params.Declared) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        stage.run("prepare", interrupted)
    assert "interrupted" in capsys.readouterr().err


def test_half_written_files_of_dead_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    paths.PREDICTIONS.mkdir(parents=True)
    dead, alive = (paths.PREDICTIONS / f".base.jsonl.{pid}.part" for pid in (ended.pid, os.getpid()))
    for path in (dead, alive, paths.PREDICTIONS / "base.jsonl"):
        path.touch()
    stage.remove_leftovers()
    assert sorted(path.name for path in paths.PREDICTIONS.iterdir()) == [alive.name, "base.jsonl"]


def test_what_another_stage_removes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [resume.key("train-17", number) for number in range(2)]
    for name in names:
        (paths.SCRATCH / name).mkdir(parents=True)
        (paths.SCRATCH / name / ".state.pt.1.part").touch()

    def removed(_: int) -> bool:
        shutil.rmtree(paths.SCRATCH, ignore_errors=True)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(psutil, "pid_exists", removed)
        stage.remove_leftovers()
    assert not paths.SCRATCH.exists()
    monkeypatch.setattr(Path, "iterdir", lambda folder: (folder / name for name in names))
    with resume.folder("train-17", 2):
        pass


def test_checkpoints_of_other_parameters_stay_up_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupted(number: int) -> None:
        with pytest.raises(ZeroDivisionError), resume.folder("train-17", number) as scratch:
            os.utime(scratch, (number, number))
            raise ZeroDivisionError

    for number in range(resume.KEPT + 3):
        interrupted(number)
    kept = {path.name for path in paths.SCRATCH.iterdir() if path.is_dir()}
    assert kept == {resume.key("train-17", number) for number in range(2, resume.KEPT + 3)}
    assert capsys.readouterr().out.count("removing the checkpoint") == 2
    with resume.folder("train-17", 3):
        pass
    kept.remove(resume.key("train-17", 3))
    assert {path.name for path in paths.SCRATCH.iterdir() if path.is_dir()} == kept


def test_a_member_that_comes_first_has_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of its own it may be the only one that makes `.scratch` at all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    with resume.folder("train-17", 1) as scratch:
        assert scratch.is_dir()


def test_other_versions_than_those_that_the_results_are_locked_with_do_not_compute(
    project: params.Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    text = (ROOT / "constraints.txt").read_text()
    assert [name for name in stage.COMPUTING if f"\n{name}==" not in text] == []
    called: list[params.Declared] = []
    paths.CONSTRAINTS.write_text(text.replace("torch==", "torch==1.").replace("\nrich==", "\nrich==1."))
    with pytest.raises(SystemExit, match="1"):
        stage.run("prepare", called.append)
    told = capsys.readouterr().err
    here = version("torch").partition("+")[0]
    assert f"  - torch 1.{here}, and {here} is installed" in told
    assert "rich" not in told  # it moves no number
    assert called == []
    paths.CONSTRAINTS.write_text(text)
    monkeypatch.setattr(stage, "version", lambda name: version(name).partition("+")[0] + "+cu130")
    stage.run("prepare", called.append)
    assert len(called) == 1


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, in the place of the one whose code checkpoints belong to."""
    shutil.copytree(resume.HOME, tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(resume, "HOME", tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("edited", ["core/records.py", "model/loss.py", "lora/train.py"])
def test_a_checkpoint_does_not_survive_an_edit_of_its_stages_code(edited: str, package: Path) -> None:
    before = resume.key("train-17", {})
    (package / edited).write_text((package / edited).read_text() + "# edited\n")
    assert resume.key("train-17", {}) != before


@pytest.mark.parametrize(
    "edited", ["report/page.py", "report/templates/page.css", "score/metrics.py", "model/.DS_Store", "model/loss.py~"]
)
def test_a_checkpoint_survives_an_edit_of_other_code_and_what_editors_leave(edited: str, package: Path) -> None:
    before = resume.key("train-17", {})
    with (package / edited).open("a") as file:
        file.write("edited")
    assert resume.key("train-17", {}) == before


def test_a_checkpoint_belongs_to_the_versions_that_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resume.key("train", {})
    monkeypatch.setattr(resume, "version", lambda _: "0")
    assert resume.key("train", {}) != before


LOCK = """\
schema: '2.0'
stages:
  prepare:
    cmd: a
    outs:
    - path: out
      md5: aaaa
  train:
    cmd: b
"""
TORN_AT = [0, 5, 30, LOCK.index("cmd") + 3, LOCK.index("outs") + 5, LOCK.index("md5") + 2]


@pytest.fixture
def dvc_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / ".dvc" / "tmp" / "rwlock").write_text('{"read": {}}')
    paths.DVC_LOCK.write_text(LOCK)
    return tmp_path / ".dvc" / "tmp" / "rwlock"


def test_what_is_whole_is_left_alone(dvc_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mend.remove_half_written()
    assert dvc_project.exists()
    assert paths.DVC_LOCK.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("length", TORN_AT)
def test_a_torn_lock_file_is_removed(dvc_project: Path, length: int, capsys: pytest.CaptureFixture[str]) -> None:
    paths.DVC_LOCK.write_text(LOCK[:length])
    dvc_project.write_text("")
    mend.remove_half_written()
    assert not paths.DVC_LOCK.exists()
    assert not dvc_project.exists()
    assert capsys.readouterr().out.count("removed") == 2


def test_nothing_is_mended_while_dvc_works(dvc_project: Path) -> None:
    from dvc.lock import make_lock

    dvc_project.write_text("")
    with make_lock(str(dvc_project.with_name("rwlock.lock"))), pytest.raises(UserError, match="DVC is running"):
        mend.remove_half_written()
    assert dvc_project.exists()


LOOK = """
import sys
from pipeline.core import stage
stage.set_environment()
import transformers
from bitsandbytes.backends.mps import ops
from transformers.integrations import hub_kernels
from transformers.utils import import_utils
ops._kernel_load_failed = False  # as on macOS 26
print(ops._get_kernel(), import_utils.is_kernels_available(), hub_kernels._kernels_enabled)
try:
    import kernels
except ImportError:
    print("not found")
"""


@pytest.mark.slow
def test_programs_of_a_model_hub_are_not_looked_for(tmp_path: Path) -> None:
    """With the package `kernels` installed, by which libraries run what the hub holds at the time."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("open('ran', 'w')\ndef get_kernel(*_, **__): return 'a program'\n")
    installed = tmp_path / "kernels-0.99.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99\n")
    given = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "USE_HUB_KERNELS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LOOK]
    said = subprocess.run(command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, check=True)
    assert said.stdout == "None False False\nnot found\n"
    assert not (tmp_path / "ran").exists()


def test_a_panic_of_a_library_is_one_error(
    project: params.Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project
    monkeypatch.setattr(sys, "argv", ["prepare.py"])

    class PanicException(BaseException):
        """As tokenizers raises it."""

    def panic(_: params.Declared) -> None:
        raise PanicException("index out of bounds")

    with pytest.raises(SystemExit, match="1"):
        stage.run("prepare", panic)
    assert "error: a library broke off (PanicException: index out of bounds)" in capsys.readouterr().err
