"""What stages hand to each other: frozen records, and files written whole or not at all.

JSON refuses NaN and infinities, has sorted keys and a trailing newline, so that equal content is equal bytes.
"""

import csv
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import UserError

T = TypeVar("T")
FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a split.

    `group` names the source that rows share (a paper): shuffling, prefix sharing and the bootstrap keep its rows
    together. `aspect` chooses the instruction. `lead` is the first sentence of `source`, a reference line.
    `references` are all answers that are right, `target` first; training uses `target` alone. `history` holds the
    messages before `source` in a conversation, each `{"role": ..., "content": ...}`: system, user or assistant.
    """

    id: str
    group: str
    aspect: str
    source: str
    target: str
    lead: str
    references: list[str] = field(default_factory=list)
    history: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.references:  # the usual case: one answer is right
            object.__setattr__(self, "references", [self.target])


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model wrote for one test example.

    `prompt_sha256` is over the prompt's token ids; `tokens` counts new tokens, a closing EOS included; `finish` is
    "stop" for EOS and "length" for the cap.
    """

    id: str
    prompt_sha256: str
    prompt_tokens: int
    text: str
    tokens: int
    finish: str


@dataclass(frozen=True, slots=True)
class Decoding:
    """The conditions under which a variant's predictions were made; base and tuned must agree on all but the adapter.

    `prompts_sha256` is over ids and prompt tokens in order; `model_sha256` and `adapter_sha256` are over the files of
    the quantized base and of the adapter; `generation` is the whole of transformers' GenerationConfig, the batching and
    the backend with the versions that it rests on. `threads` is 0 where the CPU does not compute. `recheck` counts the
    examples that were decoded again alone, and those among them that came out the same.
    """

    variant: str
    prompts_sha256: str
    model_sha256: str
    adapter_sha256: str | None
    generation: dict[str, Any]
    device: str
    threads: int
    dtype: str
    recheck: dict[str, int]


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically; ValueError for NaN or an infinity."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove it and run `dvc repro`") from None


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclass records as JSON lines, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json_line(row))


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table as CSV with line feeds; None is an empty cell, and no text is a formula where a spreadsheet opens it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(map(_cell, row) for row in (header, *rows))
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; UserError where it is missing."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it") from None


def _cell(value: Any) -> Any:
    """The value; a text that begins as a formula does, and is not a number, behind an apostrophe, as OWASP advises."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")  # `csv` writes "\r" unquoted, and readers end the row there
    try:
        float(text)
    except ValueError:
        return f"'{text}" if value.startswith(FORMULA) else text
    return text


def json_line(row: Any) -> str:
    """One record as one line of JSON, newline included."""
    return json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path, record: type[T]) -> list[T]:
    """Read the JSON lines of `path` as `record`s; UserError names the line that does not fit."""
    try:
        # Not splitlines(): it also splits at U+2028 and its like, which JSON strings may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                rows.append(record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}:{number} is not a {record.__name__} ({error})") from None
    return rows


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place if, and only if, the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading; UserError for a device, a pipe or the like, whose bytes may never end."""

    def without_waiting(name: str, flags: int) -> int:  # a pipe would wait for its writer
        return os.open(name, flags | os.O_NONBLOCK)

    with open(path, "rb", opener=without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path} is neither a regular file nor a folder: remove it")
        yield file


def sha256_file(path: Path) -> str:
    """Digest of a file's bytes; UserError for what is not a regular file."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their paths from it, sorted. Whatever goes through a source goes through it by this.

    Hidden files and folders are left out, as they do not belong to a checkpoint or a data set (`.cache`, `.git`). A
    link to a file counts as that file. UserError, which names it, for what a digest cannot cover and a program could
    still follow: a link to a folder (it may lead round in a circle), a link that leads nowhere, a device, a pipe or a
    socket, and a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): mend or remove it")

    found = {}
    for top, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [path for path in (Path(top, name) for name in folders) if path.is_symlink()]
        for path in [*links, *(Path(top, name) for name in names if not name.startswith("."))]:
            name = path.relative_to(folder).as_posix()
            if why := _not_a_file(path):
                raise UserError(f"{path} {why}: remove it, or put a copy of what is meant in its place")
            # A digest is over lines of UTF-8, one a file.
            if "\n" in name or name.encode("utf-8", "ignore").decode() != name:
                raise UserError(f"{str(path)!r} has a line feed in its name, or what is not UTF-8: rename it")
            found[name] = path
    return dict(sorted(found.items()))


def _not_a_file(path: Path) -> str | None:
    """The reason that a path cannot be read as a file; None for a file, or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"leads nowhere ({error.strerror})" if path.is_symlink() else f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "is a link to a folder, which the digest of a folder does not follow"
    return None if stat.S_ISREG(mode) else "is neither a regular file nor a folder"


def sha256_tree(folder: Path) -> str:
    """Digest of a folder: sha256 over one line `<sha256>  <relative path>` a file, sorted by path; UserError as `files`
    raises it."""
    lines = [f"{sha256_file(path)}  {name}\n" for name, path in files(folder).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def git_blob(path: Path) -> str:
    """git's name for a file's content, as of the files in a repository that are not in Git LFS."""
    with opened(path) as file:
        digest = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def sha256_path(path: Path) -> str:
    """Digest of a file's bytes, or of a folder's files and their names."""
    return sha256_tree(path) if path.is_dir() else sha256_file(path)


IGNORED = ("__pycache__", "*.pyc", ".DS_Store", "*~", ".*.swp", ".#*")
"""Names that DVC passes over in a folder, as `.dvcignore` says: what Python, editors and file managers leave there."""


def dvc_files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their paths from it, as DVC goes through it."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        relative.as_posix(): path
        for relative, path in found.items()
        if not any(fnmatchcase(part, name) for part in relative.parts for name in IGNORED)
    }


def dvc_md5(path: Path) -> str | None:
    """DVC's name for the content of a file, or of a folder (its listing as JSON); None where there is none."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    if not path.is_dir():
        return None
    files = dvc_files(path)
    listing = [{"md5": dvc_md5(files[name]), "relpath": name} for name in sorted(files)]
    return f"{hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest()}.dir"


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_ids(ids: Iterable[int]) -> str:
    """Digest of a sequence of token ids."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()
