"""Git is called in one way: a failure has git's own words, and a question without an answer is None."""

import os
from pathlib import Path

import pytest

from pipeline.core import git
from pipeline.core.errors import UserError


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
