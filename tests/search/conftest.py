"""What searches and comparisons of methods are tested with."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.kills import environment
from tests import ROOT
from tests.made.search import log, make_project


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose experiment is done and committed. Not to be changed: copy the folder that it lies in."""
    project = make_project(tmp_path_factory.mktemp("toy"))
    own = environment(project) | {"PYTHONPATH": str(ROOT), "LOG": str(log(project))}
    for command in ("dvc repro", "git add -A", "git commit -qm base"):
        done = subprocess.run(command.split(), cwd=project, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(project / ".mlflow")
    log(project).unlink()
    return project


@pytest.fixture
def project(toy: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy, tmp_path / "project", symlinks=True)
    return tmp_path / "project"
