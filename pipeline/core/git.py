"""Git, called in one way: `run` for a command that must succeed, `ask` for a question that may have no answer."""

import subprocess
from pathlib import Path

from pipeline.core.errors import UserError


def run(*arguments: str, cwd: Path | None = None) -> str:
    """The output of `git <arguments>` in the folder `cwd`, without the line feeds at its end.

    Bytes that are not UTF-8 become what `os.fsdecode` makes of them, so that file names survive. UserError with git's
    own message where the command fails, and where git is not installed.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"`git {' '.join(arguments)}` did not start: {error}") from None
    if done.returncode:
        message = done.stderr.decode("utf-8", "replace").strip()
        raise UserError(f"`git {' '.join(arguments)}` failed: {message}")
    return done.stdout.decode("utf-8", "surrogateescape").rstrip("\n")


def ask(*arguments: str, cwd: Path | None = None) -> str | None:
    """As `run`, but None where the answer is that there is none: no repository, no commit, no such name or setting.

    UserError, with git's own words, where there is a repository that git cannot read or refuses: one of another owner,
    a damaged one, or one without git to read it. To take that for none would lose the commit of a result.
    """
    try:
        return run(*arguments, cwd=cwd)
    except UserError:
        here = (cwd or Path()).resolve()
        if any((folder / ".git").exists() for folder in (here, *here.parents)):
            run("rev-parse", "--git-dir", cwd=cwd)
        return None
