"""Where data and models come from: one string, pinned by content, resolved to a local path.

    pip:aclsum==0.1.2/aclsum/dataset          a file or folder inside a published wheel; sha256 is the wheel's
    hf:<owner>/<repo>@<40 hex digits>[/path]  a Hugging Face repository at a commit; sha256 may be null
    ~/data/reviews                            a local file or folder; sha256 as `records.sha256_path` computes it

What was hashed is what is read. Data is copied to a private folder, and the copy is hashed. The weights of a model are
too large to copy: a model is read through a folder of links to the files that were hashed, and is refused if one of
them has changed by the time it is loaded. In a local folder, links to files within it are followed. A link that leads
out is refused, because its target does not belong to the source.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from zipfile import ZipFile

from pipeline.core import records
from pipeline.core.errors import UserError, listing
from pipeline.sources import address, hub, wheels
from pipeline.sources.address import Repo, Wheel
from pipeline.sources.wheels import cache as cache


def check(source: str, sha256: str | None, key: str) -> None:
    """Find what is wrong with a source before anything is downloaded: its form, a missing local path, a missing pin.

    `key` is the params section that the UserError names: "data" or "model".
    """
    where = address.parse(source, key)
    if isinstance(where, Path):
        if not where.exists():
            raise UserError(
                f"{key}.source = '{source}': no such file or folder{address.looked_in(where)}; a source is "
                f"{address.FORMS}"
            )
        if sha256 is None:
            found = _local(where, source, key)
            digest = address.digest(where, key, source)
            if pointers := _pointers(found):
                raise UserError(f"{key}.source = '{source}': {pointers}; as it is, sha256 is {digest}")
            raise UserError(f"{key}.sha256 is null: pin the content of {source} with sha256: {digest}")


def size_here(source: str, sha256: str | None, key: str) -> int | None:
    """The bytes of a source that can be read without a network; None for any other. UserError as of `resolved`."""
    where = address.pinned(source, sha256, key)
    if isinstance(where, Path):
        return sum(path.stat().st_size for path in _local(where, source, key).values())
    if isinstance(where, Wheel) and sha256 and (kept := wheels.cached(sha256, where)):
        return kept.stat().st_size
    return None


@contextmanager
def resolved(source: str, sha256: str | None, *, kind: Literal["model", "dataset"], key: str) -> Iterator[Path]:
    """Yield the local file or folder that `source` names, with its content verified. It is removed after the block.

    Whatever is not here yet is downloaded. From a hub repository without a path, a model gets the safetensors,
    configuration and tokenizer files at the top level, a dataset gets everything.

    UserError names `key`.source or `key`.sha256 and what is wrong with it, or what the download needs. It is also
    raised after the block if a model's files changed during it: then discard what was made of them.
    """
    check(source, sha256, key)
    where = address.pinned(source, sha256, key)
    with TemporaryDirectory(prefix="lora-repro-") as name:
        scratch = Path(name)
        if isinstance(where, Wheel):
            yield wheels.extract(wheels.pinned(where, sha256, key, scratch), where, scratch / "content", key)
            return
        found = hub.fetch(where, kind, key) if isinstance(where, Repo) else _local(where, source, key)
        place = scratch / address.last(where)
        if kind == "dataset":
            _copy_all(found, place, key)
        else:
            _link_all(found, place)
        before = _states(found, place)
        if sha256 is not None:
            if (actual := address.digest(place, key, source)) != sha256:
                if pointers := _pointers(found):
                    raise UserError(f"{key}.sha256 = '{sha256}': {pointers}; as it is, sha256 is {actual}")
                as_written = where == address.parse(source, key)
                raise address.mismatch(key, sha256, actual, source if as_written else str(where))
        else:  # `check` allows this for the hub alone
            hub.require_announced(found, place, key, source)
        yield place
        if changed := [name for name, state in _states(found, place).items() if state != before[name]]:
            raise UserError(
                f"{key}.source = '{source}': {found[changed[0]]} has changed while it was read: see what writes to it, "
                "and run again"
            )


@contextmanager
def wheel(source: str, sha256: str | None, *, key: str) -> Iterator[ZipFile]:
    """Yield the whole wheel of a `pip:` source, opened, with its content verified. UserError as in `resolved`."""
    where = address.parse(source, key)
    assert isinstance(where, Wheel)
    with (
        TemporaryDirectory(prefix="lora-repro-") as scratch,
        wheels.opened(wheels.pinned(where, sha256, key, Path(scratch)), where, key) as archive,
    ):
        yield archive


@contextmanager
def mounted(
    pinned: Sequence[tuple[str, str | None]], *, kind: Literal["model", "dataset"], key: str
) -> Iterator[dict[str, Path]]:
    """Yield the local path of each source by the name of its package, repository, file or folder.

    `pinned`: sources with their digests. UserError for names that repeat, and one for everything that `resolved` finds.
    """
    names = [address.name(address.parse(source, key)) for source, _ in pinned]
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
        if len(problems) == 1:
            raise UserError(problems[0])
        if problems:
            raise listing(problems, f"{key}.source: {len(problems)} of {len(pinned)} sources cannot be used")
        yield found


# What was hashed is what is read


def _local(where: Path, source: str, key: str) -> dict[str, Path]:
    """The files of a local source by their paths from its top, links resolved; '' for a source that is one file.

    The top may be a link. UserError for a link within that leads out, and for what `records.files` refuses.
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


def _pointers(found: Mapping[str, Path]) -> str:
    """Which files a clone without Git LFS has pointers in place of, in words; '' if none."""
    names = [path.name for path in found.values() if records.is_lfs_pointer(path)]
    if not names:
        return ""
    others = f", and so are {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{names[0]} is a Git LFS pointer in place of the file{others}: run `git lfs pull` where the repository was "
        "cloned"
    )


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
    """Link files at a private place. What else lies beside them, such as hidden files, cannot be reached there."""
    if "" not in found:
        place.mkdir()
    for name, path in found.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(path.resolve())


def _states(found: Iterable[str], place: Path) -> dict[str, tuple[int, ...] | None]:
    """What differs, by file, once the file was replaced or written to.

    Unlike a file's modification time, the time of its inode's last change cannot be set back. So a file that was
    changed and changed back shows it. Two changes may go unnoticed: one through a memory map that another process
    holds, and one within the same tick of the clock (milliseconds) as the change before.
    """
    states: dict[str, tuple[int, ...] | None] = {}
    for name in found:
        try:
            seen = (place / name).stat()
            states[name] = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        except OSError:
            states[name] = None
    return states
