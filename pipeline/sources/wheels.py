"""Wheels of `pip:` sources: downloaded by the user's own pip, kept in a cache, copied and hashed again at every use.

pip's configuration (indexes, proxies) holds, since the user's pip downloads. All clones of the project share the cache.
Wheels are never installed, and nothing in them is run.
"""

import os
import shutil
import stat
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

from filelock import FileLock, Timeout
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from pipeline.core import records
from pipeline.core.errors import UserError
from pipeline.core.progress import SECONDS_BETWEEN_LINES, say
from pipeline.sources.address import Wheel, mismatch, missing

MOST_FILES = 100_000
"""Files in one wheel. It bounds the time to search the wheel's index and to fill a folder."""
MOST_GROWTH = 100
"""How many times its own size a wheel may unpack to. Text packs to a fifth or a tenth, and a table that repeats itself
to a fiftieth; a file that was made to fill the disk packs to a thousandth."""
ALWAYS_FITS = 2**26
"""Bytes that any wheel may unpack to, however small it is: a short table that repeats itself may pack to nothing."""


def cache() -> Path:
    """The folder of downloaded wheels: `$LORA_REPRO_CACHE`, or `lora-repro` in the platform's cache folder."""
    if own := os.environ.get("LORA_REPRO_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lora-repro"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-repro"


def pinned(wanted: Wheel, sha256: str | None, key: str, scratch: Path) -> Path:
    """Copy the wheel with the pinned content into `scratch`; download it if it is missing or corrupted.

    Others may write to the disk of the cache. What happens to the cached wheel after it was hashed cannot change the
    copy. UserError if pip cannot download it, its content is not `sha256` or `sha256` is null, or the cache cannot be
    used.
    """
    wheels = cache() / "wheels"
    copy = scratch / "wheel"
    try:
        if sha256 and (kept := cached(sha256, wanted)) and _copy(kept, copy) == sha256:
            return copy
        _own(cache())
        _own(wheels)
        with _locked(wheels / f".{wanted.requirement}.lock", wanted.requirement):
            # Another process may have stored the wheel meanwhile. Only the lock's holder removes one.
            if sha256 and (kept := cached(sha256, wanted)):
                if _copy(kept, copy) == sha256:
                    return copy
                say(f"the cached {kept} is corrupted: removed, to be downloaded anew")
                kept.unlink()
            downloads = wheels / f".{wanted.requirement}.download"
            shutil.rmtree(downloads, ignore_errors=True)  # what a killed process left
            try:
                downloaded = _download(wanted.requirement, downloads, key)
                actual = _copy(downloaded, copy)
                if sha256 not in (None, actual):
                    raise mismatch(key, str(sha256), actual, wanted.requirement)
                _own(wheels / actual)
                downloaded.replace(wheels / actual / downloaded.name)
            finally:
                shutil.rmtree(downloads, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the download cache {cache()} cannot be used ({error}): make it usable, or set LORA_REPRO_CACHE to a "
            "folder with space that you may write"
        ) from None
    if sha256 is None:
        raise UserError(f"{key}.sha256 is null: pin the wheel of {wanted.requirement} with sha256: {actual}")
    return copy


def _copy(wheel: Path, copy: Path) -> str:
    """Copy a wheel, and return the digest of the copy."""
    with records.opened(wheel) as file, copy.open("wb") as written:
        shutil.copyfileobj(file, written)
    return records.sha256_file(copy)


def _own(folder: Path) -> None:
    """Make a folder of the cache that only its user may write to; OSError if it belongs to another user.

    Anyone else who may write there could put links in the place of locks and downloads.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022:
        folder.chmod(mode & ~0o022)


def cached(sha256: str, wanted: Wheel) -> Path | None:
    """The wheel that the cache keeps under this digest, if its name says that it is the wanted one."""
    for wheel in (cache() / "wheels" / sha256).glob("*.whl"):
        try:
            package, version, _, _ = parse_wheel_filename(wheel.name)
        except InvalidWheelFilename:  # not a file of pip's
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
    """Let pip download one wheel, without its dependencies, to `folder`."""
    partial, done, errors = folder / "partial", folder / "done", folder / "stderr"
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(done), requirement]
    if not sys.stdout.isatty():
        command.append("--quiet")
    say(f"{requirement}: downloading the wheel with pip")
    started = time.monotonic()
    with (
        errors.open("wb") as stderr,
        # TMPDIR puts the growing file beside its destination: it can be watched, and does not fill a small /tmp.
        subprocess.Popen(command, stderr=stderr, env={**os.environ, "TMPDIR": str(partial)}) as pip,
    ):
        try:
            while pip.poll() is None:
                try:
                    pip.wait(timeout=SECONDS_BETWEEN_LINES)
                except subprocess.TimeoutExpired:
                    if not sys.stdout.isatty():  # on a terminal pip draws its own bar
                        say(f"{requirement}: {_megabytes(folder):.1f} MB in {time.monotonic() - started:.0f} s")
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
    reasons = [line for line in lines if line.startswith("ERROR")] or lines[-3:] or ["it left no message"]
    return (
        f"{key}.source: pip could not download a wheel of {requirement}: {' '.join(reasons)}\n"
        "Check the name and version, the network and pip's configuration (`pip config list`), or use a local path"
    )


@contextmanager
def opened(wheel: Path, wanted: Wheel, key: str) -> Iterator[ZipFile]:
    """Open a wheel; UserError in place of what zipfile raises for a damaged archive."""
    try:
        with ZipFile(wheel) as archive:
            yield archive
    except (BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError, struct.error) as error:
        raise UserError(
            f"{key}.source: the wheel of {wanted.requirement} is not a sound wheel ({error}): use another version"
        ) from None


def extract(wheel: Path, wanted: Wheel, folder: Path, key: str) -> Path:
    """Unpack the wanted file or folder to `folder`, and return its path there.

    It is unpacked at every use, so nobody can have changed what was unpacked. UserError for a wheel that lacks it, is
    damaged, would write outside of `folder`, or would fill the disk.
    """
    try:
        with opened(wheel, wanted, key) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if len(names) > MOST_FILES:
                raise UserError(
                    f"{key}.source: the wheel of {wanted.requirement} holds {len(names):,} files, more than the "
                    f"{MOST_FILES:,} that are read at most: use another version, or a local path"
                )
            members = [name for name in names if name == wanted.member or name.startswith(f"{wanted.member}/")]
            if not members:
                raise missing(wanted.member, names, key, wanted.requirement)
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


def _require_room(archive: ZipFile, members: Iterable[str], size: int, folder: Path, wanted: Wheel, key: str) -> None:
    """UserError for members that would fill the disk or the memory.

    It bounds the sizes that the archive announces. zipfile writes no more of a member than is announced. In the formats
    of wheels, stored and deflated, it holds little of a member in memory; in other formats it may hold all of it.
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
