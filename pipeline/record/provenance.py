"""Where a result comes from: commit, experiment, versions of packages, machine. No result depends on them."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.core import git

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "datasets",
    "rouge-score",
    "sacrebleu",
    "py3langid",
    "scipy",
    "numpy",
    "mlflow",
    "dvc",
)

RESULTS = ("dvc.lock", "reports")
"""What `dvc repro` itself writes into the git repository. A change there is not a change of the inputs."""


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def is_commit(text: str) -> bool:
    """Whether a text is the whole name of a commit, in SHA-1 or SHA-256. Of a stranger's texts, git gets only these."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def commit(folder: Path) -> tuple[str | None, bool]:
    """The commit checked out at `folder`, and whether `folder` differs from it, apart from `RESULTS`.

    `(None, False)` outside a git repository and before its first commit. UserError where git cannot read it.
    """
    sha = git.ask("rev-parse", "--verify", "HEAD", cwd=folder)
    if sha is None:
        return None, False
    excluded = [f":(exclude){name}" for name in RESULTS]
    status = git.run("status", "--porcelain", "--", ".", *excluded, cwd=folder)
    return sha, status != ""


def changes(folder: Path) -> list[str]:
    """The files of `folder` that differ from its commit, apart from `RESULTS`, as paths relative to it."""
    excluded = [f":(exclude){name}" for name in RESULTS]
    listing = ("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", ".", *excluded)
    prefix = git.ask("rev-parse", "--show-prefix", cwd=folder)
    if prefix is None:
        return []
    return sorted(entry[3:].removeprefix(prefix) for entry in git.run(*listing, cwd=folder).split("\0") if entry)


def experiment() -> str | None:
    """The name of the DVC experiment that runs this process; None under plain `dvc repro`."""
    return os.environ.get("DVC_EXP_NAME") or None


def platform_facts() -> dict[str, str | int]:
    """The machine: processor architecture, operating system, CPU model and number of cores."""
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or "unknown"


def _output(*command: str) -> str | None:
    """What a command printed; None when it failed or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip("\n")
