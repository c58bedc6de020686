"""Untrusted input: whatever is in a file, reading it ends, soon, in a result or in one clear error.

Thousands of inputs, drawn with fixed seeds: sound files in which something was changed, doubled, cut out or replaced,
and inputs made by hand that once ended in a traceback or not at all.
"""

import copy
import csv
import io
import json
import random
import re
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import pytest
from ruamel.yaml import YAML

from pipeline import probes
from pipeline.core import git, params, paths, progress, records
from pipeline.core import text as sentences
from pipeline.core.errors import UserError, without_passwords
from pipeline.fetch import fetch, gguf_layout
from pipeline.model.prompt import Encoder
from pipeline.prepare import cells, chats, leaks, prepare, splits
from pipeline.record import address, lockfile
from pipeline.report import figures, page, wording
from pipeline.report import marks as overlap
from pipeline.score import faithfulness, metrics
from pipeline.search import trial
from pipeline.sources import source, tables, wheels
from pipeline.sources.account import Account
from tests import ROOT
from tests.limits import soon
from tests.made.comparison import comparison
from tests.made.gguf_files import write_gguf
from tests.made.vocabularies import KINDS

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")


def told(call: Callable[[], object]) -> str:
    """What a user is told; empty where the input was read. Any other exception fails the test."""
    with soon():
        try:
            call()
        except UserError as error:
            text = str(error)
            assert text.strip()
            assert len(text) < 20_000, text[:1000]
            assert "Traceback" not in text
            text.encode("utf-8", "backslashreplace")
            return text
    return ""


def mutated(draw: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by what parsers trip over."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        start = draw.randrange(len(changed) + 1)
        end = min(len(changed), start + draw.choice((1, 1, 2, 8, 64)))
        match draw.randrange(5):
            case 0:
                changed[start:end] = draw.randbytes(end - start)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end] * draw.choice((1, 2, 50))
            case 3:
                del changed[start:]
            case 4:
                changed[start:end] = draw.choice(
                    (b"\0", b"\n", b"\r", b'"', b"'", b"\\", b"{", b"[", b"]", b": ", b"- ", b"&a ", b"*a", b"? ",
                     b"!!int ", b"!!binary ", b"!!timestamp x", b"%YAML 9", b"---\n", b"<<: ", b"\xff", b"\xef\xbb\xbf",
                     b"\xff\xfe", b"\\ud800", b"1e999", b"9" * 5000, b"NaN", b"null", b"[" * 300, b"\xe2\x80\xa8")
                )  # fmt: skip
        if not changed:
            break
    return bytes(changed)


def overwritten(draw: random.Random, content: bytes) -> bytes:
    """One byte changed: everything stays in its place."""
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


# Each letter stands for nine of the one before.
BOMB = b"a: &a [x]\n" + b"".join(b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefghijkl")


pytestmark = pytest.mark.slow


class TestParams:
    ANYTHING: tuple[Any, ...] = (
        None, True, -1, 0, 10**30, 1.5, float("nan"), float("-inf"), "", "x" * 500, "\x1b[2J", "\ud800", [], [None],
        [[["x"]]], {}, {"a": 1}, {1: 2}, {None: {}}, b"\xff", {(1, 2): 3},
    )  # fmt: skip

    def test_any_value_at_any_place(self) -> None:
        draw = random.Random(0)
        default = YAML(typ="safe", pure=True).load(TEXT)
        default["compare"]["published"] = [{"metric": "rouge1", "value": 1.0, "about": "a paper"}]
        refused = 0
        for _ in range(2000):
            content = copy.deepcopy(default)
            for _ in range(draw.choice((1, 1, 3))):
                where: Any = content
                while True:
                    keys: list[Any] = list(where) if isinstance(where, dict) else list(range(len(where)))
                    if not keys:
                        break
                    key = draw.choice(keys)
                    if isinstance(where[key], dict | list) and draw.random() < 0.7:
                        where = where[key]
                        continue
                    if isinstance(where, dict) and draw.random() < 0.3:
                        where[draw.choice(("", "sorce", 5, None, True, "a.b", "\n"))] = draw.choice(self.ANYTHING)
                    else:
                        where[key] = draw.choice(self.ANYTHING)
                    break
            refused += bool(told(lambda content=content: params.check(content, "params.yaml")))  # type: ignore[misc]
        assert refused > 1500

    def test_any_text(self, tmp_path: Path) -> None:
        draw = random.Random(1)
        file = tmp_path / "params.yaml"
        bare = "".join(f"{line}\n" for line in TEXT.splitlines() if line.partition("#")[0].strip())
        refused = 0
        for _ in range(120):
            file.write_bytes(mutated(draw, bare.encode()))
            refused += bool(told(lambda: params.load(file)))
        assert refused > 60

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"\xff\xfe\x00\x00", "is not"),
            (b"data: caf\xe9", "is not UTF-8"),
            (b"[" * 1000, "cannot be read as YAML"),
            (BOMB, "the alias *a stands for another part"),
            (b"data: 2001-99-99", "cannot be read as YAML"),
            (b"data: !!python/object/apply:os.system [touch pwned]", "is not YAML"),
            (b"data: !!timestamp x", "is not YAML"),
            (b"data: 1\ndata: 2", "is not YAML"),
            (b"? {a: 1}\n: 2", ""),
            (b"", "must hold sections"),
        ],
    )  # fmt: skip
    def test_made_by_hand(self, content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("params.yaml").write_bytes(content)
        assert said in told(params.load)
        assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]

    def test_an_unknown_key_within_a_list_is_told(self) -> None:
        content = YAML(typ="safe", pure=True).load(TEXT)
        content["compare"]["published"] = [{"metric": "rouge1", "value": 1.0, "abuot": "a paper"}]
        assert "compare.published.0.abuot = 'a paper': unknown key; did you mean about?" in told(
            lambda: params.check(content, "params.yaml")
        )

    def test_an_interpolation_at_any_place(self) -> None:
        draw = random.Random(6)
        default = YAML(typ="safe", pure=True).load(TEXT)
        default["compare"]["published"] = [{"metric": "rouge1", "value": 1.0, "about": "a paper"}]
        for _ in range(300):
            content = copy.deepcopy(default)
            where: Any = content
            while True:
                keys: list[Any] = list(where) if isinstance(where, dict) else list(range(len(where)))
                key = draw.choice(keys)
                if not isinstance(where[key], dict | list) or not where[key]:
                    break
                where = where[key]
            text = draw.choice(("${oc.env:HF_TOKEN}", "a${b", "${", "x ${oc.decode:${y}} z"))
            if isinstance(where, dict) and draw.random() < 0.5:
                where[text] = where.pop(key)
            else:
                where[key] = text
            assert "write the value itself" in told(lambda content=content: params.check(content, "params.yaml"))  # type: ignore[misc]


class TestLocks:
    PARTS = ("..", ".", "", "out", "data", "link", "~", "\\", "a b", "\0", "/", "...", "-", "*", "..\\..")

    def test_any_path_stays_inside(self, tmp_path: Path) -> None:
        project, victim = tmp_path / "a" / "project", tmp_path / "victim"
        (project / "out" / "data").mkdir(parents=True)
        victim.mkdir()
        for folder in (project, project / "out"):
            (folder / "link").symlink_to(tmp_path, target_is_directory=True)
        places = (str(victim), str(victim)[1:], "victim")
        draw = random.Random(7)
        refused = 0
        for _ in range(600):
            parts = [draw.choice((*self.PARTS, *self.PARTS[:1] * 4, *places)) for _ in range(draw.randrange(1, 7))]
            path = "/".join(parts)
            lock = {"schema": "2.0", "stages": {"a": {"cmd": "b", "outs": [{"path": path, "md5": "0" * 32}]}}}
            (project / "dvc.lock").write_text(json.dumps(lock))
            refused += bool(told(lambda: trial._forget_tests(project, [])))
            assert victim.is_dir(), path
            assert project.is_dir(), path
        assert 200 < refused < 600

    def test_any_digest_is_the_name_of_a_content(self) -> None:
        draw = random.Random(8)
        for _ in range(300):
            md5 = "".join(draw.choices("0123456789abcdefABCDEFg./\\ \n", k=draw.choice((31, 32, 32, 33, 36))))
            lock = json.dumps({"stages": {"a": {"cmd": "b", "outs": [{"path": "out", "md5": md5}]}}})
            said = told(lambda lock=lock: lockfile.stages_of(lock, "dvc.lock"))  # type: ignore[misc]
            assert said or re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5)


@cache
def section(kind: str, encoding: str = "utf-8") -> params.Data:
    content = YAML(typ="safe", pure=True).load(TEXT)["data"]
    columns = {"source": "text", "target": "summary", "id": "id", "group": "by", "aspect": None}
    content |= {"format": kind, "encoding": encoding, "columns": columns if kind == "table" else None}
    return params.Data.model_validate(content)


def read(file: Path, given: params.Data) -> list[records.Example]:
    """The rows of a file as `prepare` reads and writes them."""
    there = tables.File(file.name, "source", file)
    rows = prepare.examples(given, "train", there, 0)
    records.write_rows(file.with_name("written"), rows)
    return rows


ROWS = {
    "table": '{"text": "Ein Satz.", "summary": ["a", "b"], "id": 1, "by": "x", "more": {"deep": [1.5, null]}}\n'
    '{"text": "Noch einer \\u00e9.", "summary": "c", "id": 2, "by": "y"}\n',
    "aclsum": '{"id": "p1", "sentences": {"abstract": ["One.", "Two."]}, '
    '"summary": {"challenge": "a", "approach": "b", "outcome": "c"}}\n',
    "chat": '{"id": "c", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, '
    '{"role": "assistant", "content": "a"}]}\n{"id": "d", "conversations": [{"from": "human", "value": "q"}, '
    '{"from": "gpt", "value": "a"}]}\n',
}
CATALOGUE = (
    '# one\nmsgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n'
    '"Plural-Forms: nplurals=2; plural=n>1;\\n"\n\n'
    '#: a.c:1\n#, fuzzy\nmsgid "Save"\nmsgstr "Sichern"\n\n'
    'msgctxt "menu"\nmsgid "Open \\"x\\""\nmsgstr ""\n"Öffnen"\n\n'
    'msgid "one file"\nmsgid_plural "%d files"\nmsgstr[0] "eine Datei"\nmsgstr[1] "%d Dateien"\n\n'
    '#~ msgid "old"\n#~ msgstr "alt"\n'
)


class TestRows:
    @pytest.mark.parametrize("kind", ROWS)
    def test_any_json(self, kind: str, tmp_path: Path) -> None:
        draw = random.Random(2)
        file = tmp_path / "train.jsonl"
        outcomes = []
        for number in range(700):
            given = section(kind, draw.choice(("utf-8", "utf-8", "cp1252", "utf-16", "utf-7", "gb18030")))
            file.write_bytes(ROWS[kind].encode() if number == 0 else mutated(draw, ROWS[kind].encode()))
            outcomes.append(told(lambda given=given: read(file, given)))  # type: ignore[misc]
        assert 300 < sum(map(bool, outcomes)) < 700
        assert all(one.startswith("train.jsonl") for one in outcomes if one)

    @pytest.mark.parametrize("suffix", [".csv", ".tsv"])
    def test_any_fields(self, suffix: str, tmp_path: Path) -> None:
        draw = random.Random(3)
        file = tmp_path / f"train{suffix}"
        sound = '"text","summary","id","by"\n"a ""b"", c","d",1,x\n"e\nf",g,2,y\n'
        sound = sound.replace(",", "\t" if suffix == ".tsv" else ",")
        outcomes = []
        for number in range(400):
            file.write_bytes(sound.encode() if number == 0 else mutated(draw, sound.encode()))
            outcomes.append(told(lambda: read(file, section("table"))))
        assert 100 < sum(map(bool, outcomes)) < 400

    @pytest.mark.parametrize(
        "content",
        [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900, b'{"\\ud800": 1}', b'{"text": 1e999}',
         b'{"text": ' + b"9" * 5000 + b"}", b"\0" * 100, b'{"id": "\\ud800", "text": "a", "summary": "b"}'],
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ROWS)
    def test_made_by_hand(self, content: bytes, kind: str, tmp_path: Path) -> None:
        file = tmp_path / "train.jsonl"
        file.write_bytes(content)
        assert told(lambda: read(file, section(kind)))

    def test_a_paper_whose_name_is_no_text(self, tmp_path: Path) -> None:
        file = tmp_path / "train.jsonl"
        file.write_text(ROWS["aclsum"].replace('"p1"', '"\\ud800"'))
        assert "train.jsonl:1: id = '\\ud800': holds half of a surrogate pair" in told(
            lambda: read(file, section("aclsum"))
        )


class TestNothingIsLost:
    """Whatever a record holds comes back as it was, is counted, or is refused: the sums agree."""

    PIECES = ('"', '""', "a", "b c", " ", ",", "'", "\\", "é", "\ufeff", "\u2028", '"x"', ";", "|", "# ")

    def fields(self, draw: random.Random, more: str) -> list[list[str]]:
        pieces = (*self.PIECES, *more)
        return [
            ["x", "y", "z"],
            *(["".join(draw.choices(pieces, k=draw.randrange(4))) for _ in range(3)] for _ in range(4)),
        ]

    @pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
    def test_any_table_that_a_program_wrote(self, delimiter: str, tmp_path: Path) -> None:
        draw = random.Random(9)
        file = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
        whole = 0
        for _ in range(250):
            quoting: Literal[0, 1] = draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
            table = self.fields(draw, "\t\n")
            text = io.StringIO()
            csv.writer(
                text, delimiter=delimiter, quoting=quoting, lineterminator=draw.choice(("\n", "\r\n"))
            ).writerows(table)
            whole += self.is_read(file, text.getvalue(), table, quoting == csv.QUOTE_ALL)
        assert whole > 200

    def test_any_table_with_tabs_that_nothing_quoted(self, tmp_path: Path) -> None:
        draw = random.Random(10)
        whole = 0
        for _ in range(250):
            table = self.fields(draw, "")
            whole += self.is_read(tmp_path / "a.tsv", "\n".join(map("\t".join, table)), table, False)
        assert whole > 150

    def is_read(self, file: Path, text: str, table: list[list[str]], must_be: bool) -> bool:
        """Whether the text is read, which is then as the table; else it is refused, which some texts must not be."""
        found: list[list[str]] = []
        file.write_text(text, encoding="utf-8", newline="")

        def read_all() -> None:
            located = tables.records(tables.File(file.name, "source", file), "utf-8")
            found.extend([record["x"], record["y"], record["z"]] for _, record in located)

        said = told(read_all)
        joined = any(row[0].startswith("\ufeff") for row in table)
        assert not (said and must_be and not joined), (text, said)
        if said:
            assert said.startswith(f"{file.name}:")
        else:
            assert found == table[1:], text
        return not said

    def test_any_header_with_a_name_twice(self, tmp_path: Path) -> None:
        draw = random.Random(11)
        for _ in range(100):
            names = [draw.choice("abcdef") for _ in range(draw.randrange(2, 7))]
            file = tmp_path / draw.choice(("a.csv", "a.tsv"))
            delimiter = "\t" if file.suffix == ".tsv" else draw.choice(",;|")
            file.write_text(f"{delimiter.join(names)}\n{delimiter.join('1' for _ in names)}\n")
            there = tables.File(file.name, "source", file)
            said = told(lambda there=there: list(tables.records(there, "utf-8")))  # type: ignore[misc]
            assert ("column names repeat" in said) == (len(set(names)) < len(names))

    def test_any_object_with_a_key_twice(self, tmp_path: Path) -> None:
        draw = random.Random(12)
        file = tmp_path / "a.jsonl"

        def made(depth: int, twice: bool) -> str:
            """An object in JSON; `twice`: it, or one within it, has a key twice."""
            keys = draw.sample("abcdef", 3)
            within = twice and depth > 0 and draw.random() < 0.7
            values = (
                [made(depth - 1, within), "[" + made(depth - 1, False) + "]", "1"] if depth else ["1", "null", "{}"]
            )
            pairs = [f'"{key}": {value}' for key, value in zip(keys, values, strict=True)]
            if twice and not within:
                key = keys[0] if draw.random() < 0.5 else f"\\u{ord(keys[0]):04x}"
                pairs.insert(draw.randrange(4), f'"{key}": {draw.choice(("1", "null", "[]"))}')
            return "{" + ", ".join(pairs) + "}"

        there = tables.File(file.name, "source", file)
        for number in range(200):
            twice = number % 2 == 1
            file.write_text("{}\n" + made(draw.randrange(3), twice) + "\n")
            said = told(lambda: list(tables.records(there, "utf-8")))
            assert said.startswith("a.jsonl:2 is not a line of JSON: the key") == twice, file.read_text()

    VALUES: tuple[Any, ...] = (
        None,
        "",
        "x",
        0,
        1,
        0.5,
        True,
        False,
        [],
        ["x"],
        {},
        {"a": None},
        {"a": "x"},
        "[]",
        "null",
    )
    BESIDE = (*chats.BESIDE, *chats.SYSTEM, *chats.NOT_WANTED, "score", "source", "conversations")
    WITHIN = (*chats.WITHIN, *chats.LEARN, "weight", "mood", "value", "from")

    def test_any_fields_of_a_chat(self, tmp_path: Path) -> None:
        draw = random.Random(13)
        file = tmp_path / "train.jsonl"
        read_whole = dropped = refused = 0
        for _ in range(500):
            turns = [
                {"role": role, "content": f"text of {role}"} for role in ("user", "assistant") * draw.choice((1, 2))
            ]
            record: dict[str, Any] = {"messages": turns}
            for _ in range(draw.randrange(4)):
                if draw.random() < 0.5:
                    record[draw.choice(self.BESIDE)] = draw.choice(self.VALUES)
                else:
                    draw.choice(turns)[draw.choice(self.WITHIN)] = draw.choice(self.VALUES)
            file.write_text(json.dumps(record))
            account = Account()
            rows: list[records.Example] = []
            there = tables.File(file.name, "source", file)

            def read_all(
                there: tables.File = there, account: Account = account, rows: list[records.Example] = rows
            ) -> None:
                rows.extend(prepare.examples(section("chat"), "train", there, 0, account))

            if said := told(read_all):
                assert said.startswith("train.jsonl:1: ")
                refused += 1
                continue
            assert len(rows) + account.dropped_records == 1
            if account.dropped:
                dropped += 1
                continue
            read_whole += 1
            said_before = [turn["content"] for turn in rows[0].history]
            for name, value in record.items():
                if not cells.is_empty(value) and name in chats.SYSTEM:
                    assert said_before[0] == value
                elif not cells.is_empty(value) and name != "messages":
                    assert account.unused[name] == 1
                    assert name not in chats.BESIDE
            for name in {name for turn in turns for name in turn} - {"role", "content", "weight", *chats.LEARN}:
                held = sum(not cells.is_empty(turn.get(name)) for turn in turns)
                assert account.unused[f"messages.{name}"] == held
                assert not (held and name in chats.WITHIN)
        assert min(read_whole, dropped, refused) > 20


UNITS = (
    ".", ". ", ".  ", "...x ", ".'", ".''", ". ''", "'", '"', "”", " ”", ")", " ", "\t", "\n", " \n", "\xa0", "\x0c",
    "\x1c", "\u2028", "<", "<p", "<br ", "</a", "<!--", "&", "&a", "&#1", "&lt;", "&amp;amp;", "www.", "://", "//",
    "//a:", "@", "?a=", "&key=", "#", "_", "\\", "`", "a.a.", "A.", "A. ", "1", "1. ", "0", "[", "{", "] ", "-\n",
    "-", "a", "y", "ing ", "ab ", "some words. go on. ", "\u0301", "a\u0301", "\u0915\u094d", "\u732b", "\u732b. ",
    "\u3002", "\U0001f600", "\u0130", "\ufffe", "\0", "\u0301\u0327", "\xad", "\u200b", "\u0e19\u0e35\u200b", "\uff26",
)  # fmt: skip


PARTS = (
    "a", "E", "é", "Ö", "ở", "ß", "ς", "İ", "ffi", "x", "1", ".", "...", "?!", ",", "'", "-", "\xad", "\u200d",
    "\u200c",
    "की", "कि", "क्ष", "தொ", "কো", "عَ", "می", "ที่", "か\u3099", "が", "한국", "猫", "\u0301", "\u0327\u0301",
)  # fmt: skip


def scored(name: str, **change: Any) -> Callable[[str], object]:
    given = evaluation(name, **change)
    return lambda text: metrics.chosen(given)[0].statistics([text, "a short text"], [["a short text"], [text]])


def marks(name: str, **change: Any) -> Callable[[str], object]:
    split = overlap.splitter(name, evaluation(name, **change))

    def of(text: str) -> None:
        found = split(text)
        overlap.closest(found, [found, []])
        page.marked(text, overlap.shared(found, found)[0])

    return of


def not_in_source(text: str) -> None:
    faithfulness.Sources([records.Example("1", "1", "", text, "t", "")]).beyond([[text]])


def evaluation(name: str, **change: Any) -> params.Evaluate:
    content = YAML(typ="safe", pure=True).load(TEXT)["evaluate"]
    return params.Evaluate.model_validate(content | {"metrics": [name]} | change)


class TestText:
    """However long a run of whatever is, time grows as the text does: doubled three times, it would be 64 times as long
    if it grew with the square."""

    @pytest.mark.parametrize(
        "read",
        [sentences.sentences, sentences.lead, sentences.words, probes.without_tags, wording.markdown, wording.html,
         wording.shown, page.embedded, splits.plain, lambda text: leaks.Overlap([text], 0.5).kind(f"{text} more"),
         without_passwords],
        ids=["sentences", "lead", "words", "without_tags", "markdown", "html", "shown", "embedded", "plain", "overlap",
             "without_passwords"],
    )  # fmt: skip
    def test_a_long_run(self, read: Callable[[str], object]) -> None:
        with soon():
            for unit in UNITS:
                for before, behind in (("", ""), ("A.", ".x"), ("<p>", "&")):
                    read(before + unit * (50_000 // len(unit)) + behind)

    @pytest.mark.parametrize(
        "read",
        [scored("rouge1"), scored("rouge2", use_stemmer=True), scored("rougeLsum"), scored("chrf"), scored("bleu"),
         scored("exact_match"), scored("token_f1"), marks("token_f1"), not_in_source,
         scored("rougeL", use_stemmer=False, rouge_tokenizer="unicode"), scored("bleu", bleu_tokenizer="intl"),
         scored("bleu", bleu_tokenizer="zh"), scored("bleu", bleu_tokenizer="char"), marks("rouge1"), marks("bleu"),
         marks("chrf")],
        ids=["rouge1", "stemmed", "rougeLsum", "chrf", "bleu", "exact_match", "token_f1", "marks-token_f1",
             "not_in_source", "unicode", "intl", "zh", "char", "marks", "marks-bleu",
             "marks-chrf"],
    )  # fmt: skip
    def test_scores_and_marks_of_a_long_run(self, read: Callable[[str], object]) -> None:
        with soon():
            for unit in UNITS:
                read("A." + unit * (10_000 // len(unit)) + ".x")

    def test_a_text_is_the_same_in_every_normal_form(self) -> None:
        """As a leak, as an answer, and in its marks; whatever marks, joiners and punctuation stand in it."""
        draw = random.Random(9)
        given = evaluation("rouge1", use_stemmer=False, rouge_tokenizer="unicode")
        rouge, split = metrics.chosen(given)[0], overlap.splitter("rouge1", given)
        differ = 0
        for _ in range(300):
            text = " ".join("".join(draw.choices(PARTS, k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 24)))
            composed, apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
            differ += composed != apart
            other = " ".join(draw.sample(composed.split(), len(composed.split())))
            for one in (text, composed, apart, f"\u200b{composed}\xad"):
                assert leaks.Overlap([text], 0.5).kind(one) == "exact"
                assert leaks.Overlap([other], 0.1).kind(one) == leaks.Overlap([other], 0.1).kind(text)
                assert rouge.statistics([one], [[other]]) == rouge.statistics([text], [[other]])
                assert [word.key for word in split(one)] == [word.key for word in split(text)]
            assert sentences.foreign_share([apart]) == sentences.foreign_share([composed])
            assert len(sentences.words(apart)) == len(sentences.words(composed))
        assert differ > 100

    def test_many_words_that_the_text_does_not_have(self) -> None:
        """BLEU's tokenizer takes out a hyphen at a line's end: no such word is found in the text."""
        with soon():
            marks("bleu")(" ".join(f"a{i}-\nb" for i in range(40_000)))


class TestPrompts:
    """Texts with names of control tokens, with characters of many parts, with whatever: all of them fit, and nothing in
    them is a control token."""

    PARTS = (
        "<|end|>", "<|user|>", "<|assistant|>", "<|bos|>", "</s>", "<s>", "[INST]", "<|", "|>", "end", "<", "cat",
        "dog ", " ", "\n", "\u00e9", "e\u0301", "\u0301", "\u200d", "\ufe0f", "\U0001f642",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u0e01\u0e33",
        "\u1100\u1161\u11a8", "\u4e16", "\ufb01", "\uff1c|end|\uff1e", "\u2581",
        "\U000f0000", "\ue000", "{source}", "{{ 1 }}", "\u202e", "\r\n", "x" * 40,
    )  # fmt: skip

    @pytest.mark.parametrize("kind", ["bytes", "pieces, a space always", "merges that make specials"])
    def test_any_text_fits_and_holds_no_control_token(self, kind: str) -> None:
        tokenizer, draw = KINDS[kind](), random.Random(9)
        content = YAML(typ="safe", pure=True).load(TEXT)["prompt"]
        content |= {"template": "{source}|{instruction}", "instructions": {"default": "Say."}, "truncate_source": True}
        encoders = {limit: Encoder(tokenizer, params.Prompt.model_validate(content | {"max_tokens": limit}), 4096)
                    for limit in (80, 120, 200, 4096)}  # fmt: skip
        special = {at for at, one in tokenizer.added_tokens_decoder.items() if one.special} - {tokenizer.unk_token_id}
        usual = [
            one for one in encoders[4096].prompt(records.Example("a", "a", "", "cat", "dog", "")) if one in special
        ]
        cut = odd = 0
        for _ in range(150):
            text = "cat" + "".join(draw.choices(self.PARTS, k=draw.choice((1, 5, 20, 60))))
            example = records.Example("a", "a", "", text, text, "")
            for limit, encoder in encoders.items():
                made = encoder.made(example)
                assert len(made.ids) <= limit
                assert [one for one in made.ids if one in special] == usual, text
                if kind == "bytes":
                    assert "\ufffd" not in tokenizer.decode(made.ids)
                cut += made.lost > 0
            odd += made.controls
            completion = encoder.row(example).completion
            assert [one for one in completion if one in special] == [encoder.end]
            if kind == "bytes":
                assert tokenizer.decode(completion, skip_special_tokens=True) == text
        assert cut > 50
        assert odd > 50


class TestLabels:
    PARTS = (
        "a", "B", "word", " ", "  ", "-", "_", ".", "/", "\\", "'", '"', "`", "<b>", "&amp;", "|", "\n", "\t", "\r",
        "\0", "\x1b[31m", "\x7f", "\x85", "\ufffe", "\uffff", "\U0001ffff", "\ufdd0", "\ud800", "\u2028", "\u2029",
        "\u202e", "\u2066", "\u200b", "\u200f", "\ufeff", "\u0301", "\u732b", "\U0001f600",
        "\U0001f468\u200d\U0001f469", "\U000e0041", "constructor", "__proto__", "toString", "null", "${x}", "{{x}}",
        "]]>", "=1+1", "\u0378", "\ue000", "x" * 150, "\U0001f600" * 40, "\ufdfd" * 40,
    )  # fmt: skip

    def test_any_label_is_refused_or_can_be_drawn(self, tmp_path: Path) -> None:
        draw = random.Random(6)
        file = tmp_path / "train.jsonl"
        content = YAML(typ="safe", pure=True).load(TEXT)["data"]
        columns = {"source": "text", "target": "summary", "id": "id", "group": "by", "aspect": "aspect"}
        given = params.Data.model_validate(content | {"format": "table", "columns": columns})
        taken: dict[str, None] = {}
        refused = 0
        labels = [*self.PARTS, *("".join(draw.choices(self.PARTS, k=draw.choice((1, 2, 5)))) for _ in range(600))]
        for label in labels:
            column = draw.choice(("id", "by", "aspect"))
            row = {"text": "a", "summary": "b", "id": "i", "by": "g", "aspect": "x"} | {column: label}
            file.write_text(json.dumps(row))
            if said := told(lambda: read(file, given)):
                assert said.startswith(f"train.jsonl:1: {column} ")
                assert said.isprintable()
                refused += 1
            else:
                taken[label.strip()] = None
        assert refused > 200
        assert len(taken) > 150
        one = comparison().aspects[0]
        drawn = replace(comparison(), aspects=[replace(one, name=label[:200]) for label in taken])
        chart = figures.drawn(figures._aspects(drawn, figures.FILE), figures.FILE)
        assert len(list(ElementTree.fromstring(chart).iter())) > len(taken)


class TestAddresses:
    """A secret is a run of letters that no other part of an address has, so that any part of it is found."""

    SECRETS = (
        "qzx{}", "QZX{}", "qzx%40{}", "qzx@{}", "@qzx{}@", "qzx:{}", "qzx'{}", 'qzx"{}', "qzx/{}", "qzx?{}", "qzx#{}",
        "qzx&{}", "qzx={}", "qzx%2F{}", "qzx+{}/==", "hf_qzx{}", "qzx{}" * 30, "qzx({})", "qzx,{};", "qzx\u00e9{}",
    )  # fmt: skip
    SCHEMES = (
        "http", "https", "postgresql", "postgresql+psycopg2", "mysql", "mssql+pyodbc", "s3", "ftp", "redis", "ssh",
        "git+https", "ray", "hdfs", "x-y.z",
    )  # fmt: skip
    HOSTS = ("host", "host.example", "host:5000", "127.0.0.1", "[::1]:5000", "localhost")
    PATHS = ("", "/", "/simple/demo", "/a@b", "/api/2.0/mlflow/runs/search", "/db")
    NAMES = (
        "token", "access_token", "api_key", "apikey", "key", "password", "pwd", "PASSWD", "secret", "auth", "code",
        "client_secret", "sig", "sv", "se", "X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "Signature",
        "AWSAccessKeyId", "Expires", "odbc_connect", "a", "", "%74oken", "next", "amp;token",
    )  # fmt: skip
    AROUND = (
        "{}", "'{}'", '"{}"', "({})", "<{}>", "see {}, then", "{}: refused", "a {} b {} c@d", "line\n{}\n", "{},{}",
        '{{"uri":"{}","more":1}}', "url: {}.", "`{}`",
    )  # fmt: skip

    def address(self, draw: random.Random) -> str:
        secret = draw.choice(self.SECRETS).replace("{}", "jvw")
        address, query = f"{draw.choice(self.SCHEMES)}://", ""
        match draw.randrange(4):
            case 0:
                address += f"user:{secret}@"
            case 1:
                # A name alone, such as a token: nothing in it is taken for the end of the host.
                address = address.replace("ssh", "http") + secret.translate(dict.fromkeys(map(ord, "/?#:"))) + "@"
            case 2:
                # What ends a value is no part of it.
                query = draw.choice("?#") + draw.choice(("", "mode=ro&", "a=1&"))
                query += f"{draw.choice(self.NAMES)}={secret.translate(dict.fromkeys(map(ord, '&#')))}"
            case 3:
                address += f":{secret}@"
        return address + draw.choice(self.HOSTS) + draw.choice(self.PATHS) + query

    def test_no_secret_of_any_address_is_told(self) -> None:
        draw = random.Random(7)
        for _ in range(3000):
            text = draw.choice(self.AROUND).format(*(self.address(draw) for _ in range(2)))
            told = str(UserError(text))
            assert not re.search("qzx|jvw", told, re.IGNORECASE), (text, told)
            assert without_passwords(told) == told, text

    def test_an_address_with_a_secret_is_refused_wherever_parameters_have_one(self) -> None:
        draw = random.Random(8)
        content = YAML(typ="safe", pure=True).load(TEXT)
        for _ in range(300):
            address = self.address(draw)
            changed = copy.deepcopy(content)
            changed["tracking"]["uri"] = address
            for said in (
                told(lambda changed=changed: params.check(changed, "params.yaml")),  # type: ignore[misc]
                *(told(lambda address=address, key=key: source.check(address, None, key)) for key in ("data", "model")),  # type: ignore[misc]
            ):
                assert said
                assert not re.search("qzx|jvw", said, re.IGNORECASE), (address, said)

    @pytest.mark.parametrize(
        "text",
        [
            "sqlite:///.mlflow/mlflow.db", "http://127.0.0.1:5000", "https://host/x and a@b, //a b@c, hf:a/b@main",
            "postgresql://host:5432/db?sslmode=require&connect_timeout=10", "sqlite:///x.db?timeout=30&mode=ro",
            "git@host:a/b", "ssh://git@host/a/b.git", "http://[::1]:5000/a@b", "file:///home/a@b/c:d", "C:/me@x",
            "dvc exp apply a && git add -u && git commit -m 'a: b'", "data.columns.id = 'a': no such column; did you?",
            "the store http://host:5000 refused: a@b", "postgresql://h/d?options=-csearch_path%3Dx", "pip:a==1.0/b@c",
        ],
    )  # fmt: skip
    def test_what_holds_no_secret_stays_as_it_is(self, text: str) -> None:
        assert without_passwords(text) == text

    def test_what_other_programs_print_is_told_without_it(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """git's own error quotes the address; a trial's log does; and the store's address is shown at the end."""
        with pytest.raises(UserError, match="git clone") as caught:
            git.run("clone", "http://user:qzxjvw@127.0.0.1:9/a?token=qzxjvw", "b", cwd=tmp_path)
        progress.say("pip: Looking in indexes: https://user:qzxjvw@host/simple?key=qzxjvw, https://other/simple")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:qzxjvw@host/?token=qzxjvw")
        print(address.shown(params.Tracking(uri=None, experiment="a")))
        printed = capfd.readouterr()
        assert "https://host/simple?key=..., https://other/simple\nhttps://host/?token=...\n" in printed.out
        assert "qzx" not in str(caught.value) + printed.out + printed.err
        pip = wheels._why_pip_failed("a==1", "ERROR: no https://user:qzxjvw@host/simple?sig=qzxjvw for a", "data")
        assert "qzx" not in str(UserError(pip))


class TestCatalogues:
    @pytest.mark.parametrize("suffix", [".po", ".mo"])
    def test_any_bytes(self, suffix: str, tmp_path: Path) -> None:
        import polib

        file = tmp_path / f"django{suffix}"
        sound = CATALOGUE.encode()
        if suffix == ".mo":
            polib.pofile(CATALOGUE).save_as_mofile(str(file))
            sound = file.read_bytes()
        draw = random.Random(4)
        outcomes, entries = [], []
        for number in range(500):
            file.write_bytes(sound if number == 0 else mutated(draw, sound))
            there = tables.File(file.name, "source", file)
            outcomes.append(told(lambda there=there: entries.append(list(tables.records(there, "utf-8")))))  # type: ignore[misc]
        assert len(entries[0]) == 1
        assert 100 < sum(map(bool, outcomes)) < 500
        assert all(one.startswith(f"django{suffix}") for one in outcomes if one)

    @pytest.mark.parametrize("suffix", [".po", ".mo"])
    def test_a_header_that_never_ends(self, suffix: str, tmp_path: Path) -> None:
        file = tmp_path / f"django{suffix}"
        file.write_bytes(b"Content-Type:" * 100_000)
        assert told(lambda: list(tables.records(tables.File(file.name, "source", file), "utf-8")))


def field(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def header(*fields: bytes, count: int | None = None, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields) if count is None else count) + b"".join(fields)


ARRAY, UINT8, STRING = 9, 0, 8


@pytest.fixture(scope="module")
def sound(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_model, file)
    return file.read_bytes()


class TestGguf:
    def test_any_header(self, sound: bytes, project: params.Params, tmp_path: Path) -> None:
        """Of those that are taken for sound some are loaded whole: transformers has its own opinion."""
        assert project
        import gguf

        file = tmp_path / "tiny.gguf"
        file.write_bytes(sound)
        end = gguf.GGUFReader(str(file)).data_offset
        del gguf
        draw = random.Random(5)
        refused = loaded = 0
        for number in range(150):
            # Most of the header is the vocabulary: half of the changes go to what stands before it.
            part = draw.choice((sound[:700], sound[:end]))
            changed = part if number == 0 else overwritten(draw, part) if draw.random() < 0.5 else mutated(draw, part)
            file.write_bytes(changed + sound[len(part) :])
            if told(lambda: gguf_layout.checked(file)):
                refused += 1
            elif loaded < 10:
                loaded += 1
                given = params.Model(source=str(file), sha256=records.sha256_file(file), dtype="float32")
                said = told(lambda given=given: fetch.write_base(given))  # type: ignore[misc]
                assert not (said and number == 0)
        assert refused > 50
        assert loaded == 10

    @pytest.mark.parametrize(
        "content",
        [
            header(field("a", ARRAY, struct.pack("<IQ", UINT8, 2**60))),
            header(field("a", ARRAY, struct.pack("<IQ", STRING, 2**60))),
            header(field("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)),
            header(field("a", STRING, struct.pack("<Q", 2**63))),
            header(count=2**63),
            header(tensors=2**63),
            header(field("a", 77, b"")),
            header(field("general.architecture", UINT8, b"\x01")),
            header(field("general.alignment", 4, struct.pack("<I", 0))),
            b"GGUF",
        ],
    )
    def test_made_by_hand(self, content: bytes, tmp_path: Path) -> None:
        file = tmp_path / "tiny.gguf"
        file.write_bytes(content)
        assert "GGUF file" in told(lambda: gguf_layout.checked(file))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (header(field("split.count", 2, struct.pack("<H", 3))), "it is one of 3 parts"),
            (header(field("general.type", STRING, struct.pack("<Q", 7) + b"adapter")), "says general.type = 'adapter'"),
            (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
        ],
    )
    def test_what_is_no_whole_model_says_what_it_is(self, content: bytes, message: str, tmp_path: Path) -> None:
        file = tmp_path / "tiny.gguf"
        file.write_bytes(content)
        assert message in told(lambda: gguf_layout.checked(file))

    @pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"])
    @pytest.mark.parametrize("value", [0, 3, 2**31])
    def test_sizes_that_its_tensors_do_not_have(
        self, key: str, value: int, sound: bytes, project: params.Params, tmp_path: Path
    ) -> None:
        assert project
        name = f"llama.{key}".encode()
        at = sound.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
        file = tmp_path / "tiny.gguf"
        file.write_bytes(sound[:at] + struct.pack("<I", value) + sound[at + 4 :])
        given = params.Model(source=str(file), sha256=records.sha256_file(file), dtype="float32")
        assert told(lambda: fetch.write_base(given))
        assert not paths.BASE_FACTS.exists()
