"""Files: written whole or not at all, equal bytes for equal content, and errors that name the line."""

from pathlib import Path

import pytest

from pipeline import records
from pipeline.errors import UserError
from pipeline.records import Example


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
