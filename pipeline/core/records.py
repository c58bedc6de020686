"""Files between stages: frozen records of rows, files that are written whole or not at all, and digests.

JSON has sorted keys and a trailing newline and refuses NaN and infinities, so equal content gives equal bytes.
"""

import csv
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import UserError

T = TypeVar("T")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Spreadsheets take a cell that begins like this for a formula."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a split.

    `group` names the source that rows share, such as a paper. Shuffling, prefix sharing and the bootstrap keep its rows
    together. `aspect` selects the instruction. `lead` is the first sentence of `source`, a reference line. `references`
    are all right answers, `target` first; training uses only `target`. `history` holds the earlier messages of a
    conversation, each `{"role": ..., "content": ...}` with the role system, user or assistant; an answer that is not to
    be learnt has `"weight": "0"` as well.
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
        if not self.references:  # usually only `target` is right
            object.__setattr__(self, "references", [self.target])


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model wrote for one test example.

    `prompt_sha256` is the digest of the prompt's token ids. `tokens` counts new tokens, including a closing EOS.
    `finish` is "stop" after an EOS and "length" at the cap. `more` has text, tokens and finish of further answers, if
    `generation.sampling` asks for several.
    """

    id: str
    prompt_sha256: str
    prompt_tokens: int
    text: str
    tokens: int
    finish: str
    more: list[dict[str, Any]] | None = None

    @property
    def texts(self) -> list[str]:
        """All answers, this one first."""
        return [self.text, *(one["text"] for one in self.more or [])]

    @property
    def finishes(self) -> list[str]:
        """How each of the answers ended."""
        return [self.finish, *(one["finish"] for one in self.more or [])]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the examples of one split became as token ids.

    `controls` counts examples whose texts hold the name of a control token, which stays text. `cut` prompts were
    shortened to `prompt.max_tokens`, and lost `lost` tokens together. `thoughts` counts targets that hold a thought or
    its mark.
    """

    examples: int
    controls: int
    cut: int
    lost: int
    thoughts: int


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """The training rows that stand before the questions in the prompts of a variant (`baseline.shots`).

    `ids` holds a list of row ids for each prompt, in order; one list if all prompts have the same. `tokens` counts what
    they add to each prompt. `asked` is `baseline.shots`.
    """

    asked: int
    choice: str
    seed: int
    ids: list[list[str]]
    tokens: list[int]

    @property
    def most(self) -> int:
        """The number of demonstrations in the prompt that has most of them."""
        return max(map(len, self.ids))


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a variant's predictions were made. Base and tuned must agree in everything but the adapter.

    `prompts_sha256` is the digest of the prompts' token ids, in order. `model_sha256` and `adapter_sha256` are those of
    the files of the quantized base and of the adapter. `generation` holds transformers' whole GenerationConfig, the
    batching, and the backend with its versions. `threads` is 0 if the CPU does not compute. `recheck` counts the
    examples that were decoded again alone ("examples"), and those with the same text ("identical"). `thinking` is
    `prompt.thinking`, and `encoded` what became of the examples. `rows` holds the places of the answered rows in the
    split, from 0, if they are not all of it. `demonstrations` are those of `base-shots`. `split` is `evaluate.split`.
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
    thinking: bool
    encoded: Encoded
    rows: list[int] | None = None
    demonstrations: Demonstrations | None = None
    split: str = "test"


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically. ValueError for NaN or an infinity."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. UserError if it is missing or not JSON."""
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove it and run `dvc repro`") from None


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclass records as JSON lines, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json_line(row))


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table as CSV with line feeds. None becomes an empty cell, and no spreadsheet takes a text for a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(map(_cell, row) for row in (header, *rows))
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header. UserError if it is missing."""
    return list(csv.DictReader(io.StringIO(_text(path), newline="")))


def _text(path: Path) -> str:
    """The text of a file, with the line ends it has; UserError if it is missing."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it") from None


def _cell(value: Any) -> Any:
    """The value. A text that looks like a formula, and is not a number, gets an apostrophe before it (OWASP)."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")  # `csv` writes "\r" unquoted, and readers end the row there
    try:
        float(text)
    except ValueError:
        return f"'{text}" if value.startswith(FORMULA) else text
    return text


def json_line(row: Any) -> str:
    """One dataclass record as one line of JSON, with its newline. What is None by default, and is None, is left out."""
    content = asdict(row)
    for one in fields(row):
        if one.default is None and content[one.name] is None:
            del content[one.name]
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path, record: type[T]) -> list[T]:
    """Read the JSON lines of `path` as `record`s. UserError if it is missing, or naming a line that does not fit."""
    rows = []
    # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may contain.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line:
            try:
                rows.append(record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}:{number} is not a {record.__name__} ({error})") from None
    return rows


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. It replaces `path` if, and only if, the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a regular file for reading. UserError for a device, a pipe or the like, whose bytes may never end."""

    def without_waiting(name: str, flags: int) -> int:  # a pipe would wait for its writer
        return os.open(name, flags | os.O_NONBLOCK)

    with open(path, "rb", opener=without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path} is neither a regular file nor a folder: remove it")
        yield file


def sha256_file(path: Path) -> str:
    """Digest of a file's bytes. UserError if it is not a regular file."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their relative paths, sorted. Everything that walks through a source uses this.

    Hidden files and folders (`.cache`, `.git`) are left out: they do not belong to a checkpoint or a data set. A link
    to a file counts as that file. UserError for anything that a digest cannot cover but a program could follow: a link
    to a folder (it may form a circle), a broken link, a device, a pipe, a socket, or a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): correct its permissions or remove it")

    found = {}
    for top, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [path for path in (Path(top, name) for name in folders) if path.is_symlink()]
        for path in [*links, *(Path(top, name) for name in names if not name.startswith("."))]:
            name = path.relative_to(folder).as_posix()
            if why := _not_a_file(path):
                raise UserError(f"{path} {why}: remove it, or replace it by a copy of the file or folder")
            # The digest of a folder is over lines of UTF-8, one a file.
            if "\n" in name or name.encode("utf-8", "ignore").decode() != name:
                raise UserError(f"the name of {str(path)!r} has a line feed or is not UTF-8: rename it")
            found[name] = path
    return dict(sorted(found.items()))


def _not_a_file(path: Path) -> str | None:
    """Why a path cannot be read as a file; None if it is a file or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"leads nowhere ({error.strerror})" if path.is_symlink() else f"cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "is a link to a folder, which the digest of a folder does not follow"
    return None if stat.S_ISREG(mode) else "is neither a regular file nor a folder"


def sha256_tree(folder: Path) -> str:
    """Digest of a folder: sha256 over a line `<sha256>  <relative path>` for each file, sorted by path.

    Raises what `files` raises.
    """
    return sha256_text("".join(f"{sha256_file(path)}  {name}\n" for name, path in files(folder).items()))


def git_blob(path: Path) -> str:
    """git's name for a file's content, valid for files that are not in Git LFS."""
    with opened(path) as file:
        digest = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        return hashlib.file_digest(file, lambda: digest).hexdigest()


_LFS_POINTER = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/\S+\r?\n(?:.*\n)*oid \S+:")
_LARGEST_LFS_POINTER = 1024  # bytes, by the specification of Git LFS


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS, which a clone without LFS has in the place of the content.

    UserError if it is not a regular file.
    """
    with opened(path) as file:
        start = file.read(_LARGEST_LFS_POINTER + 1)
    return len(start) <= _LARGEST_LFS_POINTER and _LFS_POINTER.match(start) is not None


def sha256_path(path: Path) -> str:
    """Digest of a file, or of a folder with `sha256_tree`."""
    return sha256_tree(path) if path.is_dir() else sha256_file(path)


IGNORED = ("__pycache__", "*.pyc", ".DS_Store", "*~", ".*.swp", ".#*")
"""Names that DVC ignores in a folder, as in `.dvcignore`: leftovers of Python, editors and file managers."""


def dvc_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that DVC counts, by their relative paths."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        relative.as_posix(): path
        for relative, path in found.items()
        if not any(fnmatchcase(part, name) for part in relative.parts for name in IGNORED)
    }


def dvc_md5(path: Path) -> str | None:
    """DVC's name for the content of a file or folder; None if there is none. A folder's is over its listing as JSON."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    if not path.is_dir():
        return None
    files = dvc_files(path)
    listing = [{"md5": dvc_md5(files[name]), "relpath": name} for name in sorted(files)]
    return f"{hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest()}.dir"


def sha256_text(text: str) -> str:
    """Digest of a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_ids(ids: Iterable[int]) -> str:
    """Digest of a sequence of token ids."""
    return sha256_text(" ".join(map(str, ids)))
