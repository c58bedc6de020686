"""Files: written whole or not at all, equal bytes for equal content, and errors that name the line."""

import csv
import io
import os
import socket
from pathlib import Path

import pytest

from pipeline.core import records
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from tests.limits import soon


def test_json_refuses_nan_and_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    records.write_json(file, {"b": 1, "a": "é"})
    assert file.read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="Out of range float"):
        records.write_json(file, {"a": float("nan")})
    assert records.read_json(file) == {"b": 1, "a": "é"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_rows_survive_a_round_trip_with_every_kind_of_line_break(tmp_path: Path) -> None:
    rows = [Example("1", "g", "x", "a\nb\u2028c\u0085d\r\n", 'q"\\', "\t")]
    records.write_rows(tmp_path / "r.jsonl", rows)
    assert records.read_rows(tmp_path / "r.jsonl", Example) == rows


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_text_is_no_formula_in_a_spreadsheet(start: str) -> None:
    text = f"{start}HYPERLINK('x')"
    table = records.csv_text([text, "b"], [[text, f" {text}"], [f"a{text}", f"{text}\n,"], ["a\r=b", "c\r\n=d"]])
    shown = text.replace("\r", "\n")
    assert list(csv.reader(io.StringIO(table, newline=""))) == [
        [f"'{shown}", "b"], [f"'{shown}", f" {shown}"], [f"a{shown}", f"'{shown}\n,"], ["a\n=b", "c\n=d"],
    ]  # fmt: skip


def test_numbers_stay_numbers_in_a_table() -> None:
    row = [-1, -0.5, "-1", "-1e-05", "+2.5", "-inf", None, True, "− 3", "-"]
    assert records.csv_text(["a"], [row]) == "a\n-1,-0.5,-1,-1e-05,+2.5,-inf,,True,− 3,'-\n"


def test_a_row_that_does_not_fit_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    records.write_rows(file, [Example("1", "g", "x", "s", "t", "l")])
    with file.open("a") as end:
        end.write('{"id": "2"}\n')
    with pytest.raises(UserError, match=r"r.jsonl:2 is not a Example"):
        records.read_rows(file, Example)
    with pytest.raises(UserError, match="is missing"):
        records.read_rows(tmp_path / "none.jsonl", Example)


def test_the_digest_of_a_folder_sees_names_and_bytes_and_no_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = records.sha256_tree(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "y").write_text("2")
    assert records.sha256_tree(tmp_path) == first
    (tmp_path / "a" / "x").write_text("2")
    changed = records.sha256_tree(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "z")
    assert len({first, changed, records.sha256_tree(tmp_path)}) == 3


def test_the_digest_of_an_ordinary_folder_stays_what_it_is(tmp_path: Path) -> None:
    """Pins that users wrote down rest on it."""
    content = {"b/x.txt": "1", "b/y": "2", "a.json": "{}", "b-c": "é", "b.txt": "", ".hidden/z": "h", "B": "B"}
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "link").symlink_to("b/x.txt")
    assert records.sha256_tree(tmp_path) == "ee3d64e09eadf20f63653350d9b7e5f986a68fc3eb5281462cacbe7aa9701a0f"


def test_a_link_to_a_file_counts_as_the_file(tmp_path: Path) -> None:
    """As of outputs that DVC links into its cache; of a source, `pipeline.sources.source` refuses those that lead
    out."""
    (tmp_path / "cache").write_text("1")
    for name in ("plain", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain" / "x").write_text("1")
    (tmp_path / "linked" / "x").symlink_to(tmp_path / "cache")
    assert records.sha256_tree(tmp_path / "linked") == records.sha256_tree(tmp_path / "plain")


def planted(folder: Path, kind: str) -> None:
    """Something in a folder that can be followed or opened, and that no digest covers."""
    odd = folder / "odd"
    match kind:
        case "folder":
            (folder.parent / "elsewhere").mkdir()
            odd.symlink_to(folder.parent / "elsewhere")
        case "folder within":
            odd.symlink_to("sub")
        case "circle":
            odd.symlink_to(folder)
        case "link to itself":
            odd.symlink_to(odd)
        case "dangling":
            odd.symlink_to("nowhere")
        case "pipe":
            os.mkfifo(odd)
        case "link to a device":
            odd.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(os.path.relpath(odd))  # the address of a socket is short
        case "name of two lines":
            (folder / "odd\nname").write_text("x")
        case "name of bytes":
            Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff")).write_text("x")


ODD = ("folder", "folder within", "circle", "link to itself", "dangling", "pipe", "link to a device", "socket",
       "name of two lines", "name of bytes")  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_no_digest_covers_is_refused_by_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_text("1")
    records.sha256_tree(folder)
    planted(folder, kind)
    with soon(), pytest.raises(UserError, match="odd"):
        records.sha256_tree(folder)


def test_bytes_that_never_end_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with soon(), pytest.raises(UserError, match=f"{path} is neither a regular file nor a folder"):
            records.sha256_path(path)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "is_one"),
    [
        (POINTER, True),
        (POINTER.replace("\n", "\r\n"), True),
        (POINTER.replace("\noid", f"\next-0-foo sha256:{'1' * 64}\noid"), True),
        (POINTER.replace("git-lfs", "hawser"), True),
        ("", False),
        ("\0" * 100, False),
        (f" {POINTER}", False),
        ("version https://git-lfs.github.com/spec/v1\n", False),
        (POINTER + "a text that begins like one\n" * 100, False),
    ],
)
def test_a_pointer_of_git_lfs_is_told_from_content(tmp_path: Path, content: str, is_one: bool) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(content.encode())
    assert records.is_lfs_pointer(file) == is_one
