"""Where a result comes from: found in every setting, and never a failure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.record import provenance


@pytest.fixture(autouse=True)
def no_git_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside a git hook, where GIT_DIR names another repository than the folder's."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "params.yaml").write_text("a: 1\n")
    (folder / "dvc.lock").write_text("old\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_versions_are_those_installed() -> None:
    versions = provenance.versions()
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert {"torch", "peft", "mlflow", "dvc"} <= set(versions)
    assert all(re.match(r"\d+\.", version) for version in versions.values())


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package-at-all"))
    assert set(provenance.versions()) == {"python", "numpy"}


def test_commit_of_a_clean_folder(repository: Path) -> None:
    assert provenance.commit(repository) == (git(repository, "rev-parse", "HEAD"), False)


def test_a_repository_that_git_refuses_is_not_recorded_as_none(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for call in (provenance.commit, provenance.changes):
        with pytest.raises(UserError, match=r"dubious ownership(?s:.*)--add safe\.directory"):
            call(repository)


@pytest.mark.parametrize("name", ["params.yaml", "new.py"])
def test_changed_or_new_inputs_are_dirty(repository: Path, name: str) -> None:
    (repository / name).write_text("a: 2\n")
    assert provenance.commit(repository)[1] is True


def test_changes_are_named_as_they_lie_in_the_project(repository: Path) -> None:
    project = repository / "a part"
    project.mkdir()
    (repository / "dvc.lock").touch()
    assert provenance.changes(repository) == []
    (project / "new file").touch()
    (repository / "params.yaml").write_text("a: 2\n")
    assert provenance.changes(repository) == ["a part/new file", "params.yaml"]
    assert provenance.changes(project) == ["new file"]


def test_results_do_not_make_a_folder_dirty(repository: Path) -> None:
    (repository / "dvc.lock").write_text("new\n")
    (repository / "reports").mkdir()
    (repository / "reports" / "metrics.json").write_text("{}\n")
    assert provenance.commit(repository)[1] is False


def test_only_the_project_counts_where_it_is_part_of_a_repository(repository: Path) -> None:
    project = repository / "inner"
    project.mkdir()
    (repository / "params.yaml").write_text("a: 2\n")
    assert provenance.commit(project)[1] is False


def test_no_commit_outside_a_repository_nor_before_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert provenance.commit(tmp_path) == (None, False)
    git(tmp_path, "init", "--quiet")
    assert provenance.commit(tmp_path) == (None, False)


def test_without_git_a_repository_is_not_taken_for_none(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / "elsewhere").mkdir()
    assert provenance.commit(tmp_path / "elsewhere") == (None, False)
    with pytest.raises(UserError, match="install git"):
        provenance.commit(repository)


def test_experiment_is_dvcs_name_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.experiment() is None
    monkeypatch.setenv("DVC_EXP_NAME", "lucid-noon")
    assert provenance.experiment() == "lucid-noon"


def test_platform_facts_name_the_machine() -> None:
    facts = provenance.platform_facts()
    assert set(facts) == {"machine", "system", "cpu", "cores"}
    assert facts["cores"] == os.cpu_count()
    assert all(facts.values())
