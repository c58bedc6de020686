"""The text of a source, taken apart: a file in a wheel, a repository of the hub at a commit, or a local path."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pipeline.core import paths, records
from pipeline.core.errors import UserError

FORMS = "pip:<package>==<version>/<path in wheel>, hf:<owner>/<repo>@<40-digit revision>[/<path>], or a local path"

_WHEEL = re.compile(r"pip:([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?)==([a-z0-9.!+_-]+)/(.+)", re.IGNORECASE | re.ASCII)
_REPO = re.compile(r"hf:([\w.-]+/[\w.-]+)@([^/]*)(?:/(.+))?", re.ASCII)


@dataclass(frozen=True)
class Wheel:
    package: str
    version: Version
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Repo:
    id: str
    revision: str
    path: str | None


def parse(source: str, key: str) -> Wheel | Repo | Path:
    """What a source names. A relative path is one of this folder, else of the project that a temporary copy is of.

    UserError, naming `key`.source, for a text that has none of the `FORMS`.
    """
    at = f"{key}.source = '{source}'"
    if source.startswith("pip:"):
        if not (match := _WHEEL.fullmatch(source)):
            raise UserError(f"{at}: write pip:<package>==<version>/<path in wheel>, with one exact version")
        try:
            version = Version(match[2])
        except InvalidVersion:
            raise UserError(f"{at}: '{match[2]}' is not a version of a package") from None
        return Wheel(canonicalize_name(match[1]), version, _relative(match[3], at))
    if source.startswith("hf:"):
        if not (match := _REPO.fullmatch(source)):
            raise UserError(f"{at}: write hf:<owner>/<repo>@<revision>[/<path>], the revision as 40 hex digits")
        if not re.fullmatch(r"[0-9a-f]{40}", match[2]):
            raise UserError(
                f"{at}: revision '{match[2]}' is not a commit's 40 hex digits; a branch or tag can move, and the same "
                "params would then name other content. The repository's history shows the commits"
            )
        return Repo(match[1], match[2], match[3] and _relative(match[3], at))
    if not source.strip():
        raise UserError(f"{key}.source is empty; a source is {FORMS}")
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~somebody, who is not a user of this machine
        raise UserError(f"{at}: {error}") from None
    # An experiment in a copy has the files of git alone, in its own state. The others are where it came from.
    elsewhere = paths.main_repository() / path
    return elsewhere if not path.exists() and elsewhere.exists() else path


def pinned(source: str, sha256: str | None, key: str) -> Wheel | Repo | Path:
    """As `parse`. Where a temporary copy and its project both have a local source: the one with the pinned content.

    Git may have a part of a folder, which is then in the copy without the rest. If neither has the content, the
    copy's path is absolute, so that a message says which of them it is about.
    """
    where = parse(source, key)
    main = paths.main_repository()
    if not isinstance(where, Path) or where.is_absolute() or sha256 is None or main == Path.cwd().resolve():
        return where
    places = [place for place in (Path.cwd() / where, main / where) if place.exists()]
    return next((place for place in places if digest(place, key, source) == sha256), Path.cwd() / where)


def looked_in(path: Path) -> str:
    """Where a path that does not exist was looked for, as messages say it; empty for an absolute one."""
    if path.is_absolute():
        return ""
    here, main = Path.cwd().resolve(), paths.main_repository()
    return f" in {here}" + (f" or in {main}, which this is a copy of" if main != here else "")


def _relative(path: str, at: str) -> str:
    parts = path.rstrip("/").split("/")
    if "" in parts or "." in parts or ".." in parts:
        raise UserError(f"{at}: the path '{path}' must lead down from the top, without '', '.' or '..' as a part")
    return "/".join(parts)


def name(where: Wheel | Repo | Path) -> str:
    """The name of the package, the repository, or the local file or folder."""
    match where:
        case Wheel():
            return where.package
        case Repo():
            return where.id.rpartition("/")[2]
        case Path():  # "." and ".." are not names
            return where.name if where.name not in ("", "..") else where.resolve().name


def last(where: Repo | Path) -> str:
    """The name of the file or folder that a source leads to."""
    return where.path.rpartition("/")[2] if isinstance(where, Repo) and where.path else name(where)


def digest(path: Path, key: str, source: str) -> str:
    """The content's digest, as `records.sha256_path` computes it; UserError if it cannot be read."""
    try:
        return records.sha256_path(path)
    except OSError as error:
        raise UserError(f"{key}.source = '{source}' cannot be read ({error}): make it readable") from None


def mismatch(key: str, expected: str, actual: str, holder: str) -> UserError:
    """The error for content that is not the pinned one."""
    return UserError(
        f"{key}.sha256 = '{expected}': the content of {holder} is {actual}. "
        f"If the change is meant, set {key}.sha256 to it; else restore the content, or correct {key}.source"
    )


def missing(path: str, names: Iterable[str], key: str, holder: str) -> UserError:
    """The error for a path that is not in a wheel or repository; it names paths that are close."""
    names = sorted(names)
    known = sorted({str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}) + names
    same_name = [name for name in known if PurePosixPath(name).name == PurePosixPath(path).name]
    close = list(dict.fromkeys([*same_name, *difflib.get_close_matches(path, known, n=5)]))
    hint = f"did you mean {', '.join(close[:5])}?" if close else f"it has {', '.join(known[:10]) or 'no files'}"
    return UserError(f"{key}.source: {holder} holds no '{path}'; {hint}")
