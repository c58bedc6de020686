"""A clone has the bytes of the repository, on every system: DVC hashes bytes, and other ones run everything again."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.made.clone import environment


def git(*arguments: str, cwd: Path) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(), check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository as they are here, committed in a repository of their own."""
    folder = tmp_path_factory.mktemp("repository")
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in ("init -q", "add -A", "commit -qm start"):
        git(*command.split(), cwd=folder)
    return folder


@pytest.mark.parametrize(
    "settings", [["core.autocrlf=true"], ["core.autocrlf=true", "core.eol=crlf"], ["core.eol=crlf"]]
)
def test_line_ends_stay_whatever_git_is_set_to(settings: list[str], repository: Path, tmp_path: Path) -> None:
    """`core.autocrlf=true` is what Git for Windows installs, and WSL then uses."""
    options = [word for setting in settings for word in ("-c", setting)]
    git("clone", "-q", *options, str(repository), "clone", cwd=tmp_path)
    names = git("ls-files", "-z", cwd=repository).split("\0")[:-1]
    assert len(names) > 200
    changed = [name for name in names if (tmp_path / "clone" / name).read_bytes() != (repository / name).read_bytes()]
    assert changed == []
    assert git("status", "--porcelain", cwd=tmp_path / "clone") == ""


def test_what_is_no_text_is_said_to_be_none() -> None:
    """git would guess, and a picture that happens to look like text would be changed."""
    binary = [path for path in git("ls-files", cwd=ROOT).splitlines() if b"\0" in (ROOT / path).read_bytes()]
    attributes = git("check-attr", "text", "--", *binary, cwd=ROOT).splitlines()
    assert [line for line in attributes if not line.endswith(": text: unset")] == []
