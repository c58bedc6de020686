"""A project as DVC sees it: the stages of `dvc.yaml` with their matrix filled in, `dvc.lock`, and the cache.

The files are read here, not through DVC, which takes seconds and trusts what is to be checked.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from pipeline.core import params, paths, records, yaml12
from pipeline.core.errors import UserError, listing

Stages = dict[str, dict[str, Any]]
"""The entries of a `dvc.lock` by the stage's name, each with `cmd`, `deps`, `params` and `outs`."""

SPLIT = "${evaluate.split}"
"""What stands in `dvc.yaml` for the split that is scored."""

MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
"""DVC's name for a content. It becomes a path in the cache, so no other text may be taken for one."""


class _Entry(BaseModel):
    path: Annotated[str, AfterValidator(paths.relative)]
    md5: Annotated[str, Field(pattern=f"^{MD5.pattern}$")]


class _Locked(BaseModel):
    cmd: str
    deps: list[_Entry] = []
    params: dict[str, dict[str, Any]] = {}
    outs: list[_Entry] = []


class _Lock(BaseModel):
    stages: dict[str, _Locked]


@dataclass(frozen=True, slots=True)
class Out:
    """An output in `dvc.lock`; `md5` ends in `.dir` for a folder."""

    path: Path
    md5: str
    stage: str
    cached: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of `dvc.yaml` with its matrix filled in, and its entry in `dvc.lock` (None: it has never run)."""

    name: str
    command: str
    deps: list[Path]
    sections: list[str]
    outs: dict[Path, bool]
    locked: dict[str, Any] | None


@dataclass(slots=True)
class Project:
    """What all checks look at. `md5` reads each file of the working directory once."""

    params: params.Params
    stages: list[Stage]
    cache: Path
    known: dict[Path, str | None] = field(default_factory=dict)

    def outs(self) -> list[Out]:
        """The outputs in `dvc.lock` that `dvc.yaml` has as well."""
        return [
            Out(Path(out["path"]), out["md5"], stage.name, stage.outs[Path(out["path"])])
            for stage in self.stages
            for out in (stage.locked or {}).get("outs", [])
            if Path(out["path"]) in stage.outs
        ]

    def spoilt(self) -> list[Path]:
        """The outputs that are not as in `dvc.lock`. Whatever depends on them needs no remedy of its own."""
        return [out.path for out in self.outs() if self.md5(out.path) != out.md5]

    def md5(self, path: Path) -> str | None:
        """DVC's name for the content of a file or folder; None if there is none."""
        if path not in self.known:
            self.known[path] = records.dvc_md5(path)
        return self.known[path]


def read(folder: Path = Path()) -> Project:
    """The project in `folder`; UserError if one of its files is missing or wrong."""
    given = params.load(folder / paths.PARAMS)
    lock = stages_of(text(folder / paths.DVC_LOCK), str(folder / paths.DVC_LOCK))
    stages = [
        _stage(name, definition, item, lock, given)
        for name, definition in yaml12.read(folder / paths.DVC_YAML)["stages"].items()
        for item in _items(definition, given)
    ]
    return Project(given, stages, cache_folder(folder))


def missing(lock: Path) -> int:
    """How many objects of the stages in a `dvc.lock` are not in this project's cache."""
    cache = cache_folder(Path())
    outs = [out for stage in stages_of(text(lock), str(lock)).values() for out in outs_of(stage).items()]
    names = {md5 for path, md5 in outs if Path(path).is_relative_to(paths.OUT) and Path(path) != paths.RECEIPT}
    names |= {content for name in names for _, content in listing_of(cache, name)}
    return sum(not object_path(cache, name).is_file() for name in names)


def cache_folder(folder: Path) -> Path:
    """The folder of the cache of the project in `folder`; UserError if it is not in a project."""
    # In UTF-8 whatever the locale is: the path may have other characters than the locale.
    surroundings = os.environ | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:surrogateescape"}
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, check=False)
    if done.returncode:
        message = done.stderr.decode("utf-8", "replace").strip()
        raise UserError(f"`dvc cache dir` failed: {message}\nRun this in the project folder")
    return Path(os.fsdecode(done.stdout.removesuffix(b"\n")))


def text(path: Path) -> str:
    """The text of a `dvc.lock`; UserError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: restore it with `git checkout -- {path}`") from None


def stages_of(lock: str, name: str) -> Stages:
    """The stages in the text of a `dvc.lock`; `name` is the lock's name in errors.

    A stranger may have written a lock, and the files that it names are read, compared and, in the clone of a trial,
    removed. UserError for a text that DVC did not write, a path out of the project, and an md5 that is not one.
    """
    content = yaml12.load(lock, name)
    try:
        _Lock.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}"
            for one in error.errors(include_url=False)
        ]
        raise listing(problems, f"{name} is not a lock of this project: restore it with git, or remove it") from None
    stages: Stages = content["stages"]
    return stages


def params_of(locked: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a locked stage by their names in `dvc.lock`."""
    return {name: value for file in locked.get("params", {}).values() for name, value in file.items()}


def outs_of(locked: Mapping[str, Any]) -> dict[str, str]:
    """The md5 of a locked stage's outputs, by path."""
    return {out["path"]: out["md5"] for out in locked.get("outs", [])}


def deps_of(locked: Mapping[str, Any]) -> dict[str, str]:
    """The md5 of a locked stage's dependencies, by path."""
    return {dep["path"]: dep["md5"] for dep in locked.get("deps", [])}


def _items(definition: dict[str, Any], given: params.Params) -> Iterator[tuple[str, str] | None]:
    """The matrix of a stage: its only key with each value; None for a stage without a matrix."""
    if "matrix" not in definition:
        yield None
        return
    [(key, values)] = definition["matrix"].items()
    if isinstance(values, str):
        values = getattr(given, values.removeprefix("${").removesuffix("}"))
    for value in values:
        yield key, str(value)


def _stage(
    name: str, definition: dict[str, Any], item: tuple[str, str] | None, lock: dict[str, Any], given: params.Params
) -> Stage:
    values = {f"${{item.{item[0]}}}": item[1]} if item else {}
    values[SPLIT] = given.evaluate.split

    def fill(text: str) -> str:
        for mark, value in values.items():
            text = text.replace(mark, value)
        return text

    outs = {}
    for kind in ("outs", "metrics", "plots"):
        for entry in definition.get(kind, []):
            path, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            outs[Path(fill(path))] = options.get("cache", True)
    full = f"{name}@{item[1]}" if item else name
    deps = [Path(fill(dep)) for dep in definition.get("deps", [])]
    return Stage(full, fill(definition["cmd"]), deps, definition.get("params", []), outs, lock.get(full))


def object_path(cache: Path, name: str) -> Path:
    """The file in the cache that holds the content with DVC's name `name`."""
    return cache / "files" / "md5" / name[:2] / name[2:]


def listing_of(cache: Path, name: str) -> list[tuple[str, str]]:
    """Path and md5 of the files of a cached folder; none if its listing is missing or spoilt."""
    path = object_path(cache, name)
    if not name.endswith(".dir") or not path.is_file() or records.dvc_md5(path) != name.removesuffix(".dir"):
        return []
    entries = records.read_json(path)
    return [(entry["relpath"], entry["md5"]) for entry in entries if _is_sound(entry)]


def _is_sound(entry: Any) -> bool:
    """Whether an entry of a folder's listing has an md5, and a path within the folder."""
    if not isinstance(entry, Mapping) or not MD5.fullmatch(str(entry.get("md5"))):
        return False
    try:
        paths.relative(str(entry.get("relpath")))
    except ValueError:
        return False
    return True
