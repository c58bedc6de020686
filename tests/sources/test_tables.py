"""Files: found by pattern, never outside of the sources; decoded; gettext catalogues; and how each may be broken."""

import random
import struct
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.sources import tables
from pipeline.sources.tables import ABSENT, File
from tests.limits import soon

HEADER = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'


def written(folder: Path, name: str, content: str | bytes) -> File:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return File(name, "some", path)


def read(file: File, encoding: str = "utf-8") -> list[Any]:
    return list(tables.records(file, encoding))


# CSV


def test_a_header_without_a_comma_tells_the_delimiter(tmp_path: Path) -> None:
    for mark in "\t|":
        [(_, row)] = read(written(tmp_path, "d.csv", f"text{mark}summary\n1,5{mark}b; c\n"))
        assert (row["text"], row["summary"]) == ("1,5", "b; c")
    text = '\ufefftext;summary\r\n"one; ""two"",\r\nthree";1,5\r\n'
    [(where, row)] = read(written(tmp_path, "a.csv", text))
    assert where == "a.csv:2"
    assert (row["text"], row["summary"]) == ('one; "two",\r\nthree', "1,5")
    [(_, row)] = read(written(tmp_path, "b.csv", "text,a;b\nx,y\n"))
    assert row["a;b"] == "y"
    with pytest.raises(UserError, match=r"c\.csv:2: 3 fields for 2 columns; quote what holds ';'"):
        read(written(tmp_path, "c.csv", "text;summary\na;b;c\n"))


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


# Gettext


def test_a_catalogues_translated_entries(tmp_path: Path) -> None:
    content = (
        HEADER
        + r"""
# A comment
#, python-format
msgid "One %s"
msgstr "Un "
"\"%s\"\n"

msgctxt "menu"
msgid "Two"
msgstr "Deux"

#, fuzzy, c-format
msgid "Fuzzy"
msgstr "Flou"

msgid "Untranslated"
msgstr ""

msgid "A file"
msgid_plural "Files"
msgstr[0] "Un fichier"
msgstr[1] "Des fichiers"

#~ msgid "Old"
#~ msgstr "Vieux"

#| msgid "Was"
msgid "Last"
msgstr "Dernier"
"""
    )
    file = written(tmp_path, "fr/x.po", content.replace("\n", "\r\n"))
    extra = {"__file__": "fr/x.po", "__source__": "some"}
    assert read(file) == [
        ("fr/x.po:5", {"msgid": "One %s", "msgstr": 'Un "%s"\n', "msgctxt": None, **extra}),
        ("fr/x.po:11", {"msgid": "Two", "msgstr": "Deux", "msgctxt": "menu", **extra}),
        ("fr/x.po:30", {"msgid": "Last", "msgstr": "Dernier", "msgctxt": None, **extra}),
    ]


def compiled(pairs: list[tuple[str, str]], charset: str = "UTF-8") -> bytes:
    """A .mo file, as msgfmt writes it."""
    entries = [("", f"Content-Type: text/plain; charset={charset}\n"), *sorted(pairs)]
    codec = charset if charset != "no-such" else "utf-8"
    blobs = [text.encode(codec) for side in zip(*entries, strict=True) for text in side]
    offset = 28 + 8 * len(blobs)
    table = b""
    for blob in blobs:
        table += struct.pack("<II", len(blob), offset)
        offset += len(blob) + 1
    head = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return head + table + b"".join(blob + b"\0" for blob in blobs)


@pytest.mark.parametrize("charset", ["UTF-8", "ISO-8859-1"])
def test_a_compiled_catalogue(tmp_path: Path, charset: str) -> None:
    pairs = [("One", "Été"), ("menu\x04Two", "Deux"), ("File\0Files", "Fichier\0Fichiers"), ("None", "")]
    found = read(written(tmp_path, "x.mo", compiled(pairs, charset)), "ascii")
    assert [(record["msgctxt"], record["msgid"], record["msgstr"]) for _, record in found] == [
        (None, "One", "Été"),
        ("menu", "Two", "Deux"),
    ]


def test_a_headers_charset_wins_and_its_placeholder_does_not(tmp_path: Path) -> None:
    def catalogue(charset: str) -> bytes:
        return f'{HEADER.replace("UTF-8", charset)}msgid "a"\nmsgstr "é"\n'.encode("latin-1")

    for charset in ("ISO-8859-1", "CHARSET"):
        assert read(written(tmp_path, "x.po", catalogue(charset)), "latin-1")[0][1]["msgstr"] == "é"
    with pytest.raises(UserError, match=r"x\.po:5 is not UTF-8 \(byte \d+\): set the charset of its header to"):
        read(written(tmp_path, "x.po", catalogue("UTF-8")), "latin-1")
    for name, content in [
        ("x.po", catalogue("no-such")),
        ("x.mo", compiled([], "no-such")),
        ("x.po", catalogue("hex")),
    ]:
        with pytest.raises(
            UserError, match=rf"{name}:\d+: the header names the charset '.*', which is not an encoding"
        ):
            read(written(tmp_path, name, content))


@pytest.mark.parametrize(
    ("tail", "told"),
    [
        ('msgid "a"\nmsgstr "cut', r"x\.po:5 is not a line of a gettext catalogue"),
        ('msgid "a"\nmsgstr "cut\\"', r"x\.po:5 is not a line"),
        ('msgid "a" "b"\nmsgstr "c"', r"x\.po:4 is not a line"),
        ('msgid "a"\nmsgstr "b"c"', r"x\.po:5 is not a line"),
        ("hello", r"x\.po:4 is not a line"),
        ('msgstr "a"', r"x\.po:4: an entry of this gettext catalogue is incomplete"),
        ('msgid "a"\nmsgid "b"\nmsgstr "c"', r"x\.po:5: an entry of this gettext catalogue is incomplete"),
        ("#| nonsense here", r"x\.po:4: an entry"),
    ],
)
def test_a_broken_catalogue_is_told_by_its_line(tmp_path: Path, tail: str, told: str) -> None:
    head = "# Nothing\n\n\n" if tail.startswith("msgstr") else HEADER
    with pytest.raises(UserError, match=told):
        read(written(tmp_path, "x.po", head + tail + "\n"))


def test_a_catalogue_that_is_the_path_of_a_file_is_not_that_file(tmp_path: Path) -> None:
    secret = written(tmp_path, "secret.po", HEADER + 'msgid "a"\nmsgstr "secret"\n')
    with pytest.raises(UserError, match=r"x\.po:1 is not a line"):
        read(written(tmp_path, "x.po", str(secret.path)))


@pytest.mark.parametrize("suffix", ["po", "mo"])
def test_no_broken_catalogue_ends_in_anything_but_one_clear_error(tmp_path: Path, suffix: str) -> None:
    pairs = [(f"id {number}", f"é {number}") for number in range(8)]
    entries = "".join(f'#, fuzzy\n\nmsgctxt "c"\nmsgid "{one}"\nmsgstr "{other}"\n\n' for one, other in pairs)
    sound = compiled(pairs) if suffix == "mo" else (HEADER + entries).encode()
    draw = random.Random(suffix)
    outcomes = {"read": 0, "refused": 0, "unnamed": 0}
    for turn in range(600):
        kind = turn % 4
        broken = bytearray(sound)
        if kind == 0:
            del broken[draw.randrange(len(broken)) :]
        elif kind == 1:
            broken = bytearray(draw.randbytes(draw.randrange(200)))
        else:
            for _ in range(draw.randrange(1, 6)):
                broken[draw.randrange(len(broken))] = (
                    draw.choice(b'"\\\n# \x00\xff[m') if kind == 2 else draw.randrange(256)
                )
        try:
            found = read(written(tmp_path, f"x.{suffix}", bytes(broken)))
        except UserError as error:
            outcomes["refused" if str(error).startswith(f"x.{suffix}") else "unnamed"] += 1
        else:
            assert all(isinstance(record["msgstr"], str) for _, record in found)
            outcomes["read"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 20
    assert outcomes["unnamed"] == 0
