"""CSV, TSV and the like: delimiters, quotation marks, and rows that could be read in two ways."""

from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.sources.account import Account
from tests.made.files import cells, read, written


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


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", "sep=;\nsource;target\na, b;c\n", [["a, b", "c"]]),
        ("a.csv", '\ufeff"sep=\t"\r\nsource\ttarget\r\na b\tc\r\n', [["a b", "c"]]),
        ("a.csv", "sep=,,\nsource,target\na,c\n", [["a", "c"]]),
        ("a.tsv", "sep=|\nsource|target\na|c\n", [["a", "c"]]),
        ("a.csv", '"source";"target";"note, long"\n"a b";"c";"d"\n', [["a b", "c", "d"]]),
        ("a.csv", '"source, old"\t"target; new"\na\tb\n', [["a", "b"]]),
        ("a.csv", 'source;target;"note, long"\na, b;c;d\n', [["a, b", "c", "d"]]),
        ("a.csv", '"source\nof, it";target\na;c\n', [["a", "c"]]),
        ("a.csv", 'source;"say ""a, b""";target\na;b;c\n', [["a", "b", "c"]]),
        ("a.csv", "source;target;note, long\na;b;c\nd, e;f;g\n", [["a", "b", "c"], ["d, e", "f", "g"]]),
        ("a.csv", "source;target\ra, b;c\rd, e;f\r", [["a, b", "c"], ["d, e", "f"]]),
        ("a.csv", "source,target\ra,c\rd,f", [["a", "c"], ["d", "f"]]),
        ("a.tsv", "source\ttarget\ra, b\tc\r", [["a, b", "c"]]),
        ("a.csv", '\n\nsource,target\n\n"a\n\nb",c\n\n', [["a\n\nb", "c"]]),
        ("a.csv", "source,target,\na,b,\n", [["a", "b", ""]]),
        ("a.csv", "source,target\n,\n", [["", ""]]),
        ("a.csv", "source,target\n a , b\n", [[" a ", " b"]]),
        ("a.csv", 'source,target\n5" disk,b\n', [['5" disk', "b"]]),
    ],
)  # fmt: skip
def test_a_table_is_read_whole_whatever_separates_its_fields(
    tmp_path: Path, name: str, text: str, rows: list[list[str]]
) -> None:
    assert cells(written(tmp_path, name, text)) == rows


@pytest.mark.parametrize(
    ("rest", "rows"),
    [
        # Marks that belong to the texts.
        ('"Hello" he said\tBonjour\n', [['"Hello" he said', "Bonjour"]]),
        ('"Hello"\tBonjour\n', [['"Hello"', "Bonjour"]]),
        ('"Hello"\t"Bonjour"\nNo marks, here\tRien\n', [['"Hello"', '"Bonjour"'], ["No marks, here", "Rien"]]),
        ('"Not closed\tBonjour\nnext\trow\n', [['"Not closed', "Bonjour"], ["next", "row"]]),
        ('He said "no"\tNon\n', [['He said "no"', "Non"]]),
        # Marks that belong to the format.
        ('"a\tb"\tc\n', [["a\tb", "c"]]),
        ('"a\nb"\tc\nd\te\n', [["a\nb", "c"], ["d", "e"]]),
        ('"He said ""no"""\tNon\n', [['He said "no"', "Non"]]),
    ],
)  # fmt: skip
def test_quotation_marks_of_a_file_with_tabs_are_those_of_its_writer(
    tmp_path: Path, rest: str, rows: list[list[str]]
) -> None:
    assert cells(written(tmp_path, "a.tsv", f"source\ttarget\n{rest}")) == rows
    assert cells(written(tmp_path, "a.csv", f"source\ttarget\n{rest}")) == rows
    assert cells(written(tmp_path, "b.tsv", f"sep=\t\nsource\ttarget\n{rest}")) == rows


def test_where_every_field_is_quoted_the_marks_are_the_formats(tmp_path: Path) -> None:
    assert cells(written(tmp_path, "a.tsv", '"source"\t"target"\n"Hello"\t"Bonjour, toi"\n')) == [
        ["Hello", "Bonjour, toi"]
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        # Both readings are whole: a spreadsheet's quoted comma or the text's own marks; one row or two.
        ("a.tsv", 's\tt\n"Hello, you"\tBonjour\n', r"a\.tsv:2: the quotation marks around a field may belong to"),
        ("a.tsv", 's\tt\n"Oh no\tA\nhe left"\tB\n', r"a\.tsv:2: the quotation marks"),
        ("a.tsv", 's\tt\na\t"\nb\t"\n', r"a\.tsv:2: the quotation marks"),
        ("a.tsv", 'sep=\t\ns\tt\nx\ty\n"a, b"\tB\n', r"a\.tsv:4: the quotation marks"),
        ("a.csv", "a,b,a\n1,2,3\n", r"a\.csv:1: column names repeat: 'a'; give each column"),
        ("a.tsv", "a\tb\ta\tb\n1\t2\t3\t4\n", r"a\.tsv:1: column names repeat: 'a', 'b';"),
        ("a.csv", "a,b\n1,2\na,b\n3,4\n", r"a\.csv:3: repeats the header, as joined files do"),
        ("a.csv", "a,b\n1,2\n\ufeffa,b\n3,4\n", r"a\.csv:3: begins with a byte order mark"),
        ("a.csv", "\ufeff\ufeffa,b\n1,2\n", r"a\.csv:1: begins with a byte order mark"),
        ("a.csv", "a,b\n1,2\n# a comment\n", r"a\.csv:3: 1 fields for 2 columns; fill up the row, or .* comment"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv:2: 3 fields for 2 columns; quote what holds ','"),
        ("a.csv", "a,b\n1\n", r"a\.csv:2: 1 fields for 2 columns"),
        ("a.csv", 'a,b\n"1"x,2\n', r"a\.csv:2: .*double those within it"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', r"a\.csv:2: unexpected end of data: .*close it"),
        ("a.csv", "a,b\n1,2\r3,4\n", r"a\.csv:2: its line ends differ from the header's"),
        ("a.csv", "a,b\r1,2\n3,4\r", r"a\.csv:2: its line ends differ from the header's"),
        ("a.csv", "a,b\n1,\0\n", r"a\.csv:2 holds NUL, which is in no text"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le").decode("latin-1"), r"a\.csv:1 holds NUL, .*UTF-16"),
        ("a.csv", "__file__,b\n1,2\n", r"a\.csv:2: has a column __file__, which is the name of one that every table"),
    ],
)  # fmt: skip
def test_what_would_lose_or_mix_fields_is_refused_by_its_line(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        read(written(tmp_path, name, text))


def test_many_column_names_are_not_all_told(tmp_path: Path) -> None:
    names = ",".join([f"column{number}" for number in range(5000)] * 2)
    with pytest.raises(UserError) as caught:
        read(written(tmp_path, "a.csv", f"{names}\n"))
    assert len(str(caught.value)) < 500


def test_blank_lines_between_rows_are_counted(tmp_path: Path) -> None:
    account = Account()
    assert cells(written(tmp_path, "a.csv", '\na,b\n\n\n"1\n\n",2\n\n'), account) == [["1\n\n", "2"]]
    assert account.blank_lines == 3
    assert account.lines() == ["left out: blank lines (3)"]
    assert Account().lines() == []
