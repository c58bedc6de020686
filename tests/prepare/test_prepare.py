"""Preparing the data: formats, cleaning, the leakage guard, limits, the card, and one clear error for each mistake."""

import hashlib
import json
import re
import reprlib
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core import contracts, params, paths
from pipeline.core.contracts import DataCard
from pipeline.core.errors import UserError
from pipeline.core.records import Example, read_rows, sha256_file, sha256_tree
from pipeline.prepare import prepare as data
from pipeline.prepare.leaks import Overlap
from pipeline.prepare.prepare import write_splits
from pipeline.prepare.splits import grouped
from pipeline.prepare.splits import places as places_of
from pipeline.score import significance
from tests.limits import soon

Files = Mapping[str, str | bytes]
Prepare = Callable[..., dict[str, Any]]

COLUMNS = {"source": "text", "target": "summary", "id": None, "group": None, "aspect": None}
ALPHABET = [f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


def words(start: int, count: int = 12) -> str:
    """Distinct words; texts that start 100 apart share none."""
    return " ".join(f"w{number}" for number in range(start, start + count))


def lines(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(source: Any, target: Any = "a target", **more: Any) -> dict[str, Any]:
    return {"text": source, "summary": target, **more}


GOOD = {
    "train.jsonl": lines(
        row(words(0), id=1, part="x"), row(words(100), id=2, part="y"), row(words(200), id=3, part="x")
    ),
    "validation.jsonl": lines(row(words(1000), id=4, part="x")),
    "test.jsonl": lines(row(words(2000), id=5, part="x"), row(words(2100), id=6, part="y")),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Write files to a folder, prepare them in an empty project, and return the card."""
    monkeypatch.chdir(tmp_path)

    def prepare_files(files: Files, /, suffix: str = "jsonl", **changes: Any) -> dict[str, Any]:
        folder = tmp_path / "data"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        section = {
            "source": str(folder),
            "sha256": sha256_tree(folder),
            "format": "table",
            "files": {split: f"{split}.{suffix}" for split in paths.SPLITS},
            "encoding": "utf-8",
            "holdout": {"validation": 0.0, "test": 0.0},
            "columns": COLUMNS,
            "merge_references": False,
            "words": {"min": 1, "max": None},
            "drop_copies": False,
            "limits": {"train": None, "validation": None, "test": None},
            "overlap_threshold": 0.5,
            "max_dropped_share": 1.0,
        }
        write_splits(params.Data.model_validate({**section, **changes}))
        contracts.read(paths.DATA_CARD, DataCard)  # later stages can read it
        card: dict[str, Any] = json.loads(paths.DATA_CARD.read_text())
        return card

    return prepare_files


def rows_of(split: str) -> list[Example]:
    return read_rows(paths.split(split), Example)


def fails(run: Prepare, told: str, files: Files, /, **changes: Any) -> str:
    with pytest.raises(UserError, match=told) as caught:
        run(files, **changes)
    assert not paths.OUT.exists()
    return str(caught.value)


# Formats


def test_aclsum(run: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    def paper(name: str, start: int) -> dict[str, Any]:
        sentences = {"abstract": [f"{words(start)} .", f"{words(start + 50)} ."], "introduction": ["No ."]}
        summary = {"challenge": f"c {name}", "approach": f"a {name}", "outcome": f"o {name}"}
        return {"id": name, "title": "T", "summary": summary, "sentences": sentences}

    files = {
        "set/train.jsonl": lines(paper("p1", 0), paper("p2", 100)),
        "set/val.jsonl": lines(paper("p3", 200)),
        "set/test.jsonl": lines(paper("p4", 300), paper("p5", 500)),
    }
    names = {"train": "set/train.jsonl", "validation": "set/val.jsonl", "test": "set/test.jsonl"}
    card = run(files, format="aclsum", columns=None, files=names)

    assert [row.id for row in rows_of("train")] == [
        f"p{n}/{a}" for n in (1, 2) for a in ("challenge", "approach", "outcome")
    ]
    assert rows_of("test")[1] == Example(
        "p4/approach", "p4", "approach", f"{words(300)} . {words(350)} .", "a p4", f"{words(300)} ."
    )
    assert card["sha256"] == sha256_tree(Path("data"))
    assert card["splits"]["train"] == {
        "read": 6,
        "rows": 6,
        "groups": 2,
        "aspects": {"challenge": 2, "approach": 2, "outcome": 2},
        "source_words": {"min": 26, "median": 26, "max": 26},
        "target_words": {"min": 2, "median": 2, "max": 2},
        "files": ["set/train.jsonl"],
        "held_out": 0,
        "merged": 0,
        "filtered": {},
        "dropped": {},
    }
    assert "train: 6 rows in 2 groups, 0 dropped\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"id": 7}, r"train\.jsonl:1: id must be a string"),
        ({"id": "p", "summary": {}}, r"train\.jsonl:1: sentences\.abstract must be a list of strings"),
        ({"id": "p", "sentences": {"abstract": ["A .", 1]}}, r"train\.jsonl:1: sentences\.abstract must be"),
        (
            {"id": "p", "sentences": {"abstract": ["A ."]}, "summary": {"challenge": ["c"]}},
            r"train\.jsonl:1: summary\.challenge = \['c'\]: must be a string, not list",
        ),
        ({"id": "p", "sentences": {"abstract": ["A ."]}}, r"train\.jsonl:1: summary must be an object with challenge"),
        (
            {"id": "p", "sentences": {"abstract": ["A ."]}, "summary": {"challenge": "c", "method": "m"}},
            r"train\.jsonl:1: summary has 'method' besides ACLSum's challenge, approach, outcome: use data\.format",
        ),
    ],
)
def test_aclsum_of_another_shape(run: Prepare, broken: dict[str, Any], told: str) -> None:
    fails(run, told, {**GOOD, "train.jsonl": lines(broken)}, format="aclsum", columns=None)


def test_summaries_that_are_missing_or_empty_are_dropped_and_counted(run: Prepare) -> None:
    def papers(start: int, summary: dict[str, Any], **more: Any) -> str:
        return lines({"id": f"p{start}", "sentences": {"abstract": [words(start)]}, "summary": summary, **more})

    whole = {"challenge": "c", "approach": "a", "outcome": "o"}
    files = {
        "train.jsonl": papers(0, {"challenge": "c", "approach": None, "method": ""}, doi="d", title="T", pages=[]),
        "validation.jsonl": papers(1000, whole),
        "test.jsonl": papers(2000, {**whole, "outcome": " "}) + papers(3000, whole),
    }
    card = run(files, format="aclsum", columns=None)["splits"]
    assert card["train"]["dropped"] == {"empty target": {"rows": 2, "examples": ["p0/approach", "p0/outcome"]}}
    assert card["test"]["dropped"] == {"empty target": {"rows": 1, "examples": ["p2000/outcome"]}}
    assert card["train"]["unused"] == {"doi": 1}
    assert "unused" not in card["validation"]


def test_every_table_format_gives_the_same_rows(run: Prepare) -> None:
    import datasets

    records = {
        "train": [
            {"key": "007", "text": 'Say "hi", now. Then\ngo.', "summary": "2020-01-01", "of": "g", "kind": "NA"},
            {"key": "1e5", "text": "Émile " * 3, "summary": "true", "of": "g", "kind": "null"},
        ],
        "validation": [{"key": "010", "text": "v", "summary": "3.10", "of": "h", "kind": "k"}],
        "test": [
            {"key": "0x1", "text": "t\u2028t", "summary": "None", "of": "h", "kind": "k"},
            {"key": "0x2", "text": "u", "summary": "nan", "of": "i", "kind": "k"},
        ],
    }
    columns = {"source": "text", "target": "summary", "id": "key", "group": "of", "aspect": "kind"}

    def quoted(rows: list[dict[str, str]], delimiter: str) -> str:
        table = [list(rows[0]), *(list(row.values()) for row in rows)]
        return "\r\n".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in cells) for cells in table)

    written: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
        "jsonl": lambda rows: ("\ufeff" + lines(*rows) + "\n").encode(),
        "json": lambda rows: json.dumps(rows, indent=1).encode(),
        "csv": lambda rows: ("\ufeff" + quoted(rows, ",")).encode(),
        "tsv": lambda rows: quoted(rows, "\t").encode(),
        "parquet": lambda rows: parquet(datasets.Dataset.from_list(rows)),
    }

    def parquet(table: Any) -> bytes:
        table.to_parquet("table.parquet")
        return Path("table.parquet").read_bytes()

    datasets.disable_progress_bars()
    results = []
    for suffix, write in written.items():
        run({f"{split}.{suffix}": write(rows) for split, rows in records.items()}, suffix=suffix, columns=columns)
        results.append([rows_of(split) for split in paths.SPLITS])
    assert results == [results[0]] * 5
    assert results[0][0] == [
        Example("007", "g", "NA", 'Say "hi", now. Then\ngo.', "2020-01-01", 'Say "hi", now.'),
        Example("1e5", "g", "null", "Émile Émile Émile", "true", "Émile Émile Émile"),
    ]
    assert results[0][2][0].source == "t\u2028t"


def test_rows_without_ids_are_numbered_and_equal_sources_share_a_group(run: Prepare) -> None:
    source = f"{words(0)}. Second."
    run({**GOOD, "train.jsonl": lines(row(source, "one"), row(words(100)), row(source, "two"))})
    assert [(row.id, row.group, row.aspect) for row in rows_of("train")] == [
        ("train-1", "train-1", "default"),
        ("train-2", "train-2", "default"),
        ("train-3", "train-1", "default"),
    ]
    assert rows_of("train")[0].lead == f"{words(0)}."


def test_integer_ids_are_names(run: Prepare) -> None:
    run(GOOD, columns={**COLUMNS, "id": "id", "aspect": "part"})
    assert [(row.id, row.aspect) for row in rows_of("train")] == [("1", "x"), ("2", "y"), ("3", "x")]


def test_a_long_csv_field_is_read(run: Prepare) -> None:
    tables = {f"{split}.csv": f"text,summary\n{split} {'x' * 200_000},t\n{split},t\n" for split in paths.SPLITS}
    assert run(tables, suffix="csv")["splits"]["test"]["rows"] == 2


# Mistakes in the input


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ('{"text": "a", "summary": "b"}\n{"text": \n', r"train\.jsonl:2 is not a line of JSON"),
        ('\n"a"\n', r"train\.jsonl:2: must be an object .* not str"),
        ("[1]", r"train\.jsonl, item 1: must be an object .* not int"),
        ("[{]", r"train\.jsonl is not JSON"),
        (lines(row(3)), r"train\.jsonl:1: text = 3: must be a string, not int"),
        (lines(row(["a"])), r"train\.jsonl:1: text = \['a'\]: must be a string, not list"),
        (lines(row("a", {"b": 1})), r"train\.jsonl:1: summary = {'b': 1}: must be a string, not dict"),
        (lines(row("a", ["b", 2])), r"train\.jsonl:1: summary, item 2 = 2: must be a string, not int"),
        ('{"text": "\\ud800", "summary": "b"}', r"train\.jsonl:1: text = .*surrogate"),
        (b'{"text": "a", "summary": "b"}\n{"text": "\xe9"}\n', r"train\.jsonl:2 is not UTF-8 \(byte 40\)"),
        ("", r"data\.files\.train: train\.jsonl holds no rows"),
    ],
)
def test_bad_json(run: Prepare, train: str | bytes, told: str) -> None:
    fails(run, told, {**GOOD, "train.jsonl": train})


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ("text,summary\na,b\nc\n", r"train\.csv:3: 1 fields for 2 columns"),
        ("text,summary\na,b,c\nd,e,f\n", r"train\.csv:2: 3 fields for 2 columns"),  # pandas shifts all columns
        ('text,summary\n"a\nb",c\n"d,e\n', r"train\.csv:4: unexpected end of data"),
        ("text,text\na,b\n", r"train\.csv:1: column names repeat"),
        ("text,summary\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_bad_csv(run: Prepare, train: str, told: str) -> None:
    fails(run, told, {f"{split}.csv": train for split in paths.SPLITS}, suffix="csv")


def test_bad_parquet(run: Prepare) -> None:
    fails(run, r"train\.parquet is not Parquet", {f"{split}.parquet": "?" for split in paths.SPLITS}, suffix="parquet")


def test_parquet_whose_text_is_no_utf8(run: Prepare) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    file = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": text, "summary": ["b"]}), file)
    fails(run, r"train\.parquet is not Parquet", {"train.parquet": file.getvalue().to_pybytes()}, suffix="parquet")


def test_parquet_that_names_other_files_opens_none(run: Prepare, tmp_path: Path) -> None:
    """Its metadata may declare a column of images by their paths, which `datasets` would open to decode them."""
    import pyarrow as pa
    from pyarrow import parquet

    elsewhere = tmp_path / "elsewhere.png"
    features = {"text": {"dtype": "string", "_type": "Value"}, "summary": {"dtype": "string", "_type": "Value"}}
    features |= {"picture": {"_type": "Image"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    picture = pa.array([{"bytes": None, "path": str(elsewhere)}] * 2, kind)
    files = {}
    for split in paths.SPLITS:
        texts = [f"{split} text", f"{split} more"]
        table = pa.table({"text": texts, "summary": ["b", "c"], "picture": picture})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        file = pa.BufferOutputStream()
        parquet.write_table(table.replace_schema_metadata(metadata), file)
        files[f"{split}.parquet"] = file.getvalue().to_pybytes()
    assert run(files, suffix="parquet")["splits"]["train"]["rows"] == 2


def test_unknown_suffix(run: Prepare) -> None:
    fails(run, r"train\.xlsx: '\.xlsx' files cannot be read; use \.jsonl", {"train.xlsx": "?"}, suffix="xlsx")


def test_missing_columns_are_all_named(run: Prepare) -> None:
    told = fails(
        run,
        "has the columns 'text', 'summary', 'id', 'part'",
        GOOD,
        columns={**COLUMNS, "target": "sumary", "id": "zzz"},
    )
    assert "data.columns.target = 'sumary': no such column; did you mean 'summary'?" in told
    assert "data.columns.id = 'zzz': no such column\n" in told + "\n"


def test_a_built_in_column_is_no_guess_for_a_missing_one(run: Prepare) -> None:
    files = {f"{split}.jsonl": lines({"text": words(0), "answer": "b"}) for split in paths.SPLITS}
    told = fails(run, "no such column", files, columns={**COLUMNS, "source": "source", "target": "file"})
    assert "did you mean" not in told


@pytest.mark.parametrize(
    ("orient", "shape"),
    [("columns", "the file is one object of objects: save a record a line (pandas: to_json("), ("records", None)],
)
def test_a_table_of_ten_thousand_rows_in_one_record_is_told_in_short(
    run: Prepare, orient: str, shape: str | None
) -> None:
    numbers = range(10_000)
    column = {name: {str(number): f"{name} {number}" for number in numbers} for name in ("text", "summary")}
    content: Any = column if orient == "columns" else {"data": [row(f"t {number}") for number in numbers]}
    files = {f"{split}.json": json.dumps(content) for split in paths.SPLITS}
    with soon():
        told = fails(run, r"train\.json has the columns ", files, suffix="json", columns={**COLUMNS, "source": "txt"})
    assert len(told) < 1500
    assert (shape or "'data' is a list of records: save that list alone") in told
    if shape:
        assert "'text.19', ... (20,002 in all)" in told
        fails(run, r"train\.json: text holds an object, not a text: the file is one object", files, suffix="json")


def test_missing_file_lists_what_there_is(run: Prepare) -> None:
    files = {"train": "trian.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    fails(run, r"data\.files\.train = 'trian\.jsonl': .* it has train\.jsonl", GOOD, files=files)


@pytest.mark.parametrize("file", ["../outside.jsonl", "/etc/hosts", ".hidden/train.jsonl"])
def test_file_that_the_digest_does_not_cover_is_refused(run: Prepare, file: str) -> None:
    files = {"train": file, "validation": "validation.jsonl", "test": "test.jsonl"}
    fails(run, "only that content is pinned", {**GOOD, ".hidden/train.jsonl": GOOD["train.jsonl"]}, files=files)


def test_source_that_is_a_file(run: Prepare, tmp_path: Path) -> None:
    single = tmp_path / "single.jsonl"
    single.write_text(GOOD["train.jsonl"])
    fails(run, "must lead to the folder", GOOD, source=str(single), sha256=sha256_file(single))


def test_repeated_ids(run: Prepare) -> None:
    train = lines(row(words(0), id="x"), row(words(100), id="x"), row(words(200), id="y"))
    fails(
        run,
        r"train\.jsonl: ids repeat: x \(1 in all\)",
        {**GOOD, "train.jsonl": train},
        columns={**COLUMNS, "id": "id"},
    )


@pytest.mark.parametrize(
    ("value", "told"), [(None, "id is empty"), (" ", "id is empty"), (1.5, "must be a string, not float")]
)
def test_ids_must_be_names(run: Prepare, value: Any, told: str) -> None:
    train = lines(row(words(0), id="x"), row(words(100), id=value))
    fails(
        run,
        rf"train\.jsonl:2: {told}|train\.jsonl:2: id = 1\.5: {told}",
        {**GOOD, "train.jsonl": train},
        columns={**COLUMNS, "id": "id"},
    )


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ("\x1b[31mred", "holds U+001B, a control character: take it out"),
        ("a\0b", "holds U+0000, a control character"),
        ("a\nb", "holds U+000A, a control character"),
        ("a\tb", "holds U+0009, a control character"),
        ("a\x85b", "holds U+0085, a control character"),
        ("a\u2028b", "holds U+2028, a line separator"),
        ("a\u2029b", "holds U+2029, a paragraph separator"),
        ("a\u202eb", "holds U+202E, a bidirectional control"),
        ("a\u2067b", "holds U+2067, a bidirectional control"),
        ("\ufffe", "holds U+FFFE, which is no character"),
        ("\U0010ffff", "holds U+10FFFF, which is no character"),
        ("\ufdd0", "holds U+FDD0, which is no character"),
        ("x" * 1001, "has 1,001 characters, more than "),
    ],
)
@pytest.mark.parametrize("column", ["id", "group", "aspect"])
def test_labels_that_cannot_be_shown_are_refused(run: Prepare, column: str, label: str, told: str) -> None:
    train = lines(row(words(0), id="x"), row(words(100), id=label))
    said = fails(run, re.escape(told), {**GOOD, "train.jsonl": train}, columns={**COLUMNS, column: "id"})
    assert said.startswith(f"train.jsonl:2: id = {reprlib.repr(label)} ")
    assert said.isprintable()


def test_an_aspect_is_shorter_than_an_id_may_be(run: Prepare) -> None:
    train = lines(row(words(0), id="x" * 201))
    run({**GOOD, "train.jsonl": train}, columns={**COLUMNS, "id": "id", "group": "id"})
    with pytest.raises(UserError, match=r"train\.jsonl:1: id = 'x.* has 201 characters, more than 200: shorten it"):
        run({**GOOD, "train.jsonl": train}, columns={**COLUMNS, "aspect": "id"})


@pytest.mark.parametrize(
    "label", ["a", "ça va?", "\u732b", "\u0645\u200f", "a | `b` <c>", "\U0001f600", "constructor", "a b"]
)
def test_labels_of_any_script_are_taken(run: Prepare, label: str) -> None:
    train = lines(row(words(0), id=label))
    run({**GOOD, "train.jsonl": train}, columns={**COLUMNS, "id": "id", "group": "id", "aspect": "id"})
    [found] = rows_of("train")
    assert (found.id, found.group, found.aspect) == (label, label, label)


def test_labels_of_papers_and_conversations_are_refused_as_well(run: Prepare) -> None:
    paper = {"id": "a\x1b", "sentences": {"abstract": ["A ."]}, "summary": {}}
    fails(
        run,
        r"train\.jsonl:1: id = 'a\\x1b' holds U\+001B",
        {"train.jsonl": lines(paper)},
        format="aclsum",
        columns=None,
    )
    spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for key in ("id", "group"):
        train = lines({"messages": spoken, key: "a\x1b"})
        told = rf"train\.jsonl:1: {key} = 'a\\x1b' holds U\+001B"
        fails(run, told, {"train.jsonl": train}, format="chat", columns=None)


def test_a_file_whose_name_cannot_be_shown_is_refused(run: Prepare) -> None:
    files = {**GOOD, "more/a\x1bb.jsonl": GOOD["train.jsonl"]}
    names = {"train": "more/*.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    said = fails(
        run, r"data\.files\.train: the name of the file 'more/a\\x1bb\.jsonl' holds U\+001B", files, files=names
    )
    assert said.isprintable()


def test_more_aspects_than_a_chart_can_hold_are_refused(run: Prepare) -> None:
    many = [row(words(3000 + 100 * i), part=f"part {i}") for i in range(data.MOST_ASPECTS + 1)]
    told = "the test split has 501 aspects, such as part 0, part 1, part 2, part 3, part 4, more than 500: an aspect"
    fails(run, told, {**GOOD, "test.jsonl": lines(*many)}, columns={**COLUMNS, "aspect": "part"})
    run({**GOOD, "test.jsonl": lines(*many[1:])}, columns={**COLUMNS, "aspect": "part"})


def test_full_stops_without_end_take_no_time(run: Prepare) -> None:
    """The leaders of a table of contents, as one line."""
    leaders = [row(f"{number} Introduction {'.' * 20_000}{number} {words(100 * number)}") for number in range(9)]
    with soon():
        card = run({**GOOD, "train.jsonl": lines(*leaders)})
    assert card["splits"]["train"]["rows"] == 9
    assert rows_of("train")[1].lead == f"1 Introduction {'.' * 20_000}1 {words(100)}"


@pytest.mark.parametrize(
    ("test", "columns"),
    [
        ([row(words(2000))], {}),
        ([row(words(2000)), row(words(2000), "another")], {}),
        ([row(words(2000)), row(words(2000).replace("w", "\xadw"), "another")], {}),
        ([row(words(2000), of="g"), row(words(2100), of="g")], {"group": "of"}),
        ([row(words(2000)), row("")], {}),
        ([row(words(2000), of="é"), row(words(2100), of="e\u0301")], {"group": "of"}),
    ],
)
def test_a_test_split_of_one_group_is_refused_before_anything_is_trained(
    run: Prepare, test: list[dict[str, Any]], columns: dict[str, Any]
) -> None:
    """With the words of the comparison, which could not resample it."""
    files = {f"{split}.jsonl": lines(row(words(100 * n), of=f"{split} {n}")) for n, split in enumerate(paths.SPLITS)}
    said = fails(run, "belong to one group", files | {"test.jsonl": lines(*test)}, columns={**COLUMNS, **columns})
    with pytest.raises(UserError) as caught:
        significance.require_groups(1)
    assert said == str(caught.value)


def test_limits_and_holdout_may_leave_one_group_of_test(run: Prepare) -> None:
    limits = {"train": None, "validation": None, "test": 1}
    fails(run, "one group, .* raise data.limits.test", GOOD, limits=limits)


@pytest.mark.parametrize("loss", [row(""), row(words(0), ""), row(words(0)), row(words(2000)), row("short")])
def test_the_card_is_read_whatever_was_lost(run: Prepare, loss: dict[str, Any]) -> None:
    """The comparison, the page and the record read it, hours later."""
    written = run({**GOOD, "train.jsonl": lines(row(words(0)), loss)}, words={"min": 2, "max": None})
    card = contracts.read(paths.DATA_CARD, contracts.DataCard)
    assert contracts.content(card) == written
    gone = card.splits["train"].filtered | card.splits["train"].dropped
    assert [(one.rows, one.examples) for one in gone.values()] == [(1, ["train-2"])]


# Groups in several splits


def customers(start: int, *names: str, **more: Any) -> str:
    return lines(*(row(words(start + 100 * n), by=name, **more) for n, name in enumerate(names)))


def test_declared_groups_in_two_splits_are_counted_and_told(run: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "train.jsonl": customers(0, "a", "b", "b", "c", "\u00e9", "d", "e", "f"),
        "validation.jsonl": customers(2000, "c", "v"),
        "test.jsonl": customers(4000, *"abdefxv", "e\u0301", "a"),
    }
    card = run(files, columns={**COLUMNS, "group": "by"})
    assert card["shared_groups"] == [
        {"split": "test", "other": "train", "shared": 6, "groups": 8, "examples": ["a", "b", "d", "e", "f"]},
        {"split": "validation", "other": "train", "shared": 1, "groups": 2, "examples": ["c"]},
        {"split": "test", "other": "validation", "shared": 1, "groups": 8, "examples": ["v"]},
    ]
    said = capsys.readouterr().out
    assert "6 of 8 test groups are in train as well: a, b, d, e, f, ...; data.holdout" in said
    assert "1 of 2 validation groups is in train as well: c; data.holdout" in said
    assert "1 of 8 test groups is in validation as well: v; data.holdout" in said
    assert contracts.content(contracts.read(paths.DATA_CARD, contracts.DataCard)) == card


def test_groups_of_conversations_and_papers_are_declared_too(run: Prepare) -> None:
    files = {
        f"{split}.jsonl": lines(*(chat(words(1000 * n + 100 * k), "t", group=by) for k, by in enumerate("ab")))
        for n, split in enumerate(paths.SPLITS)
    }
    card = run(files, format="chat", columns=None)
    assert [(one["split"], one["other"], one["shared"]) for one in card["shared_groups"]] == [
        ("test", "train", 2), ("validation", "train", 2), ("test", "validation", 2),
    ]  # fmt: skip


def test_groups_that_nobody_declared_are_not_told(run: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    """They are named after rows, whose ids may be the same in two splits."""
    columns = {**COLUMNS, "id": "id"}
    ids = {
        f"{split}.jsonl": lines(*(row(words(1000 * n + 100 * k), id=k) for k in range(3)))
        for n, split in enumerate(paths.SPLITS)
    }
    assert run(ids, columns=columns)["shared_groups"] == []
    one = {"train.jsonl": customers(0, *(f"c{n}" for n in range(60)))}
    files = {"train": "train.jsonl", "validation": None, "test": None}
    card = run(one, files=files, holdout={"validation": 0.2, "test": 0.2}, columns={**COLUMNS, "group": "by"})
    assert card["shared_groups"] == []
    assert "as well" not in capsys.readouterr().out


def test_a_group_that_is_gone_from_a_split_is_not_told(run: Prepare) -> None:
    files = {**GOOD, "train.jsonl": customers(0, "a", "x")[:-1] + "\n" + lines(row(words(2000), by="t1"))}
    files |= {"validation.jsonl": customers(1000, "v"), "test.jsonl": customers(2000, "t1", "t2")}
    card = run(files, columns={**COLUMNS, "group": "by"})
    assert card["splits"]["train"]["dropped"]["overlaps test"]["rows"] == 1
    assert card["shared_groups"] == []


def test_references_in_another_normal_form_are_told(run: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    run({**GOOD, "test.jsonl": lines(row(words(2000), "cafe\u0301"), row(words(2100), "caf\u00e9"))})
    assert "1 of 2 test rows have references that are not in the normal form NFC" in capsys.readouterr().out
    run(GOOD)
    assert "NFC" not in capsys.readouterr().out


# Cleaning


def test_drops_are_counted_with_reasons_and_examples(run: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    train = lines(
        row(words(0)),
        row(" \n", "t"),
        row(None),
        {"summary": "no text"},
        row(words(100), ""),
        row(words(0)),
        row(words(0), "another target"),
    )
    card = run({**GOOD, "train.jsonl": train})
    assert [row.id for row in rows_of("train")] == ["train-1", "train-7"]
    assert card["splits"]["train"]["read"] == 7
    assert card["splits"]["train"]["dropped"] == {
        "empty source": {"rows": 3, "examples": ["train-2", "train-3", "train-4"]},
        "empty target": {"rows": 1, "examples": ["train-5"]},
        "duplicate": {"rows": 1, "examples": ["train-6"]},
    }
    told = "train: 2 rows in 1 groups, 5 dropped (1 duplicate, 3 empty source, 1 empty target)"
    assert told in capsys.readouterr().out


def test_what_reading_leaves_out_and_changes_is_counted_and_told(
    run: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    train = "\n" + lines(row(f" {words(0)}\n", ["a ", "", None, "b", "a"])) + "\n" + lines(row(words(100), "c"))
    card = run({**GOOD, "train.jsonl": train})["splits"]
    assert card["train"]["changed"] == {
        "white space around texts": 2,
        "empty right answers left out": 2,
        "repeated right answers left out": 1,
    }
    assert card["train"]["blank_lines"] == 2
    printed = capsys.readouterr().out
    assert "train: left out: blank lines (2)\n" in printed
    told = "empty right answers left out (2), repeated right answers left out (1), white space around texts (2)"
    assert f"train: changed: {told}\n" in printed
    for split in ("validation", "test"):
        assert not set(card[split]) & {"left_out", "unused", "changed", "blank_lines", "beyond_limit"}
        assert f"{split}: left out" not in printed


def test_entries_of_catalogues_that_are_no_rows_are_counted_by_split(
    run: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    fuzzy = '#, fuzzy\nmsgid "f"\nmsgstr "g"\n\n'
    files = {
        f"{split}/{name}.po": f'{fuzzy}msgid "{words(1000 * number + start)}"\nmsgstr "t"\n'
        for number, split in enumerate(paths.SPLITS)
        for name, start in (("a", 0), ("b", 100))
    }
    columns = {"source": "msgid", "target": "msgstr", "id": None, "group": None, "aspect": None}
    card = run(files, files={split: f"{split}/*.po" for split in paths.SPLITS}, columns=columns)["splits"]
    assert [card[split]["left_out"] for split in paths.SPLITS] == [{"fuzzy entries": 2}] * 3
    assert "test: left out: fuzzy entries (2)\n" in capsys.readouterr().out


def test_a_catalogue_of_which_nothing_is_a_row_says_why(run: Prepare) -> None:
    files = {f"{split}.po": '#, fuzzy\nmsgid "f"\nmsgstr "g"\n' for split in paths.SPLITS}
    columns = {**COLUMNS, "source": "msgid", "target": "msgstr"}
    fails(run, r"train\.po holds no rows: left out are fuzzy entries \(1\)", files, suffix="po", columns=columns)


def test_same_text_under_two_aspects_is_no_duplicate(run: Prepare) -> None:
    run(
        {
            **GOOD,
            "train.jsonl": lines(row(words(0), a="x"), row(words(0), a="y")),
            **{
                f"{split}.jsonl": lines(row(words(start), a="x"), row(words(start + 50), a="x"))
                for split, start in [("validation", 500), ("test", 900)]
            },
        },
        columns={**COLUMNS, "aspect": "a"},
    )
    assert [row.aspect for row in rows_of("train")] == ["x", "y"]


def test_at_most_five_examples_are_shown(run: Prepare) -> None:
    train = lines(row(words(0)), *[row("")] * 9)
    dropped = run({**GOOD, "train.jsonl": train})["splits"]["train"]["dropped"]["empty source"]
    assert dropped == {"rows": 9, "examples": [f"train-{number}" for number in range(2, 7)]}


def test_too_many_drops_fail_the_stage(run: Prepare) -> None:
    files = {**GOOD, "train.jsonl": lines(*(row(words(100 * n)) for n in range(8)), row(""), row(words(2000)))}
    told = fails(run, "2 of 10 training rows are unusable", files, max_dropped_share=0.1)
    assert "1 empty source, such as train-9" in told
    assert "1 overlaps test, such as train-10" in told
    assert "raise data.max_dropped_share" in told
    assert run(files, max_dropped_share=0.2)["splits"]["train"]["rows"] == 8


def test_split_left_empty(run: Prepare) -> None:
    fails(
        run,
        r"no row of test is left: 1 empty target; correct data\.files\.test",
        {**GOOD, "test.jsonl": lines(row("x", ""))},
    )


# Leaks


def test_leaked_rows_are_dropped_and_counted(run: Prepare) -> None:
    near = f"{words(2000)} tail"  # 5 of its 6 shingles are test's
    files = {
        "train.jsonl": lines(
            row(words(0)),
            row(f"  {words(2000).upper()}\n", "exactly in test"),
            row(near, "nearly in test"),
            row(words(1000), "exactly in validation"),
            row(words(3000), "in both"),
            row("Short one", "exactly in test"),
            row("short one more", "too short to be near"),
        ),
        "validation.jsonl": lines(row(words(1000)), row(words(3000)), row(words(4000))),
        "test.jsonl": lines(row(words(2000)), row(words(3000)), row("short  one")),
    }
    card = run(files)
    assert [row.id for row in rows_of("train")] == ["train-1", "train-7"]
    assert [row.id for row in rows_of("validation")] == ["validation-1", "validation-3"]
    assert len(rows_of("test")) == 3
    assert card["splits"]["train"]["dropped"] == {
        "overlaps test": {"rows": 4, "examples": ["train-2", "train-3", "train-5", "train-6"]},
        "overlaps validation": {"rows": 1, "examples": ["train-4"]},
    }
    assert card["splits"]["validation"]["dropped"] == {"overlaps test": {"rows": 1, "examples": ["validation-2"]}}
    assert card["overlap"] == {
        "train in test": {"exact": 3, "near": 1},
        "train in validation": {"exact": 2, "near": 0},
        "validation in test": {"exact": 1, "near": 0},
    }


INDIC = (
    "भारत सरकार की किसानों के लिए सहायता योजना सोमवार को दिल्ली में शुरू हुई और छात्रों की परीक्षा",
    "भारत सरकार का किसान को लाए सहायता योजना सोमवार की दिल्ला में शुरु हुआ और छात्रा का परीक्षा",
)
"""Sentences that differ in vowel signs: no run of eight words is the same, though their consonants are."""


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_word_is_no_leak_of_one_with_other_vowel_signs(form: Any) -> None:
    one, other = (unicodedata.normalize(form, text) for text in INDIC)
    assert Overlap([one], 0.1).kind(other) is None
    assert Overlap([one], 0.9).kind(f"{one} की") == "near"
    shingles = Overlap([one], 0.1).hashes
    assert len(shingles) == len(one.split()) - 7


@pytest.mark.parametrize(
    "change",
    [
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: text.replace("ö", "\xadö"),
        lambda text: text.replace("e", "e\u200b"),
        lambda text: "".join(chr(ord(one) + 0xFEE0) if "a" <= one <= "z" else one for one in text),
        str.upper,
    ],
    ids=["NFD", "soft hyphens", "zero-width", "full-width", "capitals"],
)
def test_a_leak_is_found_however_it_is_written(run: Prepare, change: Callable[[str], str]) -> None:
    text = "größere Städte wären möglich außer schönen Küsten über dem Meer öfter"
    for suspect, kind in ((text, "exact"), (f"{text} und", "near")):
        card = run(
            {
                **GOOD,
                "train.jsonl": lines(row(words(0)), row(change(suspect))),
                "test.jsonl": lines(row(text), row(words(2000))),
            }
        )
        assert card["overlap"]["train in test"] == {"exact": 0, "near": 0} | {kind: 1}
        assert [one.id for one in rows_of("train")] == ["train-1"]


def test_one_row_in_several_normal_forms_is_a_duplicate(run: Prepare) -> None:
    text, apart = "Ein schöner Tag", unicodedata.normalize("NFD", "Ein schöner Tag")
    train = lines(row(words(0)), row(text, "größer"), row(apart, "größer"), row(text, "gro\xadßer"), row("\u200b"))
    card = run({**GOOD, "train.jsonl": train})
    assert card["splits"]["train"]["dropped"] == {
        "duplicate": {"rows": 1, "examples": ["train-3"]},
        "empty source": {"rows": 1, "examples": ["train-5"]},
    }
    assert [one.source for one in rows_of("train")] == [words(0), text, text]  # as they were
    assert [one.target for one in rows_of("train")] == ["a target", "größer", "gro\xadßer"]


def test_rows_of_one_source_in_several_normal_forms_belong_together(run: Prepare) -> None:
    text, apart = "Ein schöner Tag", unicodedata.normalize("NFD", "Ein schöner Tag")
    test = lines(
        row(text, "größer"), row(apart, unicodedata.normalize("NFD", "größer")), row(apart, "kleiner"), row(words(0))
    )
    files = {**GOOD, "train.jsonl": lines(row(words(3000))), "test.jsonl": test}
    run(files)
    assert [one.group for one in rows_of("test")] == ["test-1", "test-1", "test-4"]  # the second is a duplicate
    card = run(files, merge_references=True)
    assert card["splits"]["test"]["merged"] == 2
    assert [one.references for one in rows_of("test")] == [["größer", "kleiner"], ["a target"]]
    # The place of a text with an ellipsis is that of its own letters: splits of other versions stay.
    kept = int.from_bytes(hashlib.blake2b("find … it".encode(), digest_size=16).digest()[8:]) >> 11
    assert places_of([Example("a", "", "", "ﬁnd … it", "t", "")]) == [kept / 2**53]
    many = [Example(str(i), "", "", one, "t", "") for i, one in enumerate((text, apart, text.upper()))]
    assert len(set(places_of(many))) == 1
    named = [Example(str(i), one, "", f"x{i}", "t", "") for i, one in enumerate((text, apart))]
    assert len(set(places_of(named))) == 1
    assert [one.group for one in grouped(named)] == [text, text]


def test_a_copy_in_another_normal_form_is_a_copy(run: Prepare) -> None:
    train = lines(row(words(0)), row("schön", unicodedata.normalize("NFD", "schön")), row("oﬃce", "office"))
    card = run({**GOOD, "train.jsonl": train}, drop_copies=True)
    assert card["splits"]["train"]["filtered"] == {"target equals source": {"rows": 1, "examples": ["train-2"]}}


def test_threshold_is_met_by_equality_and_by_one_source_alone() -> None:
    held_out = [words(0, 11), words(100, 11)]  # 4 shingles each
    text = f"{words(0, 11)} {words(100, 11)}"  # 15 shingles, 4 of each held-out source
    assert Overlap(held_out, 4 / 15).kind(text) == "near"
    assert Overlap(held_out, 5 / 15).kind(text) is None
    seven_of_25 = f"{words(0, 14)} {words(500, 18)}"
    assert Overlap([words(0, 14)], 0.28).kind(seven_of_25) == "near"  # though 0.28 * 25 > 7 in floating point
    assert Overlap(held_out, 1.0).kind(words(0, 10)) == "near"
    assert Overlap(held_out, 1.0).kind(words(0, 12)) is None


def test_overlap_ignores_case_and_punctuation_but_not_order() -> None:
    overlap = Overlap([" ".join(ALPHABET)], 0.5)
    assert overlap.kind(", ".join(ALPHABET).upper()) == "near"
    assert overlap.kind(" ".join(ALPHABET).title()) == "exact"
    assert overlap.kind(" ".join(reversed(ALPHABET))) is None
    assert overlap.kind("") is None
    assert Overlap([], 0.5).kind(" ".join(ALPHABET)) is None


def test_shingles_agree_with_sets_of_words() -> None:
    """Against the definition, on texts over four words, so that shingles repeat and overlap in part."""
    texts = [" ".join("abcd"[(n * n + k * n // 3 + k) % 4] for n in range(9 + 3 * k)) for k in range(12)]

    def shingles(text: str) -> set[tuple[str, ...]]:
        split = text.split()
        return {tuple(split[n : n + 8]) for n in range(len(split) - 7)}

    compared = 0
    for held_out in ([texts[0], texts[5]], texts[1:4], texts[6:]):
        for threshold in (0.1, 0.3, 0.6, 1.0):
            overlap = Overlap(held_out, threshold)
            for text in texts:
                shared = max(len(shingles(text) & shingles(other)) / len(shingles(text)) for other in held_out)
                assert (overlap.kind(text) is not None) == (shared >= threshold)
                compared += 1
    assert compared == 3 * 4 * 12


def test_a_template_that_all_rows_share_takes_no_square_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts own its shingles. Halves of two templates make rows that are near to nothing, and are no less work."""
    counted, bincount = 0, np.bincount

    def counting(owners: Any) -> Any:
        nonlocal counted
        counted += len(owners)
        return bincount(owners)

    monkeypatch.setattr(np, "bincount", counting)
    one, other = words(0, 30), words(100, 30)
    held_out = [f"{template} {number}" for number in range(2000) for template in (one, other)]
    overlap = Overlap(held_out, 0.6)
    assert {overlap.kind(f"{one} x{number}") for number in range(2000)} == {"near"}
    assert {overlap.kind(f"{one} x{number} {other}") for number in range(2000)} == {None}
    assert {overlap.kind(f"{one} {number}") for number in range(5)} == {"exact"}
    assert 0 < counted < 10 * len(held_out) * 2 * 30


# Limits


def test_limits_take_the_first_whole_groups(run: Prepare) -> None:
    groups = ["a", "b", "a", "c", "d", "d"]
    train = lines(*(row(words(100 * number), of=group) for number, group in enumerate(groups)))
    others = {
        f"{split}.jsonl": lines(*(row(words(start + 50 * number), of=of) for number, of in enumerate("xyz")))
        for split, start in [("validation", 3000), ("test", 4000)]
    }
    columns = {**COLUMNS, "group": "of"}

    def kept(limit: int) -> str:
        limits = {"train": limit, "validation": None, "test": 2}
        card = run({**others, "train.jsonl": train}, columns=columns, limits=limits)
        assert card["splits"]["train"]["read"] <= limit
        return "".join(row.group for row in rows_of("train"))

    assert [kept(limit) for limit in (2, 3, 4, 5, 6, 99)] == ["aa", "aba", "abac", "abac", "abacdd", "abacdd"]


def test_rows_beyond_a_limit_are_counted(run: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"train": 2, "validation": None, "test": 2}
    card = run(GOOD, limits=limits)["splits"]
    assert card["train"]["beyond_limit"] == 1
    assert "beyond_limit" not in card["test"]
    assert "train: rows beyond data.limits.train: 1\n" in capsys.readouterr().out


def test_limit_below_the_first_group(run: Prepare) -> None:
    train = lines(row(words(0), "one"), row(words(0), "two"))
    limits = {"train": 1, "validation": None, "test": None}
    fails(
        run,
        r"data\.limits\.train = 1: the first group, train-1, has 2 rows",
        {**GOOD, "train.jsonl": train},
        limits=limits,
    )


def test_a_limit_of_a_split_that_the_filter_empties(run: Prepare) -> None:
    fails(
        run,
        "no row of validation is left: 1 too few words; correct data.files.validation",
        {**GOOD, "validation.jsonl": lines(row("short", "text"))},
        words={"min": 2, "max": None},
        limits={"train": None, "validation": 5, "test": None},
    )


# Filters


def test_filters_are_counted_apart_from_losses_and_come_before_limits(
    run: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    train = lines(
        row("one two", "one two three"),
        row(words(100, 5), "one two three"),
        row(words(200, 3), "one two three"),
        row(words(300, 3), words(300, 5)),
        row(words(400, 3), f" {words(400, 3)}\n"),
        row(words(500, 3), ""),
        row(words(600, 4), "one two three"),
        row(words(700, 4), "one two three"),
    )
    others = {
        f"{split}.jsonl": lines(*(row(f"{split} {way} four words", "a b c") for way in ("in", "of")))
        for split in ("validation", "test")
    }
    card = run(
        {**others, "train.jsonl": train},
        words={"min": 3, "max": 4},
        drop_copies=True,
        limits={"train": 3, "validation": None, "test": None},
        max_dropped_share=0.4,
    )
    assert [row.id for row in rows_of("train")] == ["train-3", "train-7"]
    facts = card["splits"]["train"]
    assert facts["read"] == 3
    assert facts["filtered"] == {
        "too few words": {"rows": 1, "examples": ["train-1"]},
        "too many words": {"rows": 2, "examples": ["train-2", "train-4"]},
        "target equals source": {"rows": 1, "examples": ["train-5"]},
    }
    assert facts["dropped"] == {"empty target": {"rows": 1, "examples": ["train-6"]}}
    told = "1 dropped (1 empty target), filtered 1 target equals source, 1 too few words, 2 too many words\n"
    assert told in capsys.readouterr().out


def test_copies_are_kept_unless_they_are_filtered_out(run: Prepare) -> None:
    files = {**GOOD, "train.jsonl": lines(row("OK then", "OK  then"), row(words(0)))}
    assert run(files)["splits"]["train"]["rows"] == 2
    assert run(files, drop_copies=True)["splits"]["train"]["rows"] == 1


# Holding out

NAMES = {"train": "train.jsonl", "validation": None, "test": None}


def test_holdout_moves_about_its_share_and_every_row_once(run: Prepare) -> None:
    train = lines(*(row(words(100 * number), f"target {part}") for number in range(400) for part in "ab"))
    card = run({"train.jsonl": train}, files=NAMES, holdout={"validation": 0.1, "test": 0.2})
    facts = card["splits"]
    assert {name: facts[name]["held_out"] for name in facts} == {
        "train": 0,
        "validation": facts["validation"]["rows"],
        "test": facts["test"]["rows"],
    }
    assert 25 <= facts["validation"]["groups"] <= 55
    assert 60 <= facts["test"]["groups"] <= 100
    everything = [row for split in paths.SPLITS for row in rows_of(split)]
    assert sorted(row.id for row in everything) == sorted(f"train-{number}" for number in range(1, 801))
    assert len({row.group for row in everything}) == sum(facts[name]["groups"] for name in facts) == 400


def test_where_a_source_goes_rests_on_it_alone(run: Prepare) -> None:
    def sides(numbers: list[int], test: float) -> dict[str, str]:
        files = {"train.jsonl": lines(*(row(words(100 * number)) for number in numbers))}
        run(files, files=NAMES, holdout={"validation": 0.3, "test": test})
        return {row.source: split for split in paths.SPLITS for row in rows_of(split)}

    some = sides(list(range(60)), 0.2)
    more = sides(list(range(79, -1, -1)), 0.2)  # in another order, with other rows
    assert {source: more[source] for source in some} == some
    larger = sides(list(range(60)), 0.4)
    moved = {(some[source], larger[source]) for source in some}
    assert moved == {("test", "test"), ("train", "test"), ("train", "train"), ("validation", "validation")}


def test_one_side_for_a_group_and_for_a_source_in_several_groups() -> None:
    def made(name: str, group: str, source: str) -> Example:
        return Example(name, group, "default", source, "t", "l")

    chained = [made("1", "a", "one"), made("2", "a", "two"), made("3", "b", "TWO "), made("4", "b", "three")]
    alone = [made(str(number), f"g{number}", f"text {number}") for number in range(200)]
    places = places_of([*chained, *alone])
    assert len(set(places[:4])) == 1
    assert len(set(places)) == 201
    assert 0 <= min(places) < 0.05
    assert 0.95 < max(places) < 1
    assert places_of(alone[::-1]) == places[4:][::-1]
    empty = [made("1", "a", ""), made("2", "b", ""), made("3", "a", "x"), made("4", "b", "y")]
    assert len(set(places_of(empty))) == 2  # what is empty joins nothing


def test_large_groups_are_held_out_as_often_as_small_ones() -> None:
    rows = [
        Example(f"{group}-{number}", f"g{group}", "default", f"{group} {number}", "t", "l")
        for group in range(300)
        for number in range(20)
    ]
    places = places_of(rows)[::20]
    assert 40 <= sum(place < 0.2 for place in places) <= 80


def test_held_out_rows_join_those_of_the_splits_own_files(run: Prepare) -> None:
    train = lines(*(row(words(100 * number), id=f"r{number}") for number in range(40)))
    test = lines(row(words(9000), id="own"))
    columns = {**COLUMNS, "id": "id"}
    files = {"train": "train.jsonl", "validation": None, "test": "test.jsonl"}
    options: dict[str, Any] = {"files": files, "columns": columns, "holdout": {"validation": 0.3, "test": 0.3}}
    card = run({"train.jsonl": train, "test.jsonl": test}, **options)
    names = [row.id for row in rows_of("test")]
    assert names[0] == "own"
    assert len(names) == 1 + card["splits"]["test"]["held_out"] > 3

    test = lines(row(words(9000), id=names[1]))
    with pytest.raises(UserError, match=f"the test split, with its share .*: ids repeat: {names[1]}"):
        run({"train.jsonl": train, "test.jsonl": test}, **options)


def test_held_out_rows_share_the_group_of_their_source(run: Prepare) -> None:
    train = [row(words(100 * number), "one") for number in range(40)]
    files = {
        "train.jsonl": lines(*train),
        "validation.jsonl": lines(row(words(9000))),
        "test.jsonl": lines(*({**one, "summary": "two"} for one in train[:20])),
    }
    card = run(files, holdout={"validation": 0.0, "test": 0.3})
    groups: dict[str, set[str]] = {}
    for one in rows_of("test"):
        groups.setdefault(one.source, set()).add(one.group)
    assert {len(names) for names in groups.values()} == {1}
    facts = card["splits"]["test"]
    assert facts["groups"] == len(groups) < facts["rows"]


def test_nothing_held_out(run: Prepare) -> None:
    fails(
        run,
        r"no row of test is left: none was held out of the training files; correct data\.holdout\.test",
        {"train.jsonl": GOOD["train.jsonl"]},
        files=NAMES,
        holdout={"validation": 0.5, "test": 1e-9},
    )


# Columns


def test_nested_columns(run: Prepare) -> None:
    import datasets

    def pairs(start: int, group: int = 7) -> list[dict[str, Any]]:
        return [{"of": {"n": group}, "translation": {"fr": words(start), "en": "target"}, "translation.en": "literal"}]

    files = {split: pairs(1000 * number) for number, split in enumerate(paths.SPLITS)}
    files["test"] += pairs(5000, group=8)
    columns = {"source": "translation.fr", "target": "translation.en", "id": None, "group": "of.n", "aspect": None}
    run({f"{split}.jsonl": lines(*rows) for split, rows in files.items()}, columns=columns)
    assert rows_of("train") == [Example("train-1", "7", "default", words(0), "literal", words(0))]

    del files["train"][0]["translation.en"]
    datasets.disable_progress_bars()
    written = {}
    for split, rows in files.items():
        datasets.Dataset.from_list(rows).to_parquet("table.parquet")
        written[f"{split}.parquet"] = Path("table.parquet").read_bytes()
    run(written, suffix="parquet", columns=columns)
    assert rows_of("train") == [Example("train-1", "7", "default", words(0), "target", words(0))]

    with pytest.raises(UserError) as caught:
        run(written, suffix="parquet", columns={**columns, "source": "translation.fra"})
    told = str(caught.value)
    assert "has the columns 'of.n', 'translation.fr', 'translation.en', '__file__', '__source__'" in told
    assert "data.columns.source = 'translation.fra': no such column; did you mean 'translation.fr'?" in told


def test_file_and_source_are_columns_of_every_table(run: Prepare) -> None:
    columns = {**COLUMNS, "group": "__file__", "aspect": "__source__"}
    names = {split: f"{split}*.jsonl" for split in paths.SPLITS}
    run({**GOOD, "test-more.jsonl": lines(row(words(5000)))}, columns=columns, files=names)
    assert {(row.group, row.aspect) for row in rows_of("test")} == {
        (f"test{more}.jsonl", "data") for more in ("", "-more")
    }


def test_several_sources_are_folders_of_one_root(run: Prepare, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "more"
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "x.csv").write_text(f"text,summary\n{words(5000)},t\n")
    single = tmp_path / "single.jsonl"
    single.write_text(lines(row(words(6000))))
    for name, content in GOOD.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text(str(content))
    sources = [tmp_path / "data", other, single]
    options: dict[str, Any] = {
        "source": [str(path) for path in sources],
        "sha256": [sha256_tree(tmp_path / "data"), sha256_tree(other), sha256_file(single)],
        "files": {
            "train": ["single.jsonl", "more/**", "data/train.jsonl"],
            "validation": "data/validation.jsonl",
            "test": "data/test.jsonl",
        },
        "columns": {**COLUMNS, "aspect": "__source__"},
    }
    card = run({}, **options)
    assert card["splits"]["train"]["files"] == ["data/train.jsonl", "more/deep/x.csv", "single.jsonl"]
    assert card["source"] == options["source"]
    found = [(row.id, row.aspect) for row in rows_of("train")]
    assert found == [
        ("train-1", "data"),
        ("train-2", "data"),
        ("train-3", "data"),
        ("train-4", "more"),
        ("train-5", "single.jsonl"),
    ]
    with pytest.raises(UserError, match=r"data\.sha256 = '0{64}': the content of .*more is "):
        run({}, **{**options, "sha256": [options["sha256"][0], "0" * 64, options["sha256"][2]]})
    with pytest.raises(UserError, match="several sources are named more, and their files"):
        run({}, **{**options, "source": [str(path) for path in (tmp_path / "data", other, other)]})


# References


def test_a_list_as_target_is_several_references(run: Prepare) -> None:
    train = lines(row(words(0), [" first", "", "second", "first"]), row(words(100), []), row(words(200), [None]))
    card = run({**GOOD, "train.jsonl": train})
    assert [(row.target, row.references) for row in rows_of("train")] == [("first", ["first", "second"])]
    assert card["splits"]["train"]["dropped"]["empty target"]["rows"] == 2
    assert rows_of("test")[0].references == ["a target"]


def test_rows_of_one_source_become_one_example_outside_of_training(run: Prepare) -> None:
    def repeated(start: int) -> str:
        texts = [("one", "x"), ("two", "x"), ("one", "x"), ("three", "y"), ("", "x")]
        return lines(*(row(words(start), target, kind=kind) for target, kind in texts), row("", "t", kind="x"))

    files = {f"{split}.jsonl": repeated(1000 * number) for number, split in enumerate(paths.SPLITS)}
    files["test.jsonl"] += lines(row(words(9000), "four", kind="x"))
    columns = {**COLUMNS, "aspect": "kind"}
    limits = {"train": None, "validation": None, "test": 5}
    card = run(files, columns=columns, merge_references=True, limits=limits)
    assert [(row.id, row.target, row.references, row.group) for row in rows_of("test")] == [
        ("test-1", "one", ["one", "two"], "test-1"),
        ("test-4", "three", ["three"], "test-1"),
        ("test-7", "four", ["four"], "test-7"),
    ]
    assert card["splits"]["test"]["merged"] == 2
    assert card["splits"]["test"]["dropped"] == {
        "empty target": {"rows": 1, "examples": ["test-5"]},
        "empty source": {"rows": 1, "examples": ["test-6"]},
    }
    assert card["splits"]["validation"]["dropped"]["empty source"]["rows"] == 1
    assert [row.references for row in rows_of("train")] == [["one"], ["two"], ["three"]]
    assert card["splits"]["train"]["merged"] == 0
    assert [len(row.references) for row in (run(files, columns=columns), rows_of("test"))[1]] == [1] * 4


# Conversations


def chat(*texts: str, system: str | None = None, **more: Any) -> dict[str, Any]:
    roles = [{"role": "system", "content": system}] if system else []
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"messages": [*roles, *turns], **more}


CHATS = {
    "train.jsonl": lines(
        chat(words(0), "an answer", "And then?", " the target ", system="Be brief."), chat(words(100), "hello")
    ),
    "validation.jsonl": lines(chat(words(1000), "v")),
    "test.jsonl": lines(chat(words(2000), "t"), chat(words(2500), "u")),
}


def test_the_last_answer_is_the_target_and_what_came_before_the_history(run: Prepare) -> None:
    run(CHATS, format="chat", columns=None)
    assert rows_of("train") == [
        Example(
            "train-1", "train-1", "default", "And then?", "the target", "And then?", ["the target"],
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": words(0)},
                {"role": "assistant", "content": "an answer"},
            ],
        ),
        Example("train-2", "train-2", "default", words(100), "hello", words(100)),
    ]  # fmt: skip


def test_sharegpt_and_parquet_give_the_same_conversations(run: Prepare) -> None:
    import datasets

    run(CHATS, format="chat", columns=None)
    expected = [rows_of(split) for split in paths.SPLITS]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt, parquet = {}, {}
    datasets.disable_progress_bars()
    for name, content in CHATS.items():
        records = [json.loads(line) for line in content.splitlines()]
        sharegpt[f"{Path(name).stem}.json"] = json.dumps(
            [
                {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in one["messages"]]}
                for one in records
            ]
        )
        datasets.Dataset.from_list(records).to_parquet("table.parquet")
        parquet[f"{Path(name).stem}.parquet"] = Path("table.parquet").read_bytes()
    for suffix, files in (("json", sharegpt), ("parquet", parquet)):
        run(files, suffix=suffix, format="chat", columns=None)
        assert [rows_of(split) for split in paths.SPLITS] == expected


def test_conversations_may_have_ids_and_groups(run: Prepare) -> None:
    train = lines(chat(words(0), "a", id=7, group="g"), chat(words(100), "b", id=8, group="g"))
    run({**CHATS, "train.jsonl": train}, format="chat", columns=None)
    assert [(row.id, row.group) for row in rows_of("train")] == [("7", "g"), ("8", "g")]
    some = lines(chat(words(0), "a", id=7), chat(words(100), "b"))
    with pytest.raises(UserError, match=r"train\.jsonl:2: id is empty: fill it in every row"):
        run({**CHATS, "train.jsonl": some}, format="chat", columns=None)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (chat("u"), "must end in a message of the user and the assistant's answer, but ends in user"),
        (chat("u", "a", "u"), "must end in .*, but ends in assistant, user"),
        ({"messages": []}, "must end in .*, but ends in nothing"),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]},
            "must .* system, as",
        ),
        ({"messages": [{"role": "tool", "content": "s"}]}, "messages, item 1: role = 'tool': must be system, user, as"),
        ({"messages": [{"role": ["user"], "content": "s"}]}, r"messages, item 1: role = \['user'\]: must be"),
        ({"messages": [{"content": "s"}]}, "messages, item 1: from = None: must be"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"messages, item 1: content = \[1\]: must be a string"),
        ({"messages": ["hi"]}, "messages, item 1: must be an object with role and content"),
        ({"messages": "hi"}, "messages must be a list of messages, not str"),
        ({"text": "hi"}, "has neither messages nor conversations, but text"),
    ],
)
def test_broken_conversations(run: Prepare, broken: dict[str, Any], told: str) -> None:
    train = lines(chat(words(0), "a"), broken)
    fails(run, rf"train\.jsonl:2: {told}", {**CHATS, "train.jsonl": train}, format="chat", columns=None)


def test_a_conversation_leaks_by_what_was_said_not_by_its_last_message_or_its_system_message(run: Prepare) -> None:
    system = words(7000, 40)
    train = lines(
        chat(words(0), "a", "Go on", "b", system=system),  # only the last message is one of test's
        chat(words(2000), "t", "Go on", "something else", system=system),  # all but the answer is test's
        chat(words(2000), "another", system=system),  # begins as one of test does
        chat("Go on", "c", system=system),
        chat("Go on", "c", system="Another."),
    )
    test = lines(chat(words(2000), "t", "Go on", "u", system=system), chat(words(8000), "t", "Go on", "u"))
    card = run({**CHATS, "train.jsonl": train, "test.jsonl": test}, format="chat", columns=None)
    assert [row.id for row in rows_of("train")] == ["train-1", "train-4", "train-5"]
    assert card["overlap"]["train in test"] == {"exact": 1, "near": 1}
    assert [row.group for row in rows_of("test")] == ["test-1", "test-2"]


def test_only_answers_to_the_same_conversation_are_merged(run: Prepare) -> None:
    test = [chat(words(2000), "t", "Go on", answer, system=system) for system in ("S", "T") for answer in "uv"]
    test += [chat(words(3000), "t")]
    run({**CHATS, "test.jsonl": lines(*test)}, format="chat", columns=None, merge_references=True)
    assert [(row.id, row.references, row.group) for row in rows_of("test")] == [
        ("test-1", ["u", "v"], "test-1"),
        ("test-3", ["u", "v"], "test-1"),
        ("test-5", ["t"], "test-5"),
    ]


def test_conversations_that_cannot_be_used_are_dropped_in_every_split(
    run: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    def unlearnt(start: int) -> dict[str, Any]:
        record = chat(words(start), "a")
        record["messages"][-1]["weight"] = 0
        return record

    more = {
        name: lines(unlearnt(9000 + 100 * number), chat(words(9500 + 100 * number), "b", tools=["f"], source="s"))
        for number, name in enumerate(CHATS)
    }
    files = {name: more[name] + content for name, content in CHATS.items()}
    card = run(files, format="chat", columns=None)["splits"]
    for split in paths.SPLITS:
        assert card[split]["dropped"] == {
            "answer with weight 0": {"rows": 1, "examples": [f"{split}-1"]},
            "conversation with tools": {"rows": 1, "examples": [f"{split}-2"]},
        }
        assert card[split]["read"] == card[split]["rows"] + 2
    assert [row.id for row in rows_of("train")] == ["train-3", "train-4"]
    told = "train: 2 rows in 2 groups, 2 dropped (1 answer with weight 0, 1 conversation with tools)\n"
    assert told in capsys.readouterr().out
    shares = {"format": "chat", "columns": None, "max_dropped_share": 0.4}
    told = "2 of 4 training rows are unusable"
    with pytest.raises(UserError, match=told) as caught:
        run(files, **shares)
    assert "1 answer with weight 0, such as train-1" in str(caught.value)
    assert "1 conversation with tools, such as train-2" in str(caught.value)


def test_a_split_of_which_every_conversation_is_dropped_says_so(run: Prepare) -> None:
    files = {**CHATS, "test.jsonl": lines(chat(words(2000), "b", tools=["f"]))}
    fails(run, "no row of test is left: 1 conversation with tools", files, format="chat", columns=None)


def test_ids_do_not_clash_behind_a_file_with_dropped_conversations(run: Prepare) -> None:
    files = {**CHATS, "train-0.jsonl": lines(chat(words(3000), "b", tools=["f"]), chat(words(4000), "c"))}
    names = {split: f"{split}*.jsonl" for split in paths.SPLITS}
    run(files, format="chat", columns=None, files=names)
    assert [row.id for row in rows_of("train")] == ["train-2", "train-3", "train-4"]


# Text encodings and catalogues, from end to end; their details are tested in test_tables.py


def test_catalogues_give_pairs(run: Prepare) -> None:
    def catalogue(start: int) -> str:
        header = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=ISO-8859-1\\n"\n'
        return f'{header}\nmsgctxt "menu"\nmsgid "{words(start)}"\nmsgstr "été"\n'

    files = {f"{split}/fr.po": catalogue(1000 * number).encode("latin-1") for number, split in enumerate(paths.SPLITS)}
    columns = {"source": "msgstr", "target": "msgid", "id": None, "group": None, "aspect": "msgctxt"}
    files["test/fr.po"] += f'\nmsgctxt "menu"\nmsgid "{words(5000)}"\nmsgstr "une"\n'.encode()
    names = {split: f"{split}/*.po" for split in paths.SPLITS}
    with pytest.raises(UserError, match="no row of train is left"):
        run(files, files=names, columns=columns)  # all three have one source, so train's and validation's are leaked
    run(files, files=names, columns={**columns, "source": "msgid", "target": "msgstr"})
    assert rows_of("train") == [Example("train-1", "train-1", "menu", words(0), "été", words(0))]


def test_an_encoding_is_declared(run: Prepare) -> None:
    files = {
        f"{split}.csv": f"text,summary\n{split} à la carte,t\n{split} à,t\n".encode("cp1252") for split in paths.SPLITS
    }
    fails(run, r"train\.csv:2 is not UTF-8 \(byte 19\): set data\.encoding to", files, suffix="csv")
    run(files, suffix="csv", encoding="cp1252")
    assert rows_of("test")[0].source == "test à la carte"


# Scripts


def test_in_a_script_without_spaces_each_character_is_a_word(run: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    def text(start: int) -> str:
        return "".join(chr(0x4E00 + number) for number in range(start, start + 30))

    files = {
        "train.jsonl": lines(row(text(0), "猫狗跑"), row(text(100), "猫狗"), row(text(1005), "猫狗跑")),
        "validation.jsonl": lines(row(text(2000), "猫狗跑")),
        "test.jsonl": lines(row(text(1000), "猫狗跑"), row(text(3000), "猫狗跑")),
    }
    card = run(files, words={"min": 3, "max": None}, max_dropped_share=0.5)
    assert [one.id for one in rows_of("train")] == ["train-1"]
    train = card["splits"]["train"]
    assert train["filtered"] == {"too few words": {"rows": 1, "examples": ["train-2"]}}
    assert train["dropped"] == {"overlaps test": {"rows": 1, "examples": ["train-3"]}}
    assert train["source_words"] == {"min": 30, "median": 30, "max": 30}
    told = "100% of the test references' letters lie outside a-z: ROUGE then needs evaluate.rouge_tokenizer: unicode"
    said = capsys.readouterr().out
    assert told in said
    assert "100% of the test references' letters are in scripts without spaces between words: BLEU then needs" in said
    run(GOOD)
    said = capsys.readouterr().out
    assert "a-z" not in said
    assert "without spaces" not in said


def test_conversations_in_a_table_are_told_of_their_format(run: Prepare) -> None:
    told = "these are conversations: data.format: chat makes source and target of them"
    fails(run, told, {**GOOD, "train.jsonl": lines(chat("a", "b"))})


# What it is good for


def test_the_size_of_the_test_set_is_judged_before_anything_is_trained(
    run: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    test = lines(*(row(words(5000 + 100 * number)) for number in range(25)))
    run({**GOOD, "test.jsonl": test})
    told = f"25 test rows are likely to show a difference of {significance.planned(25):.1f} points in ROUGE-1"
    assert told in capsys.readouterr().out


# The whole


def test_equal_input_gives_equal_bytes_and_leaves_no_cache(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in paths.DATA.iterdir()}

    run(GOOD)
    first = outputs()
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    run(GOOD)
    assert outputs() == first
    assert sorted(first) == ["card.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    assert not Path("home").exists()


def test_changed_data_are_refused(run: Prepare) -> None:
    fails(run, "data.sha256 = ", GOOD, sha256="0" * 64)
