"""Clones of this repository with a tiny experiment, and what surrounds the programs that run in them."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import ROOT
from tests.made.data import write_data
from tests.made.parameters import tiny_params


def environment() -> dict[str, str]:
    """The tests' own environment without what DVC, MLflow and git would obey; stages write no byte-compiled files away
    from where Python puts them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org"}
    identity |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}
    return (
        kept
        | identity
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    )


def make_clone(folder: Path, data: Path, tiny_model: Path) -> None:
    """The tracked files of this repository, with tiny parameters, committed in a repository of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if not name.startswith(("reports/", "tests/", "dvc.lock")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    write_data(data)
    YAML().dump(tiny_params(tiny_model, data), folder / "params.yaml")
    for command in ("init -q", "add -A", "commit -qm start"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True, env=environment())


SECRET = "planted0secret"
SECRETS = {
    "HF_TOKEN": f"hf_{SECRET}",
    "MLFLOW_TRACKING_USERNAME": SECRET,
    "MLFLOW_TRACKING_PASSWORD": SECRET,
    "MLFLOW_TRACKING_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "PIP_INDEX_URL": f"https://me:{SECRET}@localhost:9/simple",
}
"""What a user's environment may hold, and nothing that is written or printed."""


@dataclass(frozen=True)
class Finished:
    """A clone in which `dvc repro` has run, and what that printed. Not to be changed: `copy` it."""

    folder: Path
    printed: str

    def copy(self, folder: Path) -> Path:
        """The whole project, cache and store included, in a new folder; MLflow's addresses are absolute, so moved."""
        shutil.copytree(self.folder, folder, symlinks=True)
        with closing(sqlite3.connect(folder / ".mlflow" / "mlflow.db")) as store:
            for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
                store.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(self.folder), str(folder)))
            store.commit()
        return folder


def entered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is now the working directory, with the environment that its commands get."""
    monkeypatch.chdir(folder)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return folder
