"""Preparing the data: formats, cleaning, the leakage guard, limits, the card, and one clear error for each mistake."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline import params, paths
from pipeline.data import Overlap, prepare
from pipeline.errors import UserError
from pipeline.records import Example, read_rows, sha256_file, sha256_tree

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
            "columns": COLUMNS,
            "limits": {"train": None, "validation": None, "test": None},
            "overlap_threshold": 0.5,
            "max_dropped_share": 1.0,
        }
        prepare(params.Data.model_validate({**section, **changes}))
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
        "set/test.jsonl": lines(paper("p4", 300)),
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
    ],
)
def test_aclsum_of_another_shape(run: Prepare, broken: dict[str, Any], told: str) -> None:
    fails(run, told, {**GOOD, "train.jsonl": lines(broken)}, format="aclsum", columns=None)


def test_every_table_format_gives_the_same_rows(run: Prepare) -> None:
    import datasets

    records = {
        "train": [
            {"key": "007", "text": 'Say "hi", now. Then\ngo.', "summary": "2020-01-01", "of": "g", "kind": "NA"},
            {"key": "1e5", "text": "Émile " * 3, "summary": "true", "of": "g", "kind": "null"},
        ],
        "validation": [{"key": "010", "text": "v", "summary": "3.10", "of": "h", "kind": "k"}],
        "test": [{"key": "0x1", "text": "t\u2028t", "summary": "None", "of": "h", "kind": "k"}],
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
    tables = {f"{split}.csv": f"text,summary\n{split} {'x' * 200_000},t\n" for split in paths.SPLITS}
    assert run(tables, suffix="csv")["splits"]["test"]["rows"] == 1


# Mistakes in the input


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ('{"text": "a", "summary": "b"}\n{"text": \n', r"train\.jsonl:2 is not a line of JSON"),
        ('\n"a"\n', r"train\.jsonl:2: must be an object .* not str"),
        ("[1]", r"train\.jsonl, item 1: must be an object .* not int"),
        ("[{]", r"train\.jsonl is not JSON"),
        (lines(row(3)), r"train\.jsonl:1: text = 3: must be a string, not int"),
        (lines(row("a", ["b"])), r"train\.jsonl:1: summary = \['b'\]: must be a string, not list"),
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


def test_unknown_suffix(run: Prepare) -> None:
    fails(run, r"train\.xlsx: '\.xlsx' files cannot be read; use \.jsonl", {"train.xlsx": "?"}, suffix="xlsx")


def test_missing_columns_are_all_named(run: Prepare) -> None:
    told = fails(
        run, "has the columns text, summary, id, part", GOOD, columns={**COLUMNS, "target": "sumary", "id": "zzz"}
    )
    assert "data.columns.target = 'sumary': no such column; did you mean summary?" in told
    assert "data.columns.id = 'zzz': no such column\n" in told + "\n"


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


def test_same_text_under_two_aspects_is_no_duplicate(run: Prepare) -> None:
    run(
        {
            **GOOD,
            "train.jsonl": lines(row(words(0), a="x"), row(words(0), a="y")),
            **{
                f"{split}.jsonl": lines(row(words(start), a="x"))
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
        r"no row of test is left: 1 empty target; mend data\.files\.test",
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


# Limits


def test_limits_take_the_first_whole_groups(run: Prepare) -> None:
    groups = ["a", "b", "a", "c", "d", "d"]
    train = lines(*(row(words(100 * number), of=group) for number, group in enumerate(groups)))
    others = {
        f"{split}.jsonl": lines(row(words(start), of="z")) for split, start in [("validation", 3000), ("test", 4000)]
    }
    columns = {**COLUMNS, "group": "of"}

    def kept(limit: int) -> str:
        limits = {"train": limit, "validation": None, "test": 1}
        card = run({**others, "train.jsonl": train}, columns=columns, limits=limits)
        assert card["splits"]["train"]["read"] <= limit
        return "".join(row.group for row in rows_of("train"))

    assert [kept(limit) for limit in (2, 3, 4, 5, 6, 99)] == ["aa", "aba", "abac", "abac", "abacdd", "abacdd"]


def test_limit_below_the_first_group(run: Prepare) -> None:
    train = lines(row(words(0), "one"), row(words(0), "two"))
    limits = {"train": 1, "validation": None, "test": None}
    fails(
        run,
        r"data\.limits\.train = 1: the first group, train-1, has 2 rows",
        {**GOOD, "train.jsonl": train},
        limits=limits,
    )


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
