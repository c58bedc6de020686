"""What is installed: the bytes that lock/ names and no other, whatever an index or a mirror hands over."""

import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pip
import pytest

from lock import check, renew
from tests import ROOT

FILES = sorted(check.FOLDER.glob("*.txt"))
ENTRY = re.compile(
    r"([a-z0-9-]+)==[\w.]+( ; [^\\]+)?(?P<hashes>( \\\n {4}--hash=sha256:[0-9a-f]{64})+)(  # the last \d: CPU .*)?\n"
)


def entries(file: Path) -> dict[str, str]:
    """The hashes of each package; AssertionError for anything in the file that is neither that nor what heads all."""
    text = file.read_text()
    assert text.startswith(renew.HEADER)
    found, end = {}, len(renew.HEADER)
    for entry in ENTRY.finditer(text):
        assert entry.start() == end, text[end : entry.end()]
        found[entry[1]], end = entry["hashes"], entry.end()
    assert end == len(text), text[end:]
    return found


def test_every_package_has_a_version_and_hashes_and_no_file_names_an_index() -> None:
    locked = {file.stem: entries(file) for file in FILES}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(locked) == {"build", "torch", "cuda", "run", *extras}
    assert set(locked["build"]) == {"setuptools"}
    assert set(locked["torch"]) == {"torch"}
    assert all(renew.CUDA.fullmatch(name) for name in locked["cuda"])
    for name, held in locked.items():  # what is installed first is not named again, where it might differ
        for first in ("build", "torch", "cuda", "run"):
            assert name == first or not held.keys() & locked[first].keys()
    for builds in renew.CPU_BUILDS.values():
        assert all(digest in locked["torch"]["torch"] for digest in builds)


def test_the_lock_has_what_constraints_and_extras_pin_and_one_version_of_each() -> None:
    check.main()
    versions: dict[str, set[str]] = {}
    for file in FILES:
        for name, version in check.pins(file.read_text()).items():
            versions.setdefault(name, set()).add(version)
    assert [name for name, found in versions.items() if len(found) > 1] == []


@pytest.mark.parametrize(
    ("file", "before", "after", "told"),
    [
        ("constraints.txt", "numpy==", "numpy==0", r"numpy==02[\d.]+"),
        ("constraints.txt", "zipp==", "unheard.of==1\nzipp==", r"unheard-of==1"),
        ("pyproject.toml", '"mypy==', '"mypy==0', r"mypy==02[\d.]+"),
        ("pyproject.toml", '"numpy",', '"numpy", "unheard_of[all]>=2",', "unheard-of"),
        ("pyproject.toml", '"setuptools==', '"setuptools==0', r"setuptools==0[\d.]+"),
    ],
)
def test_a_version_that_is_changed_elsewhere_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, before: str, after: str, told: str
) -> None:
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(before) == 1
    (tmp_path / file).write_text(text.replace(before, after))
    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=f"ask for {told}, and lock/ lacks them: `make lock`"):
        check.main()


def test_cpu_builds_of_torch_are_allowed_once_and_of_this_version_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = (check.FOLDER / "torch.txt").read_text()
    assert renew.with_cpu_builds(re.sub("  # the last.*", "", text)) == text
    other = text.replace("torch==2.13.0", "torch==9.0")
    assert renew.with_cpu_builds(other) == other
    assert "no CPU builds of torch 9.0 are known" in capsys.readouterr().out


# An index that hands over something else

TOUCH = "import pathlib; pathlib.Path({!r}).touch()\n"


def wheel(folder: Path, name: str, content: str) -> str:
    """A package of one module; the wheel's sha256."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    written = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(written, "w") as archive:
        for path, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(path, text)
    return hashlib.sha256(written.read_bytes()).hexdigest()


def source(folder: Path, name: str, setup: str) -> str:
    """A package that is built by running `setup`; the archive's sha256."""
    written = folder / f"{name}-1.0.tar.gz"
    with tarfile.open(written, "w:gz") as archive:
        for path, text in {"setup.py": setup, "PKG-INFO": f"Name: {name}\nVersion: 1.0\n"}.items():
            entry = tarfile.TarInfo(f"{name}-1.0/{path}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.sha256(written.read_bytes()).hexdigest()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Makefile, with an environment that has pip alone, and an index of three packages, one for each file."""
    folder = tmp_path / "project"
    (folder / "lock").mkdir(parents=True)
    for name in ("Makefile", "lock/__init__.py", "lock/check.py"):
        shutil.copy(ROOT / name, folder / name)
    listed = {"build": "planted_build", "torch": "torch", "run": "planted_run"}
    index = tmp_path / "index"
    index.mkdir()
    for file, name in listed.items():
        lock(folder, file, name, wheel(index, name, ""))
    (folder / "lock" / "cuda.txt").touch()
    (folder / "constraints.txt").write_text("torch==1.0\nplanted_run==1.0\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["planted_build==1.0"]\n[project]\nname = "planted"\ndependencies = []\n'
        "[project.optional-dependencies]\n"
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "pip").symlink_to(Path(pip.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(programs))
    for name in ("PIP_CONSTRAINT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return folder


def lock(project: Path, file: str, name: str, digest: str) -> None:
    (project / "lock" / f"{file}.txt").write_text(f"{renew.HEADER}{name}==1.0 \\\n    --hash=sha256:{digest}\n")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["build", "torch", "run"])
def test_other_bytes_of_a_pinned_version_are_not_installed(project: Path, file: str) -> None:
    name = "torch" if file == "torch" else f"planted_{file}"
    wheel(project.parent / "index", name, "import os\n")
    said = refused(project)
    assert "DO NOT MATCH THE HASHES" in said
    order = ["planted_build", "torch", "planted_run"]
    assert installed(project) == set(order[: order.index(name)])


@pytest.mark.slow
def test_what_has_no_hash_is_not_installed(project: Path) -> None:
    (project / "lock" / "run.txt").write_text(f"{renew.HEADER}planted_run==1.0\n")
    assert "Hashes are required in --require-hashes mode" in refused(project)
    assert installed(project) == {"planted_build", "torch"}


@pytest.mark.slow
@pytest.mark.parametrize("is_listed", [True, False])
def test_no_source_is_built_in_place_of_a_wheel(project: Path, tmp_path: Path, is_listed: bool) -> None:
    index = tmp_path / "index"
    (index / "planted_run-1.0-py3-none-any.whl").unlink()
    digest = source(index, "planted_run", TOUCH.format(str(tmp_path / "ran")))
    if is_listed:
        lock(project, "run", "planted_run", digest)
    assert "No matching distribution found for planted_run==1.0" in refused(project)
    assert installed(project) == {"planted_build", "torch"}
    assert not (tmp_path / "ran").exists()


def refused(project: Path) -> str:
    """What is said when `make` does not install."""
    done = subprocess.run(["make", ".venv/installed"], cwd=project, capture_output=True, text=True)
    assert done.returncode != 0
    assert not (project / ".venv" / "installed").exists()
    return done.stdout + done.stderr


def installed(project: Path) -> set[str]:
    return {path.stem for path in project.glob(".venv/lib/*/site-packages/*.py")}
