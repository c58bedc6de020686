"""Git is called in one way: a failure has git's own words, and a question without an answer is None."""

import os
from pathlib import Path

import pytest

from pipeline.core import git
from pipeline.core.errors import UserError
from pipeline.record import provenance


def test_a_failure_has_gits_own_words_and_a_question_has_no_answer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`git rev-parse HEAD` failed: fatal: not a git repository"):
        git.run("rev-parse", "HEAD", cwd=tmp_path)
    assert git.ask("rev-parse", "HEAD", cwd=tmp_path) is None


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    git.run("init", "--quiet", cwd=tmp_path)
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("x")
    listed = git.run("ls-files", "--others", "-z", cwd=tmp_path)
    assert listed.split("\0")[0] == name


def test_without_git_it_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="`git status` did not start"):
        git.run("status", cwd=tmp_path)
    assert git.ask("status", cwd=tmp_path) is None
    (tmp_path / ".git").mkdir()
    with pytest.raises(UserError, match="did not start"):
        git.ask("status", cwd=tmp_path)


class TestARepositoryThatGitRefuses:
    """It is not taken for none: a record would lose its commit, and `verify` would find nothing to say."""

    @pytest.fixture
    def repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
        folder = tmp_path / "repository"
        folder.mkdir()
        git.run("init", "--quiet", cwd=folder)
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text("a")
        git.run("add", "a.txt", cwd=folder)
        git.run("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "a", cwd=folder)
        return folder

    @pytest.mark.parametrize("within", ["", "sub"])
    def test_one_of_another_owner(self, within: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests
        for question in (git.ask, git.run):
            with pytest.raises(UserError, match="detected dubious ownership in repository") as refused:
                question("rev-parse", "HEAD", cwd=repository / within)
            assert "git config --global --add safe.directory" in str(refused.value)
        with pytest.raises(UserError, match="dubious ownership"):
            provenance.commit(repository)
        with pytest.raises(UserError, match="dubious ownership"):
            provenance.changes(repository)

    def test_a_damaged_one(self, repository: Path) -> None:
        (repository / ".git" / "HEAD").write_text("\0\0\0")
        with pytest.raises(UserError, match="failed: fatal"):
            git.ask("rev-parse", "HEAD", cwd=repository)

    def test_a_damaged_index_is_no_clean_state(self, repository: Path) -> None:
        (repository / ".git" / "index").write_bytes(b"DIRC" + bytes(40))
        with pytest.raises(UserError, match="`git status .* failed"):
            provenance.commit(repository)

    def test_what_is_really_not_there_is_none(self, repository: Path, tmp_path: Path) -> None:
        assert git.ask("rev-parse", "--verify", "--quiet", "no-such-branch", cwd=repository) is None
        assert git.ask("config", "no.such", cwd=repository) is None
        assert git.ask("show", "HEAD:./b.txt", cwd=repository) is None
        empty = tmp_path / "empty"
        empty.mkdir()
        assert provenance.commit(empty) == (None, False)
        git.run("init", "--quiet", cwd=empty)
        assert provenance.commit(empty) == (None, False)
