"""Where data and models come from: one string, pinned by content, resolved to a local path.

    pip:aclsum==0.1.2/aclsum/dataset          a file or folder inside a published wheel; sha256 is the wheel's
    hf:<owner>/<repo>@<40 hex digits>[/path]  a Hugging Face repository at a commit; sha256 may be null
    ~/data/reviews                            a local file or folder; sha256 as of `records.sha256_path`

Wheels are downloaded with the user's own pip, so that its configuration holds, and are only ever read, never
installed. They are kept in a cache that all clones share, and hashed again at every use. Hub files lie in the hub's
own cache. Several sources are told apart by the names of package, repository, file or folder.

What is read is what was hashed. Wheels and data are read from private copies, which are hashed themselves. The weights
of a model are too large to copy: a model is read through a folder of links to the very files that were hashed, and is
refused where one of them has changed by the time that it is loaded. Links in a local folder may lead to files within
it; those that lead out of it are refused, since what they lead to is not the source's.
"""

import difflib
import glob
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Literal
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

from filelock import FileLock, Timeout
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from pipeline.core import records
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import SECONDS_BETWEEN_LINES, say

FORMS = "pip:<package>==<version>/<path in wheel>, hf:<owner>/<repo>@<40-digit revision>[/<path>], or a local path"
# A checkpoint in the Hugging Face layout, without the copies in other formats that many repositories hold beside it.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")

MOST_FILES = 100_000
"""In one wheel. No index of files is searched, and no folder is filled, without end."""
MOST_GROWTH = 100
"""How many times its own size a wheel may unpack to. Text packs to a fifth or a tenth, and a table that repeats itself
to a fiftieth; a file that was made to fill the disk packs to a thousandth."""
ALWAYS_FITS = 2**26
"""Bytes that any wheel may unpack to, however small it is: a short table that repeats itself may pack to nothing."""

_WHEEL = re.compile(r"pip:([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?)==([a-z0-9.!+_-]+)/(.+)", re.IGNORECASE | re.ASCII)
_REPO = re.compile(r"hf:([\w.-]+/[\w.-]+)@([^/]*)(?:/(.+))?", re.ASCII)


@dataclass(frozen=True)
class _Wheel:
    package: str
    version: Version
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class _Repo:
    id: str
    revision: str
    path: str | None


def check(source: str, sha256: str | None, key: str) -> None:
    """Find what is wrong with a source before anything is downloaded: its form, a missing local path, a missing pin.

    `key` is the params section that the error names: "data" or "model".
    """
    where = _parse(source, key)
    if isinstance(where, Path):
        if not where.exists():
            raise UserError(f"{key}.source = '{source}': no such file or folder here; a source is {FORMS}")
        if sha256 is None:
            _local(where, source, key)
            raise UserError(
                f"{key}.sha256 is null: pin the content of {source} with sha256: {_digest(where, key, source)}"
            )


@contextmanager
def resolved(source: str, sha256: str | None, *, kind: Literal["model", "dataset"], key: str) -> Iterator[Path]:
    """Yield the local file or folder that `source` names, its content verified; it is gone after the block.

    Downloads what is not here yet. Of a hub repository without a path, a model is given its safetensors, configuration
    and tokenizer files at the top level, a dataset everything. UserError says what is wrong with `key`.source or
    `key`.sha256, or what the download needs; after the block, that a model has changed while it was read: what was made
    of it must not be kept, and must not be read from its files any more.
    """
    check(source, sha256, key)
    where = _parse(source, key)
    with TemporaryDirectory(prefix="lora-repro-") as name:
        scratch = Path(name)
        if isinstance(where, _Wheel):
            yield _extract(_pinned_wheel(where, sha256, key, scratch), where, scratch / "content", key)
            return
        found = _from_hub(where, kind, key) if isinstance(where, _Repo) else _local(where, source, key)
        place = scratch / _last(where)
        if kind == "dataset":
            _copy_all(found, place, key)
        else:
            _link_all(found, place)
        before = _states(found, place)
        if sha256 is not None:
            if (actual := _digest(place, key, source)) != sha256:
                raise _mismatch(key, sha256, actual, source)
        else:  # which `check` allows for the hub alone
            _require_announced(found, place, key, source)
        yield place
        if changed := [name for name, state in _states(found, place).items() if state != before[name]]:
            file = found[changed[0]]
            raise UserError(
                f"{key}.source = '{source}': {file} has changed while it was read: see what writes to it, and run again"
            )


@contextmanager
def wheel(source: str, sha256: str | None, *, key: str) -> Iterator[ZipFile]:
    """Yield the whole wheel of a `pip:` source, opened, its content verified; UserError as of `resolved`."""
    where = _parse(source, key)
    assert isinstance(where, _Wheel)
    with TemporaryDirectory(prefix="lora-repro-") as scratch:
        copy = _pinned_wheel(where, sha256, key, Path(scratch))
        with _sound(where, key), ZipFile(copy) as archive:
            yield archive


@contextmanager
def mounted(
    pinned: Sequence[tuple[str, str | None]], *, kind: Literal["model", "dataset"], key: str
) -> Iterator[dict[str, Path]]:
    """Yield the local path of each source by its name: of the package, the repository, the local file or folder.

    `pinned`: sources with their digests. UserError for names that repeat, and one for all that `resolved` finds wrong.
    """
    names = [_name(_parse(source, key)) for source, _ in pinned]
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(
            f"{key}.source: several sources are named {', '.join(repeated)}, and their files could not be told apart: "
            "rename a local folder, or name one source that holds them all"
        )
    problems, found = [], {}
    with ExitStack() as stack:
        for name, (source, sha256) in zip(names, pinned, strict=True):
            try:
                found[name] = stack.enter_context(resolved(source, sha256, kind=kind, key=key))
            except UserError as error:
                problems.append(str(error))
        if problems:
            headline = f"{key}.source: {len(problems)} of {len(pinned)} sources cannot be used"
            raise UserError(problems[0]) if len(problems) == 1 else listing(problems, headline)
        yield found


def cache() -> Path:
    """The folder of downloaded wheels: `$LORA_REPRO_CACHE`, or `lora-repro` in the platform's cache folder."""
    if own := os.environ.get("LORA_REPRO_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lora-repro"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-repro"


def _parse(source: str, key: str) -> _Wheel | _Repo | Path:
    at = f"{key}.source = '{source}'"
    if source.startswith("pip:"):
        if not (match := _WHEEL.fullmatch(source)):
            raise UserError(f"{at}: write pip:<package>==<version>/<path in wheel>, with one exact version")
        try:
            version = Version(match[2])
        except InvalidVersion:
            raise UserError(f"{at}: '{match[2]}' is no version of a package") from None
        return _Wheel(canonicalize_name(match[1]), version, _relative(match[3], at))
    if source.startswith("hf:"):
        if not (match := _REPO.fullmatch(source)):
            raise UserError(f"{at}: write hf:<owner>/<repo>@<revision>[/<path>], the revision as 40 hex digits")
        if not re.fullmatch(r"[0-9a-f]{40}", match[2]):
            raise UserError(
                f"{at}: revision '{match[2]}' is not a commit's 40 hex digits; a branch or tag can move, and the same "
                "params would then name other content. The repository's history shows the commits"
            )
        return _Repo(match[1], match[2], match[3] and _relative(match[3], at))
    if not source.strip():
        raise UserError(f"{key}.source is empty; a source is {FORMS}")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # ~somebody who is not a user here
        raise UserError(f"{at}: {error}") from None


def _name(where: _Wheel | _Repo | Path) -> str:
    match where:
        case _Wheel():
            return where.package
        case _Repo():
            return where.id.rpartition("/")[2]
        case Path():  # "." and ".." are no names
            return where.name if where.name not in ("", "..") else where.resolve().name


def _relative(path: str, at: str) -> str:
    parts = path.rstrip("/").split("/")
    if "" in parts or "." in parts or ".." in parts:
        raise UserError(f"{at}: the path '{path}' must lead down from the top, without '', '.' or '..' as a part")
    return "/".join(parts)


def _last(where: _Repo | Path) -> str:
    """The name of the file or folder that a source leads to."""
    return where.path.rpartition("/")[2] if isinstance(where, _Repo) and where.path else _name(where)


def _digest(path: Path, key: str, source: str) -> str:
    try:
        return records.sha256_path(path)
    except OSError as error:
        raise UserError(f"{key}.source = '{source}' cannot be read ({error}): mend it") from None


def _mismatch(key: str, expected: str, actual: str, name: str) -> UserError:
    return UserError(
        f"{key}.sha256 = '{expected}': the content of {name} is {actual}. "
        f"If the change is meant, set {key}.sha256 to it; else restore the content, or mend {key}.source"
    )


# What was hashed is what is read


def _local(where: Path, source: str, key: str) -> dict[str, Path]:
    """The files of a local source, without links, by their paths from its top; or one file under the name ''.

    The top may be a link. UserError for a link within that leads out, and as of `records.files`.
    """
    top = where.resolve()
    if not top.is_dir():
        return {"": top}
    found = records.files(top)
    real = {name: path.resolve() for name, path in found.items()}
    within = _within(top)
    for name, path in real.items():
        if not any(path.is_relative_to(one) for one in within):
            raise UserError(
                f"{key}.source = '{source}': {found[name]} is a link to {path}, which lies outside of the source: put "
                "a copy in its place if it is meant"
            )
    return real


def _within(top: Path) -> list[Path]:
    """Where links in a local folder may lead: into it; in a snapshot of the hub's cache, to its blobs as well."""
    for folder in (top, *top.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--")):
            return [top, repository / "blobs", repository.parent / "blobs"]
    return [top]


def _copy_all(found: Mapping[str, Path], place: Path, key: str) -> None:
    """Copy files to a private place."""
    try:
        if "" not in found:
            place.mkdir()
        for name, path in found.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            with records.opened(path) as file, (place / name).open("xb") as copy:
                shutil.copyfileobj(file, copy)
    except OSError as error:
        raise UserError(f"{key}.source cannot be copied ({error}): set TMPDIR to a folder with space") from None


def _link_all(found: Mapping[str, Path], place: Path) -> None:
    """Make links to files at a private place: what else lies beside them, as hidden files do, is not there."""
    if "" not in found:
        place.mkdir()
    for name, path in found.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(path.resolve())


def _states(found: Iterable[str], place: Path) -> dict[str, tuple[int, ...] | None]:
    """By file, what differs once another file is in its place, or it was written to.

    The time of an inode's last change cannot be set back, as that of the content can: a file that was changed and
    changed back shows it. Two things may not show: what is written through a map of the file that another process holds
    open, and what is written within the same tick of the clock (milliseconds) as the change before.
    """
    states: dict[str, tuple[int, ...] | None] = {}
    for name in found:
        try:
            seen = (place / name).stat()
            states[name] = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        except OSError:
            states[name] = None
    return states


# pip:


def _pinned_wheel(wanted: _Wheel, sha256: str | None, key: str, scratch: Path) -> Path:
    """A copy of the wheel in `scratch`, its content the pinned one; downloaded first where it is missing or spoilt.

    A copy, since a cache may be on a disk that others write to: a wheel that is exchanged, or written to, once it has
    been hashed makes no difference.
    """
    wheels = cache() / "wheels"
    copy = scratch / "wheel"
    try:
        if sha256 and (cached := _cached(wheels, sha256, wanted)) and _copy(cached, copy) == sha256:
            return copy
        _own(cache())
        _own(wheels)
        with _locked(wheels / f".{wanted.requirement}.lock", wanted.requirement):
            # Another process may have brought the wheel while this one waited; only the lock's holder removes one.
            if sha256 and (cached := _cached(wheels, sha256, wanted)):
                if _copy(cached, copy) == sha256:
                    return copy
                say(f"the cached {cached} is corrupted: removed, to be downloaded anew")
                cached.unlink()
            downloads = wheels / f".{wanted.requirement}.download"
            shutil.rmtree(downloads, ignore_errors=True)  # of a process that was killed
            try:
                downloaded = _download(wanted.requirement, downloads, key)
                actual = _copy(downloaded, copy)
                if sha256 not in (None, actual):
                    raise _mismatch(key, str(sha256), actual, wanted.requirement)
                _own(wheels / actual)
                downloaded.replace(wheels / actual / downloaded.name)
            finally:
                shutil.rmtree(downloads, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the download cache {cache()} cannot be used ({error}): mend it, or set LORA_REPRO_CACHE to a folder with "
            "space that you may write"
        ) from None
    if sha256 is None:
        raise UserError(f"{key}.sha256 is null: pin the wheel of {wanted.requirement} with sha256: {actual}")
    return copy


def _copy(wheel: Path, copy: Path) -> str:
    """Copy a wheel, and give the digest of the copy."""
    with records.opened(wheel) as file, copy.open("wb") as written:
        shutil.copyfileobj(file, written)
    return records.sha256_file(copy)


def _own(folder: Path) -> None:
    """Make a folder of the cache that is the user's alone; of one that is there, take the right to write from others.

    They could put links where locks and downloads are written. OSError where it is another user's, and all may write.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022:
        folder.chmod(mode & ~0o022)


def _cached(wheels: Path, sha256: str, wanted: _Wheel) -> Path | None:
    """The wheel kept under this digest, if its name says that it is the one wanted."""
    for wheel in (wheels / sha256).glob("*.whl"):
        try:
            package, version, _, _ = parse_wheel_filename(wheel.name)
        except InvalidWheelFilename:  # whoever put it there, pip did not
            continue
        if (package, version) == (wanted.package, wanted.version):
            return wheel
    return None


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{name}: waiting for another process that is downloading it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(requirement: str, folder: Path, key: str) -> Path:
    """Have pip download one wheel, without its dependencies, to `folder`."""
    partial, done, errors = folder / "partial", folder / "done", folder / "stderr"
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(done), requirement]
    if not sys.stdout.isatty():
        command.append("--quiet")
    say(f"{requirement}: downloading the wheel with pip")
    started = said = time.monotonic()
    with (
        errors.open("wb") as stderr,
        # With TMPDIR the growing file is beside its destination: it can be watched, and fills no small /tmp.
        subprocess.Popen(command, stderr=stderr, env={**os.environ, "TMPDIR": str(partial)}) as pip,
    ):
        try:
            while pip.poll() is None:
                try:
                    pip.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    # On a terminal pip draws a bar of its own.
                    if not sys.stdout.isatty() and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                        said = time.monotonic()
                        say(f"{requirement}: {_megabytes(folder):.1f} MB in {said - started:.0f} s")
        except BaseException:
            pip.kill()
            raise
    found = list(done.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        raise UserError(_why_pip_failed(requirement, errors.read_text(encoding="utf-8", errors="replace"), key))
    say(f"{requirement}: {_megabytes(done):.1f} MB in {time.monotonic() - started:.0f} s")
    return found[0]


def _megabytes(folder: Path) -> float:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    except FileNotFoundError:  # pip moved a file meanwhile
        return _megabytes(folder)


def _why_pip_failed(requirement: str, output: str, key: str) -> str:
    if "No module named pip" in output:
        return f"{key}.source needs pip to download {requirement}: run `python -m ensurepip` in this environment"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR")] or lines[-3:] or ["it left no message"]
    return (
        f"{key}.source: pip could not download a wheel of {requirement}: {' '.join(told)}\n"
        "Check the name and version, the network and pip's configuration (`pip config list`), or use a local path"
    )


@contextmanager
def _sound(wanted: _Wheel, key: str) -> Iterator[None]:
    """UserError in place of what zipfile raises for an archive that is damaged."""
    try:
        yield
    except (BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError, struct.error) as error:
        raise UserError(
            f"{key}.source: the wheel of {wanted.requirement} is no sound wheel ({error}): use another version"
        ) from None


def _extract(wheel: Path, wanted: _Wheel, folder: Path, key: str) -> Path:
    """Unpack the wanted file or folder to `folder`, anew at every use: what is unpacked cannot have been changed
    meanwhile."""
    try:
        with _sound(wanted, key), ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if len(names) > MOST_FILES:
                raise UserError(
                    f"{key}.source: the wheel of {wanted.requirement} holds {len(names):,} files, and {MOST_FILES:,} "
                    "are the most that is read: use another version, or a local path"
                )
            members = [name for name in names if name == wanted.member or name.startswith(f"{wanted.member}/")]
            if not members:
                raise _missing(wanted.member, names, key, wanted.requirement)
            if unsafe := [name for name in members if ".." in PurePosixPath(name).parts]:
                raise UserError(
                    f"the wheel of {wanted.requirement} holds {unsafe[0]!r}, which leads out of its folder: do not use "
                    "this wheel"
                )
            folder.mkdir()
            _require_room(archive, members, wheel.stat().st_size, folder, wanted, key)
            archive.extractall(folder, members)
    except OSError as error:
        raise UserError(
            f"cannot unpack the wheel of {wanted.requirement} ({error}): set TMPDIR to a folder with space"
        ) from None
    return folder / wanted.member


def _require_room(archive: ZipFile, members: Iterable[str], size: int, folder: Path, wanted: _Wheel, key: str) -> None:
    """UserError for members that would fill the disk or the memory.

    The sizes that the archive announces are bounded. zipfile writes no more of a member than is announced; it holds
    little of it at once where it is stored or deflated, as wheels are, and any amount in the other formats.
    """
    announced = [archive.getinfo(name) for name in members]
    if other := [one for one in announced if one.compress_type not in (ZIP_STORED, ZIP_DEFLATED)]:
        raise UserError(
            f"{key}.source: the wheel of {wanted.requirement} holds {other[0].filename!r}, packed in a way that wheels "
            "are not: use another version"
        )
    total = sum(one.file_size for one in announced)
    if total > max(ALWAYS_FITS, MOST_GROWTH * size):
        raise UserError(
            f"{key}.source: the wheel of {wanted.requirement} has {size:,} bytes and would unpack to {total:,}, more "
            f"than {MOST_GROWTH} times as many: it seems to be made to fill the disk, so it is not unpacked"
        )
    if total > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"cannot unpack the wheel of {wanted.requirement}: it needs {total:,} bytes where {free:,} are free: set "
            "TMPDIR to a folder with space"
        )


def _missing(path: str, names: Iterable[str], key: str, holder: str) -> UserError:
    """Name what is close to a path that is not in a wheel or repository."""
    names = sorted(names)
    known = sorted({str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}) + names
    same_name = [name for name in known if PurePosixPath(name).name == PurePosixPath(path).name]
    close = list(dict.fromkeys([*same_name, *difflib.get_close_matches(path, known, n=5)]))
    hint = f"did you mean {', '.join(close[:5])}?" if close else f"it has {', '.join(known[:10]) or 'no files'}"
    return UserError(f"{key}.source: {holder} holds no '{path}'; {hint}")


# hf:


def _from_hub(wanted: _Repo, kind: Literal["model", "dataset"], key: str) -> dict[str, Path]:
    """The wanted files in the hub's cache by their paths from the wanted folder, or one file under the name ''."""
    from huggingface_hub import snapshot_download

    whole_model = kind == "model" and not wanted.path
    allowed = list(MODEL_FILES) if whole_model else None
    if wanted.path:
        allowed = [glob.escape(wanted.path), f"{glob.escape(wanted.path)}/*"]
    name = f"{wanted.id}@{wanted.revision}"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{wanted.id}"
    say(f"{name}: fetching what is not yet in the hub's cache")
    try:
        snapshot = Path(
            snapshot_download(
                wanted.id,
                repo_type=kind,
                revision=wanted.revision,
                allow_patterns=allowed,
                ignore_patterns=["*/*"] if whole_model else None,
            )
        )
    except Exception as error:  # one call into a library whose transport errors share no base class
        raise UserError(_why_hub_failed(error, name, page, key)) from error
    names = list(records.files(snapshot))
    # An earlier download may have left other files of the same revision in the snapshot: show the chosen ones only.
    chosen = names
    if whole_model:
        chosen = [name for name in names if "/" not in name and any(fnmatchcase(name, like) for like in MODEL_FILES)]
    elif wanted.path:
        chosen = [name for name in names if name == wanted.path or name.startswith(f"{wanted.path}/")]
    if wanted.path and not chosen:
        raise _missing(wanted.path, names, key, name)
    if whole_model and not any(name.endswith(".safetensors") for name in chosen):
        raise UserError(f"{key}.source: {name} holds no .safetensors at its top: name a GGUF file in it, or convert it")
    top = f"{wanted.path}/" if wanted.path else ""
    return {name.removeprefix(top) if name != wanted.path else "": snapshot / name for name in chosen}


def _require_announced(found: Mapping[str, Path], place: Path, key: str, source: str) -> None:
    """UserError unless each file of the hub has the digest under which the hub's cache keeps it.

    It is the one that the hub announced of the file at this revision: sha256 of a large file, git's sha1 of others. So
    a download or a disk that spoilt a file is noticed, and a mirror that passes the hub's digests on and not the hub's
    content. One that announces digests of its own is not: only `sha256` tells.
    """
    for name, path in found.items():
        blob = path.readlink().name if path.is_symlink() else ""
        file = place / name
        if re.fullmatch("[0-9a-f]{64}", blob):
            actual = records.sha256_file(file)
        elif re.fullmatch("[0-9a-f]{40}", blob):
            actual = records.git_blob(file)
        else:  # a disk without links, or a server that is not the hub
            raise UserError(
                f"{key}.source = '{source}': nothing tells what the hub says that {path} is: pin the content with "
                f"{key}.sha256: {_digest(place, key, source)}"
            )
        if actual != blob:
            raise UserError(
                f"{key}.source = '{source}': {path} is not what the hub announced ({blob}, and it is {actual}): remove "
                "it and what it is a link to, and it is downloaded again; if that does not help, do not use the server "
                "that HF_ENDPOINT names"
            )


def _why_hub_failed(error: Exception, name: str, page: str, key: str) -> str:
    from huggingface_hub import errors

    access = "`hf auth login` or set HF_TOKEN"
    offline = f"connect once; if {page} asks for a licence, accept it there, then {access}"
    remedies: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (errors.GatedRepoError, f"accept its licence on {page}, then {access}"),
        (errors.RepositoryNotFoundError, f"check the name on {page}; for a private repository, {access}"),
        (errors.RevisionNotFoundError, f"check the revision: {page} has no such commit"),
        (errors.OfflineModeIsEnabled, f"HF_HUB_OFFLINE is set and the cache does not hold it: unset it, and {offline}"),
        (errors.LocalEntryNotFoundError, f"the hub cannot be reached, or HF_HUB_OFFLINE is set: {offline}"),
    ]
    remedy = next((remedy for kind, remedy in remedies if isinstance(error, kind)), "check the network and disk space")
    told = str(error).strip().split("\n", 1)[0]
    return f"{key}.source: cannot fetch {name} ({type(error).__name__}: {told}). {remedy}, or use a local path"
