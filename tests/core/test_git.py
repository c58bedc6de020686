"""Git is called in one way: a failure has git's own words, and a question without an answer is None."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core import git
from pipeline.core.errors import UserError
from pipeline.record import provenance


def test_a_failure_has_gits_own_words_and_a_question_has_no_answer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`git rev-parse HEAD` failed: fatal: not a git repository"):
        git.run("rev-parse", "HEAD", cwd=tmp_path)
    assert git.ask("rev-parse", "HEAD", cwd=tmp_path) is None


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit that has one file."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "repository"
    folder.mkdir()
    git.run("init", "--quiet", "--initial-branch", "main", cwd=folder)
    (folder / "held").write_text("x")
    git.run("add", "held", cwd=folder)
    git.run("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "s", cwd=folder)
    return folder


ABSENT = [
    ("show", "HEAD:./nothing"),
    ("show", "deadbeef:./held"),
    ("rev-parse", "--verify", "--quiet", "nothing"),
    ("rev-parse", "--verify", "nothing"),
    ("rev-parse", "--verify", "--quiet", "--end-of-options", "a..b^{commit}"),
    ("config", "user.nothing"),
    ("remote", "get-url", "nothing"),
    ("branch", "-r", "--contains", "0123456789" * 4),
]


@pytest.mark.parametrize("question", ABSENT)
def test_what_is_not_there_is_no_failure(repository: Path, question: tuple[str, ...]) -> None:
    assert git.ask(*question, cwd=repository) is None
    fresh = repository / "fresh"
    fresh.mkdir()
    git.run("init", "--quiet", cwd=fresh)
    assert git.ask(*question, cwd=fresh) is None
    assert git.ask("show", "HEAD:./held", cwd=fresh) is None


def refuse(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")


def lose_commit(folder: Path, _: pytest.MonkeyPatch) -> None:
    sha = git.run("rev-parse", "HEAD", cwd=folder)
    (folder / ".git" / "objects" / sha[:2] / sha[2:]).unlink()


def break_branch(folder: Path, _: pytest.MonkeyPatch) -> None:
    (folder / ".git" / "refs" / "heads" / "main").write_text("garbage")


def empty_branch(folder: Path, _: pytest.MonkeyPatch) -> None:
    (folder / ".git" / "refs" / "heads" / "main").write_text("")


def empty_head(folder: Path, _: pytest.MonkeyPatch) -> None:
    (folder / ".git" / "HEAD").write_text("")


def break_settings(folder: Path, _: pytest.MonkeyPatch) -> None:
    (folder / ".git" / "config").write_text("[[")


def lose_git(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))


def break_link(folder: Path, _: pytest.MonkeyPatch) -> None:
    """As a worktree or submodule whose repository was moved."""
    (folder / ".git").rename(folder / "moved")
    (folder / ".git").write_text("gitdir: /nowhere")


FAULTS = [refuse, lose_commit, break_branch, empty_branch, empty_head, break_settings, lose_git, break_link]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_repository_that_git_cannot_read_is_not_taken_for_none(
    repository: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    below = repository / "deep" / "down"
    below.mkdir(parents=True)
    fault(repository, monkeypatch)
    for folder in (repository, below):
        for question in (("show", "HEAD:./nothing"), ("config", "user.nothing")):
            with pytest.raises(UserError, match="repository|install git") as caught:
                git.ask(*question, cwd=folder)
            assert ("git config --global --add safe.directory" in str(caught.value)) == (fault is refuse)


def test_a_tree_that_is_damaged_is_not_taken_for_one_without_the_file(repository: Path) -> None:
    tree = git.run("rev-parse", "HEAD:", cwd=repository)
    place = repository / ".git" / "objects" / tree[:2] / tree[2:]
    place.chmod(0o644)
    place.write_text("")
    with pytest.raises(UserError, match="corrupt"):
        git.ask("show", "HEAD:./held", cwd=repository)


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
        with pytest.raises(UserError, match="detected dubious ownership in repository") as refused:
            git.run("rev-parse", "HEAD", cwd=repository / within)
        assert "git config --global --add safe.directory" in str(refused.value)
        with pytest.raises(UserError, match="dubious ownership"):
            provenance.commit(repository)
        with pytest.raises(UserError, match="dubious ownership"):
            provenance.changes(repository)

    def test_a_damaged_index_is_no_clean_state(self, repository: Path) -> None:
        (repository / ".git" / "index").write_bytes(b"DIRC" + bytes(40))
        with pytest.raises(UserError, match="`git status .* failed"):
            provenance.commit(repository)

    def test_without_a_commit_there_is_none(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        assert provenance.commit(empty) == (None, False)
        git.run("init", "--quiet", cwd=empty)
        assert provenance.commit(empty) == (None, False)
