"""The stage `prepare`, run as DVC runs it, on files of the kinds that users have: a result, or one clear error."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import probes
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import DataCard
from pipeline.core.errors import UserError
from pipeline.sources import source
from tests import ROOT
from tests.made.clone import environment
from tests.made.parameters import edit

pytestmark = pytest.mark.slow

ODD = os.fsdecode(b"R\xe9sum\xe9.txt")
COLUMNS = dict.fromkeys(("id", "group", "aspect"))


def prepared(folder: Path, **data: Any) -> subprocess.CompletedProcess[str]:
    """`python -m stages.prepare` in the working directory, on a folder whose digest is pinned if it has one."""
    try:
        sha256 = records.sha256_path(folder)
    except UserError:
        sha256 = "0" * 64
    edit(data={"source": str(folder), "sha256": sha256, **data}, prompt={"instructions": {"default": "Sum."}})
    command = [sys.executable, "-m", "stages.prepare"]
    path = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment() | path, capture_output=True, text=True)


def told(folder: Path, **data: Any) -> str:
    """What a run that fails tells: one error without a traceback."""
    run = prepared(folder, **data)
    assert run.returncode == 1, run.stdout
    assert "Traceback" not in run.stderr
    return run.stderr


@pytest.fixture
def data(tmp_path: Path, project: params.Params) -> Path:
    """The folder of a sound table, of which a test changes the training file."""
    del project
    for split in paths.SPLITS:
        paths.split(split).unlink()
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in paths.SPLITS:
        rows = [{"source": f"{split}{number} " * 5, "target": "a b"} for number in range(9)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# Names that the file system has and UTF-8 has not


@pytest.mark.parametrize("place", ["", "deep"])
def test_a_file_whose_name_is_no_utf8_is_refused_by_name(data: Path, place: str) -> None:
    columns = {"source": "source", "target": "target", **COLUMNS}
    (data / place).mkdir(exist_ok=True)
    (data / place / ODD).write_text("x")
    said = told(data, columns=columns)
    assert f"{'deep/' if place else ''}R\\udce9sum\\udce9.txt' has a line feed or is not UTF-8: rename it" in said
    (data / place / ODD).unlink()
    assert prepared(data, columns=columns).returncode == 0


def test_so_it_is_in_general_text_and_in_a_model(project: params.Params, tmp_path: Path) -> None:
    for kind in ("forget", "model"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / ODD).write_text("x")
        (folder / "a.txt").write_text("A text.")
        with pytest.raises(UserError, match=r"R\\udce9sum\\udce9\.txt' has a line feed or is not UTF-8: rename it"):
            if kind == "forget":
                change = {"source": str(folder), "sha256": "0" * 64, "files": "a.txt", "column": None}
                probes.texts(project.forget.probes[0].model_copy(update=change))
            else:
                with source.resolved(str(folder), "0" * 64, kind="model", key="model"):
                    pass


def test_a_project_within_a_folder_of_such_a_name_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"d\xe9p\xf4t")
    odd.mkdir()
    project = Path.cwd()
    project.rename(odd / "project")
    data.rename(odd / "mine")
    monkeypatch.chdir(odd / "project")
    columns = {"source": "source", "target": "target", **COLUMNS}
    run = prepared(Path("../mine"), columns=columns)
    assert run.returncode == 0, run.stderr
    assert "R\\udce9" not in run.stderr
    assert "data.sha256 = " in told(Path("../mine"), columns=columns, sha256="1" * 64)


# Chats


def test_fields_of_chats_are_used_dropped_with_a_count_or_told(data: Path) -> None:
    def turns(split: str, number: int) -> dict[str, Any]:
        question = {"role": "user", "content": f"{split}{number} " * 5}
        return {"messages": [question, {"role": "assistant", "content": "a b"}]}

    for split in paths.SPLITS:
        rows = [turns(split, number) for number in range(8)]
        rows[0] |= {"system": "Always answer in French.", "tools": "[]", "score": 0.5}
        rows[1]["messages"][-1]["weight"] = 0
        rows[2]["messages"][-1]["reasoning_content"] = "first I think"
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"format": "chat", "columns": None}
    said = told(data, **given)
    assert "2 of 8 training rows are unusable" in said
    assert "1 answer with weight 0, such as train-2" in said
    assert "1 message with reasoning_content, such as train-3" in said
    run = prepared(data, **given, max_dropped_share=0.3)
    assert run.returncode == 0, run.stderr
    assert "train: fields that are not used: score (1)\n" in run.stdout
    card = contracts.read(paths.DATA_CARD, DataCard)
    for split in paths.SPLITS:
        first, *others = records.read_rows(paths.split(split), records.Example)
        assert first.history == [{"role": "system", "content": "Always answer in French."}]
        assert [row.id for row in others] == [f"{split}-{number}" for number in range(4, 9)]
        assert {why: gone.rows for why, gone in card.splits[split].dropped.items()} == {
            "answer with weight 0": 1,
            "message with reasoning_content": 1,
        }
        assert card.splits[split].unused == {"score": 1}


# Clear files, clear messages

CSV = "source;target\na b;c\nd e;f\n"
KINDS: dict[str, tuple[str, bytes, str | None]] = {
    "gzip": ("train.jsonl", gzip.compress(b"{}"), "train.jsonl is compressed with gzip: unpack it"),
    "a pointer of Git LFS": (
        "train.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        "train.jsonl is a pointer of Git LFS, not the content: run `git lfs pull`",
    ),
    "Excel's separator": ("train.csv", f"sep=;\n{CSV}".encode(), None),
    "a comma in a quoted name": ("train.csv", b'"source";"target";"note, long"\n"a b";"c";"d"\n"e";"f";"g"\n', None),
    "old Mac line ends": ("train.csv", CSV.replace("\n", "\r").replace("a b", "a, b").encode(), None),
    "pandas' columns": (
        "train.json",
        json.dumps({name: {str(n): "x" for n in range(10_000)} for name in ("text", "summary")}).encode(),
        "to_json(orient='records', lines=True)",
    ),
    "a column missing": ("train.jsonl", b'{"text": "a", "target": "b"}', "source = 'source': no such column\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_or_told_by_what_it_is(data: Path, kind: str) -> None:
    name, content, message = KINDS[kind]
    (data / "train.jsonl").unlink()
    (data / name).write_bytes(content)
    files = {"train": name, "validation": "validation.jsonl", "test": "test.jsonl"}
    given = {"columns": {"source": "source", "target": "target", **COLUMNS}, "files": files}
    if message is None:
        run = prepared(data, **given)
        assert run.returncode == 0, run.stderr
        assert "train: 2 rows in 2 groups, 0 dropped" in run.stdout
    else:
        said = told(data, **given)
        assert message in said
        assert len(said) < 1500
