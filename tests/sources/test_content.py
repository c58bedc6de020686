"""A file that is something else than its name says is told by what it is, before it is taken for broken text."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.sources import tables
from tests.made.files import read, written

LINE = b'{"text": "a", "summary": "b"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.jsonl", LINE)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("train.jsonl")
        member.size = len(LINE)
        archive.addfile(member, io.BytesIO(LINE))
    return file.getvalue()


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip": (lambda: gzip.compress(LINE), "is compressed with gzip: unpack it"),
    "bzip2": (lambda: bz2.compress(LINE), "is compressed with bzip2: unpack it"),
    "xz": (lambda: lzma.compress(LINE), "is compressed with xz: unpack it"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with zstd: unpack it"),
    "zip": (zipped, "is a zip archive, as Excel's workbooks are: unpack it, or save the sheet as CSV"),
    "tar": (tarred, "is a tar archive: unpack it"),
    "xls": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 99, "is a document of Microsoft Office: save"),
    "parquet": (lambda: b"PAR1\x15\x04" + b"\0" * 99 + b"PAR1", "is Parquet: name it .parquet"),
    "sqlite": (lambda: b"SQLite format 3\0" + b"\0" * 99, "is a database of SQLite: save the table as CSV"),
    "pointer": (lambda: POINTER, "is a pointer of Git LFS, not the content: run `git lfs pull`"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv", "train.tsv", "de.po", "de.mo", "train.gz"])
def test_a_file_of_another_kind_is_told_by_what_it_is(tmp_path: Path, name: str, kind: str) -> None:
    content, told = OTHERS[kind]
    with pytest.raises(UserError) as caught:
        read(written(tmp_path, name, content()))
    assert str(caught.value).startswith(f"{name} {told}")


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind != "parquet"])
def test_so_is_a_file_that_should_be_parquet_or_plain_text(tmp_path: Path, kind: str) -> None:
    content, told = OTHERS[kind]
    for name in ("train.parquet", "a.txt"):
        file = written(tmp_path, name, content())
        with pytest.raises(UserError) as caught:
            tables.plain(file, "utf-8", "forget") if name == "a.txt" else read(file)
        assert str(caught.value).startswith(f"{name} {told}")


def test_text_that_begins_like_another_kind_is_text(tmp_path: Path) -> None:
    for text in ("PK is short for packet", "BZh is no word", "PAR1 and PAR2", "version https://git-lfs.github.com\n"):
        assert tables.plain(written(tmp_path, "a.txt", text), "utf-8", "forget") == text
    with pytest.raises(UserError, match=r"a\.txt:2 holds NUL, which is in no text: set forget\.encoding"):
        tables.plain(written(tmp_path, "a.txt", "a\nb\0"), "utf-8", "forget")
