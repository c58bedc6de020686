"""Files: found by pattern, never outside of the sources; decoded; JSON and Parquet; and how each may be broken."""

import json
import random
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.sources import tables
from pipeline.sources.account import Account
from pipeline.sources.tables import ABSENT, File
from tests.limits import soon
from tests.made.files import cells, read, written

# Finding


@pytest.fixture
def there(tmp_path: Path) -> dict[str, File]:
    for name in (
        "b.csv",
        "a.csv",
        "deep/a.csv",
        "deep/er/c.csv",
        "deep/er/c.tsv",
        "odd[1].csv",
        ".git/a.csv",
        "x/.y/z.csv",
    ):
        written(tmp_path / "root", name, "")
    written(tmp_path, "outside.csv", "")
    return tables.files({"root": tmp_path / "root"}, several=False)


def test_a_pattern_matches_as_trying_all_ways_does() -> None:
    def tried(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
        if not pattern or not parts:
            return not parts and all(part == "**" for part in pattern)
        if pattern[0] == "**":
            return tried(parts, pattern[1:]) or tried(parts[1:], pattern)
        return fnmatchcase(parts[0], pattern[0]) and tried(parts[1:], pattern[1:])

    draw, matching = random.Random(0), 0
    for _ in range(20_000):
        parts = tuple(draw.choices(("a", "b", "ab"), k=draw.randrange(6)))
        pattern = tuple(draw.choices(("a", "**", "*", "b*"), k=draw.randrange(6)))
        assert tables._matches(parts, pattern) == tried(parts, pattern), (parts, pattern)
        matching += tables._matches(parts, pattern)
    assert matching > 1000
    with soon():
        assert not tables._matches(("a",) * 100, ("**", "a") * 25 + ("x",))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("a.csv", ["a.csv"]),
        ("./deep/er/c.csv", ["deep/er/c.csv"]),
        ("*.csv", ["a.csv", "b.csv", "odd[1].csv"]),
        ("[ab].csv", ["a.csv", "b.csv"]),
        ("odd[1].csv", ["odd[1].csv"]),
        ("*/a.csv", ["deep/a.csv"]),
        ("**/a.csv", ["a.csv", "deep/a.csv"]),
        ("deep/**", ["deep/a.csv", "deep/er/c.csv", "deep/er/c.tsv"]),
        ("**/**/c.*", ["deep/er/c.csv", "deep/er/c.tsv"]),
        (["b.csv", "a.csv", "?.csv"], ["a.csv", "b.csv"]),
    ],
)
def test_files_are_found_by_path_and_pattern_sorted_and_once(
    there: dict[str, File], wanted: str | list[str], found: list[str]
) -> None:
    assert [file.name for file in tables.select(there, wanted, "data.files.train")] == found


def test_nothing_hidden_and_nothing_outside_is_there(there: dict[str, File]) -> None:
    names = {file.name for pattern in ("*", "**", "**/*", "*/*/*") for file in tables.select(there, pattern, "k")}
    assert names == set(there)
    assert len(names) == 6
    for wanted in (
        "/etc/hosts",
        "../outside.csv",
        "deep/../../outside.csv",
        ".git/a.csv",
        "x/.*/z.csv",
        ["a.csv", "../*"],
    ):
        with pytest.raises(UserError, match="data.files.test = .*: must lie in data.source, and not be hidden"):
            tables.select(there, wanted, "data.files.test")


def test_a_linked_folder_is_refused_and_not_left_out(there: dict[str, File], tmp_path: Path) -> None:
    assert there
    (tmp_path / "root" / "linked").symlink_to(tmp_path)
    with pytest.raises(UserError, match="linked is a link to a folder"):
        tables.files({"root": tmp_path / "root"}, several=False)


def test_what_matches_nothing_shows_what_there_is(there: dict[str, File], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train = 'deep': data.source has no such file; it has deep/a.csv, deep/er/c"):
        tables.select(there, "deep", "data.files.train")
    with pytest.raises(UserError, match=r"it has deep/er/c.tsv, deep/er/c.csv"):
        tables.select(there, ["a.csv", "deep/er/c.tsb"], "data.files.train")
    with pytest.raises(UserError, match=r"train = '\*.po': .* it has a.csv, b.csv"):
        tables.select(there, "*.po", "data.files.train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it has no files"):
        tables.select(tables.files({"empty": tmp_path / "empty"}, several=False), "**", "data.files.train")


def test_several_sources_begin_the_paths(tmp_path: Path) -> None:
    places = {name: written(tmp_path, path, "").path for name, path in [("one", "1/a.csv"), ("b.csv", "b.csv")]}
    places["two"] = written(tmp_path, "2/deep/c.csv", "").path.parents[1]
    found = tables.files(places, several=True)
    assert [(name, file.source) for name, file in found.items()] == [
        ("b.csv", "b.csv"),
        ("one/a.csv", "one"),
        ("two/deep/c.csv", "two"),
    ]


# Values


def test_a_dot_leads_into_an_object_unless_a_column_is_so_named() -> None:
    record = {"a": {"b": {"c": 1}, "d": None}, "a.d": "literal", "e": "text"}
    assert tables.value(record, "a.b.c") == 1
    assert tables.value(record, "a.d") == "literal"
    assert tables.value({"a": {"d": None}}, "a.d") is None
    for missing in ("x", "a.x", "a.b.c.d", "e.f", "a.", ""):
        assert tables.value(record, missing) is ABSENT
    assert tables.columns([("here", record), ("there", {"f": {}})]) == ["a.b.c", "a.d", "e", "f"]


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_wins(tmp_path: Path, encoding: str) -> None:
    file = written(tmp_path, "a.csv", "text\nété\n".encode(encoding))
    assert read(file, "cp1252")[0][1]["text"] == "été"


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-32-be"])
def test_a_big_endian_mark_as_well(tmp_path: Path, encoding: str) -> None:
    file = written(tmp_path, "a.jsonl", '\ufeff{"text": "été"}\n'.encode(encoding))
    assert read(file)[0][1]["text"] == "été"


def test_a_declared_encoding_is_used(tmp_path: Path) -> None:
    assert read(written(tmp_path, "a.csv", "text\nпривет\n".encode("koi8-r")), "koi8-r")[0][1]["text"] == "привет"


@pytest.mark.parametrize(
    ("content", "encoding", "told"),
    [
        (b"text\na\n\xe9\n", "utf-8", r"a\.csv:3 is not UTF-8 \(byte 7\): set data\.encoding to the encoding"),
        (b"\xef\xbb\xbftext\n\xe9\n", "cp1252", r"a\.csv:2 is not UTF-8 \(byte 8\): it is what its first bytes ann"),
        ("text\né\n".encode("utf-16") + b"\x00", "utf-8", r"a\.csv:3 is not UTF-16-LE \(byte 16\)"),
        ("text\né\n".encode(), "ascii", r"a\.csv:2 is not ASCII \(byte 5\)"),
        (b"text\n\x81\n", "cp1252", r"a\.csv:2 is not CP1252 \(byte 5\)"),
        (b"text-\xff\n", "punycode", r"a\.csv:1 is not PUNYCODE"),
    ],
)
def test_what_cannot_be_decoded_is_told_by_its_line(tmp_path: Path, content: bytes, encoding: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        read(written(tmp_path, "a.csv", content), encoding)


def test_a_json_file_may_be_one_object_over_several_lines(tmp_path: Path) -> None:
    ((where, record),) = read(written(tmp_path, "a.json", '{\n "a": {"b": "c"}\n}\n'))
    assert where == "a.json"
    assert tables.value(record, "a.b") == "c"
    with pytest.raises(UserError, match=r"a\.json is not JSON"):
        read(written(tmp_path, "a.json", '{\n "a": 1\n'))
    with pytest.raises(UserError, match=r"a\.jsonl:1 is not a line of JSON"):
        read(written(tmp_path, "a.jsonl", '{\n "a": 1\n}\n'))


def test_a_json_file_is_read_whole_in_every_layout(tmp_path: Path) -> None:
    one, two = {"a": "x", "b": {"c": [1]}}, {"a": "y\u2028", "b": None}
    layouts = {
        "lines.json": f"{json.dumps(one)}\n{json.dumps(two, ensure_ascii=False)}\n",
        "lines.jsonl": f"\n{json.dumps(one)}\r\n\r\n{json.dumps(two)}",
        "mac.jsonl": f"{json.dumps(one)}\r{json.dumps(two)}\r",
        "list.json": json.dumps([one, two], indent=1),
        "list.jsonl": json.dumps([one, two]),
    }
    for name, content in layouts.items():
        assert cells(written(tmp_path, name, content)) == [list(one.values()), list(two.values())], name
    for content in (json.dumps(one), json.dumps(one, indent=2), json.dumps(one, indent=2).replace("{\n", "{", 1)):
        assert cells(written(tmp_path, "one.json", content)) == [list(one.values())]
    account = Account()
    read(written(tmp_path, "lines.jsonl", layouts["lines.jsonl"]), account=account)
    assert account.blank_lines == 2


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', r"a\.jsonl:2 is not a line of JSON: the key 'a' repeats"),
        ("a.jsonl", '{"m": [{"role": 1, "role": 2}]}', r"a\.jsonl:1 is not .* the key 'role' repeats in one object"),
        ("a.json", '[{"a": 1, "a": 1}]', r"a\.json is not JSON: the key 'a' repeats"),
        ("a.json", '{\n"a": 1,\n"a": 2\n}', r"a\.json is not JSON: the key 'a' repeats"),
        ("a.jsonl", '{"a": 1} {"a": 2}', r"a\.jsonl:1 is not a line of JSON: Extra data: .*: write one value a line"),
        ("a.json", '{\n"a": 1\n}\n{\n"a": 2\n}\n', r"a\.json is not JSON: it has several values, one after another"),
        ("a.json", "[1]\n[2]", r"a\.json is not JSON: Extra data"),
        ("a.jsonl", '{"a": 1}\n\ufeff{"a": 2}\n', r"a\.jsonl:2 begins with a byte order mark, as joined files do"),
        ("a.json", '\ufeff\ufeff{"a": 2}\n', r"a\.json:1 begins with a byte order mark"),
        ("a.jsonl", '{"a": 1}\n// a comment\n', r"a\.jsonl:2 is not a line of JSON"),
        ("a.jsonl", '{"a": "\0"}', r"a\.jsonl:1 holds NUL"),
        ("a.jsonl", '{"__source__": "mine"}', r"a\.jsonl:1: has a column __source__, which is the name of one"),
    ],
)  # fmt: skip
def test_json_that_would_lose_a_value_is_refused_by_its_line(
    tmp_path: Path, name: str, content: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        read(written(tmp_path, name, content))


def test_parquet_gives_every_value_or_says_why_not(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(
        {
            "word": pa.array(["a", None]).dictionary_encode(),
            "nested": pa.array([{"x": "1", "y": None}, None]),
            "list": pa.array([["a", None], []]),
            "large": pa.array(["b", "c"], pa.large_string()),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    assert cells(File("a.parquet", "some", tmp_path / "a.parquet")) == [
        ["a", {"x": "1", "y": None}, ["a", None], "b"],
        [None, None, [], "c"],
    ]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet is not Parquet"):
        read(File("b.parquet", "some", tmp_path / "b.parquet"))


def test_a_whole_table_in_one_record_is_told_by_its_shape() -> None:
    def shape(record: dict[str, Any]) -> str:
        return tables.shape([("a", record | {"__file__": "a", "__source__": "b"})]) or ""

    assert "'data' is a list of records" in shape({"version": "1", "data": [{"a": 1}]})
    assert "to_json(orient='records', lines=True)" in shape({"text": {"0": "a"}, "summary": {"0": "b"}})
    assert not shape({"text": "a", "of": {"n": 1}})
    assert not shape({"text": "a", "summary": ["b"]})
    assert tables.shape([]) is None


# YAML


def test_yaml_is_one_list_of_mappings_or_one_mapping_and_its_words_are_words(tmp_path: Path) -> None:
    listed = written(tmp_path, "a.yml", b"- text: 'no'\n  answer: no\n- {text: 1963, answer: '1963'}\n")
    found = [(where, dict(record)) for where, record in tables.records(listed, "utf-8")]
    of = {"__file__": "a.yml", "__source__": found[0][1]["__source__"]}
    assert found == [
        ("a.yml, item 1", {"text": "no", "answer": "no"} | of),
        ("a.yml, item 2", {"text": 1963, "answer": "1963"} | of),
    ]
    alone = written(tmp_path, "b.yaml", "talks: [[caf\u00e9, ouvert]]\n".encode("cp1252"))
    ((where, record),) = tables.records(alone, "cp1252")
    assert (where, record["talks"]) == ("b.yaml", [["caf\u00e9", "ouvert"]])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [1", r"a.yml is not YAML: "),
        (b"a: 1\na: 2\n", r"a.yml is not YAML: "),
        (b"just words\n", r"a.yml: must be a mapping with the columns as keys, not str"),
        (b"- 1\n", r"a.yml, item 1: must be a mapping with the columns as keys, not int"),
        (b"- {1: a}\n", r"a.yml, item 1: the key 1 is not a text: put it in quotation marks"),
        (b"a: &x [1]\nb: *x\n", r"a.yml:2: the alias \*x stands for another part of the file"),
        (b"caf\xe9: 1\n", r"a.yml:1 is not UTF-8"),
    ],
)
def test_what_is_no_table_of_yaml_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(UserError, match=told):
        list(tables.records(written(tmp_path, "a.yml", content), "utf-8"))
