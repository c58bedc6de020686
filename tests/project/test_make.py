"""The Makefile's targets, with stubs in place of the programs: what is started, with what, and what is not."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

STORE = "postgresql://me:a-secret@host/runs"
LOCKS = [f"lock/{name}.txt" for name in ("build", "torch", "cuda", "run", "dev", "docs")]

BEFORE = ("lora-repro mend", "lora-repro check", "lora-repro viewer")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the Makefile and an environment that is installed, of programs that note how they were called."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "lock").mkdir()
    inputs = [tmp_path / name for name in ("pyproject.toml", "constraints.txt", *LOCKS)]
    for path in inputs:
        path.touch()
        os.utime(path, (0, 0))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, code in {
        "python": 'echo "$*" >> called; [ "$*" != "-m pip check" ] || cat lacking; [ "$*" != "$(cat failing)" ]',
        "dvc": 'echo "dvc $*" >> called',
        "mkdocs": 'echo "mkdocs $*" >> called; exit $(cat code)',
        "mlflow": 'echo "mlflow $* of $MLFLOW_BACKEND_STORE_URI" >> called',
        "lora-repro": f'echo "lora-repro $*" >> called; if [ "$*" = store ]; then echo "{STORE}"; fi; exit $(cat code)',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{code}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "code").write_text("0")
    for name in ("lacking", "failing"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "installed").touch()
    monkeypatch.setenv("MLFLOW_HOST", "0.0.0.0")
    return tmp_path


def make(here: Path, target: str) -> tuple[bool, list[str]]:
    """Whether it succeeded, and the calls it made."""
    (here / "called").write_text("")
    done = subprocess.run(["make", target], cwd=here, capture_output=True, text=True, check=False)
    assert "a-secret" not in done.stdout + done.stderr
    return done.returncode == 0, (here / "called").read_text().splitlines()


def test_the_ui_is_for_this_machine_alone(here: Path) -> None:
    """The address is no argument: those of every process can be seen by all users of a machine."""
    asked = ["lora-repro store", "lora-repro store --view"]
    assert make(here, "ui") == (True, [*asked, f"mlflow ui --host 127.0.0.1 of {STORE}"])
    (here / "code").write_text("1")
    assert make(here, "ui") == (False, ["lora-repro store"])


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_ui_of_a_server_is_its_own(here: Path, scheme: str) -> None:
    program = here / ".venv/bin/lora-repro"
    program.write_text(
        '#!/bin/sh\necho "lora-repro $*" >> called\n'
        f'[ "$*" = store ] && echo {scheme}://me:a-secret@host || echo {scheme}://host/#/experiments/1\n'
    )
    asked = ["lora-repro store", "lora-repro store --view"]
    assert make(here, "ui") == (True, asked)
    # `make test` is a make itself, and would make this one print where it is.
    command = ["make", "--no-print-directory", "ui"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout == f"runs with their scores: {scheme}://host/#/experiments/1\n"


def test_nothing_is_pushed_that_does_not_agree(here: Path) -> None:
    assert make(here, "push") == (True, ["lora-repro verify", "dvc push"])
    (here / "code").write_text("1")
    assert make(here, "push") == (False, ["lora-repro verify"])


def test_what_a_killed_dvc_left_is_mended_before_the_next(here: Path) -> None:
    assert make(here, "repro") == (True, [*BEFORE, "dvc repro", "lora-repro show"])


def test_the_site_is_built_by_what_is_pinned_and_a_warning_is_an_error(here: Path) -> None:
    built = "mkdocs build --strict"
    assert make(here, "docs") == (True, [f"{HASHED} -r lock/docs.txt", "-m pip check", built])
    (here / "code").write_text("1")
    assert make(here, "docs") == (False, [built])


def test_quick_does_what_test_does_but_for_the_slow_tests(here: Path) -> None:
    (here / ".venv" / "installed-dev").touch()
    for name in ("ruff", "mypy", "pytest"):
        (here / ".venv" / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $*" >> called\n')
        (here / ".venv" / "bin" / name).chmod(0o755)
    (succeeded, quick), (also, test) = make(here, "quick"), make(here, "test")
    assert (succeeded, also) == (True, True)
    assert quick == [*test[:-1], test[-1].replace("pytest ", "pytest -m not slow ")]
    assert quick[:3] == ["ruff check .", "ruff format --check .", "mypy "]


# What is installed

HASHED = "-m pip install --quiet --require-hashes --no-deps --no-build-isolation --use-pep517"
INSTALLED = [
    "-m lock.check",
    f"{HASHED} -r lock/build.txt",
    "-m pip download --quiet --no-deps --only-binary :all: -c constraints.txt --dest .venv/torch torch",
    f"{HASHED} --no-index --find-links .venv/torch -r lock/torch.txt",
    f"{HASHED} -r lock/run.txt",
    "-m pip install --quiet --no-deps --no-build-isolation -e .",
    "-m pip check",
    "-m pip check",
]


def test_all_that_is_installed_is_checked_and_cudas_libraries_where_torch_lacks_them(here: Path) -> None:
    (here / ".venv" / "torch").mkdir()
    (here / ".venv" / "installed").unlink()
    assert make(here, ".venv/installed-dev") == (True, [*INSTALLED, f"{HASHED} -r lock/dev.txt", "-m pip check"])
    assert not (here / ".venv" / "torch").exists()
    assert make(here, ".venv/installed-dev") == (True, [])
    (here / ".venv" / "torch").mkdir()
    (here / ".venv" / "installed").unlink()
    (here / "lacking").write_text("torch 2.13.0 requires triton, which is not installed.\n")
    cuda = f"{HASHED} -r lock/cuda.txt"
    assert make(here, ".venv/installed") == (True, [*INSTALLED[:-1], cuda, INSTALLED[-1]])


@pytest.mark.parametrize("failing", dict.fromkeys(INSTALLED))
def test_an_environment_is_not_taken_for_installed_that_is_not(here: Path, failing: str) -> None:
    (here / ".venv" / "torch").mkdir()
    (here / ".venv" / "installed").unlink()
    (here / "failing").write_text(failing)
    assert make(here, ".venv/installed") == (False, INSTALLED[: len(INSTALLED) - INSTALLED[::-1].index(failing)])
