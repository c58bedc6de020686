"""`make lock`: write this folder's files again, after a change of constraints.txt or pyproject.toml.

Each file lists the packages that an installation needs beyond those of the files before it, each with its exact version
and the hashes of all files that the package index lists for it:

    build.txt    builds this project, and the two packages that are published as source only
    torch.txt    torch, which has several builds
    cuda.txt     needed by the index's build of torch for Linux, but not by a CPU build
    run.txt      everything else, on Linux and macOS, Python 3.11 to 3.13
    NAME.txt     needed by an extra of pyproject.toml as well

uv resolves for all platforms at once. Versions that constraints.txt and pyproject.toml leave open stay as they are
while they fit. This is the one time that the index is trusted: read the difference before you commit it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from lock.check import FOLDER, ROOT, pins

SOURCE_ALONE = ("antlr4-python3-runtime", "rouge-score")
"""Packages that are published without wheels. All others are installed from wheels, which run no code meanwhile."""
HEADER = "# Made by `make lock`.\n--only-binary :all:\n" + "".join(f"--no-binary {name}\n" for name in SOURCE_ALONE)
EVERYWHERE = " ; python_full_version < '3.14' and (sys_platform == 'darwin' or sys_platform == 'linux')"
"""uv's marker for all environments that pyproject.toml names."""
CUDA = re.compile(r"(cuda|nvidia)-.*|triton")
CPU_BUILDS = {
    "2.13.0": {
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b": "Python 3.11, x86_64",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7": "Python 3.11, aarch64",
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2": "Python 3.12, x86_64",
        "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604": "Python 3.12, aarch64",
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6": "Python 3.13, x86_64",
        "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d": "Python 3.13, aarch64",
    }
}
"""By torch's version: PyTorch's own builds for the CPU of Linux (version+cpu), which the package index does not list.
Other builds are refused; one that needs no libraries beyond these files can be added here."""


def main() -> None:
    """Write all files after all are resolved. Exits with a message if constraints.txt lacks a package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (build,) = project["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        for path in FOLDER.glob("*.txt"):
            shutil.copy(path, made)
        held = resolve(made / "build.txt", ["-"], set(), build)
        constrained = pins((ROOT / "constraints.txt").read_text(encoding="utf-8")).keys()
        cuda = resolve(made / "cuda.txt", ["pyproject.toml"], held | constrained)
        if unpinned := sorted(name for name in cuda if not CUDA.fullmatch(name)):
            sys.exit(f"error: constraints.txt lacks {', '.join(unpinned)}, which pyproject.toml brings: pin it there")
        held |= cuda
        held |= resolve(made / "torch.txt", ["pyproject.toml"], held | constrained - {"torch"})
        held |= resolve(made / "run.txt", ["pyproject.toml"], held)
        extras = project["project"]["optional-dependencies"]
        for extra in extras:
            resolve(made / f"{extra}.txt", ["pyproject.toml", "--extra", extra], held)
        torch = made / "torch.txt"
        torch.write_text(with_cpu_builds(torch.read_text(encoding="utf-8")), encoding="utf-8")
        for path in FOLDER.glob("*.txt"):
            path.unlink()
        for name in ("build", "torch", "cuda", "run", *extras):
            shutil.copy(made / f"{name}.txt", FOLDER)


def resolve(file: Path, sources: Iterable[str], without: set[str], given: str = "") -> set[str]:
    """Write to `file` the packages that `sources` and the text `given` need, except `without`; return their names."""
    command = [sys.executable, "-m", "uv", "pip", "compile", *sources, "--quiet", "--output-file", str(file)]
    command += ["--universal", "--python-version", "3.11", "--constraints", "constraints.txt", "--generate-hashes"]
    command += ["--only-binary", ":all:", *(word for name in SOURCE_ALONE for word in ("--no-binary", name))]
    command += [word for name in sorted(without) for word in ("--no-emit-package", name)]
    command += ["--no-annotate", "--no-header"]
    if file.stem != "build":
        command += ["--build-constraints", str(file.parent / "build.txt")]
    if subprocess.run(command, cwd=ROOT, input=given, text=True, encoding="utf-8").returncode:
        sys.exit("error: no lock was written")
    text = HEADER + file.read_text(encoding="utf-8").replace(EVERYWHERE, "")
    file.write_text(text, encoding="utf-8")
    return set(pins(text))


def with_cpu_builds(text: str) -> str:
    """torch.txt with the hashes of `CPU_BUILDS` added."""
    found = re.search(r"^torch==(\S+)(?: \\\n {4}--hash=sha256:\w+)+", text, re.MULTILINE)
    if found is None:
        return text
    builds = CPU_BUILDS.get(found[1], {})
    if not builds:
        print(f"no CPU builds of torch {found[1]} are known (lock/renew.py, CPU_BUILDS): others are refused")
        return text
    index = [line for line in found[0].split(" \\\n") if line[-64:] not in builds]
    ours = [f"    --hash=sha256:{digest}" for digest in builds]
    note = f"  # the last {len(ours)}: CPU builds, not of the index"
    return text[: found.start()] + " \\\n".join([*index, *ours]) + note + text[found.end() :]


if __name__ == "__main__":
    main()
