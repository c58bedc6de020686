"""Check that this folder locks everything that constraints.txt and pyproject.toml ask for. `make` does so first."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "lock"
REQUIREMENT = re.compile(r"^([\w.-]+)(?:\[.*?\])?(?:==([^\s;]+))?", re.MULTILINE)


def main() -> None:
    """Exit with a message that names every package that is missing or has another version."""
    locked: dict[str, str] = {}
    for path in FOLDER.glob("*.txt"):
        locked |= pins(path.read_text(encoding="utf-8"))
    asked = requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked |= pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    lacking = [
        f"{name}=={version}" if version else name
        for name, version in sorted(asked.items())
        if name not in locked or version not in ("", locked[name])
    ]
    if lacking:
        sys.exit(
            f"error: constraints.txt and pyproject.toml ask for {', '.join(lacking)}, and lock/ lacks them: `make lock`"
        )


def pins(text: str) -> dict[str, str]:
    """Packages, by their normalized names, and their versions in a requirements file that pins all of them."""
    return {normal(name): version for name, version in REQUIREMENT.findall(text) if version}


def requirements(project: str) -> dict[str, str]:
    """The packages that a pyproject.toml asks for, each with its version, or with an empty text."""
    content = tomllib.loads(project)
    own = content["project"]
    listed = [*content["build-system"]["requires"], *own["dependencies"]]
    for extra in own["optional-dependencies"].values():
        listed += extra
    found = [REQUIREMENT.findall(one)[0] for one in listed]
    return {normal(name): version for name, version in found if normal(name) != normal(own["name"])}


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
