"""Git, called in one way: `run` for a command that must succeed, `ask` for a question that may have no answer.

A failure of git is no answer. A run that lost its commit because git refused to read the repository would look like
one that never had a commit.
"""

import os
import re
import subprocess
from pathlib import Path

from pipeline.core.errors import UserError

NOT_THERE = re.compile(
    "not a git repository|Needed a single revision|does not exist in|exists on disk, but not in|invalid object name"
    "|bad revision|unknown revision|[Nn]o such remote|no such commit|malformed object name"
)
"""Git's words for what is asked and is not there. A setting or a quiet question that has no answer gives no words."""


def run(*arguments: str, cwd: Path | None = None) -> str:
    """The output of `git <arguments>` in the folder `cwd`, without the line feeds at its end.

    Bytes that are not UTF-8 become what `os.fsdecode` makes of them, so that file names survive. UserError with git's
    own message where the command fails, and where git is not installed.
    """
    try:
        done = _done(arguments, cwd)
    except FileNotFoundError as error:
        raise UserError(f"`git {' '.join(arguments)}` did not start: {error}") from None
    if done.returncode:
        raise _failed(arguments, done)
    return _text(done)


def ask(*arguments: str, cwd: Path | None = None) -> str | None:
    """As `run`, but None where there is no repository upwards, no commit yet, or no such name or setting.

    UserError for every other failure: git refuses the repository because of its owner, the repository is damaged, or
    git is missing although there is a repository.
    """
    above = _repository(cwd)
    try:
        done = _done(arguments, cwd)
    except FileNotFoundError as error:
        if above is None:
            return None
        raise UserError(f"{above} is there, and git did not start ({error}): install git") from None
    if done.returncode == 0:
        return _text(done)
    if above is not None:
        _require_sound(above, cwd)
    words = done.stderr.decode("utf-8", "replace")
    if words.strip() and (not NOT_THERE.search(words) or "corrupt" in words):
        raise _failed(arguments, done)
    return None


def _done(arguments: tuple[str, ...], cwd: Path | None) -> "subprocess.CompletedProcess[bytes]":
    # In English, since `NOT_THERE` reads what it says.
    environment = os.environ | {"LC_ALL": "C", "LANGUAGE": "C"}
    return subprocess.run(["git", *arguments], cwd=cwd, env=environment, capture_output=True, check=False)


def _text(done: "subprocess.CompletedProcess[bytes]") -> str:
    return done.stdout.decode("utf-8", "surrogateescape").rstrip("\n")


def _failed(arguments: tuple[str, ...], done: "subprocess.CompletedProcess[bytes]") -> UserError:
    return UserError(f"`git {' '.join(arguments)}` failed: {done.stderr.decode('utf-8', 'replace').strip()}")


def _repository(cwd: Path | None) -> Path | None:
    """The `.git` that git would use in a folder: the next upwards on the same disk. None if there is none."""
    if given := os.environ.get("GIT_DIR"):
        return Path(given)
    folder = (cwd or Path()).resolve()
    ceilings = {Path(one) for one in os.environ.get("GIT_CEILING_DIRECTORIES", "").split(os.pathsep) if one}
    across = os.environ.get("GIT_DISCOVERY_ACROSS_FILESYSTEM", "").lower() in ("1", "true", "yes", "on")
    for one in (folder, *folder.parents):
        if one != folder and (one in ceilings or not (across or _on_one_disk(one, folder))):
            return None
        if (one / ".git").exists():
            return one / ".git"
    return None


def _on_one_disk(one: Path, other: Path) -> bool:
    try:
        return one.stat().st_dev == other.stat().st_dev
    except OSError:
        return True


def _require_sound(above: Path, cwd: Path | None) -> None:
    """UserError unless git reads the repository, and its HEAD is a commit or a branch that has none yet."""

    def require(*arguments: str) -> str:
        done = _done(arguments, cwd)
        if done.returncode == 0:
            return _text(done)
        words = done.stderr.decode("utf-8", "replace").strip() or "HEAD leads to no commit"
        remedy = "" if "safe.directory" in words else "\nMend the repository, or clone it again"
        raise UserError(f"git cannot read the repository of {above}: {words}{remedy}")

    require("rev-parse", "--git-dir")
    if _done(("cat-file", "-e", "HEAD^{commit}"), cwd).returncode == 0:
        return
    branch = require("symbolic-ref", "--quiet", "HEAD")
    place = Path(require("rev-parse", "--git-path", branch))
    if (cwd or Path()).joinpath(place).exists():
        require("rev-parse", "--verify", "HEAD^{commit}")
        raise UserError(f"git cannot read the repository of {above}: {place} leads to no commit")
    if require("for-each-ref", branch):
        require("rev-parse", "--verify", "HEAD^{commit}")
