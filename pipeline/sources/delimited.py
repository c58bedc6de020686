"""Tables of delimited fields: CSV, and files with semicolons, tabs or bars.

Fields stay strings ("007"). They are quoted as in CSV (RFC 4180). Some programs that write tabs quote fields and others
do not; all quotation marks of a file together tell which one wrote it.
"""

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from pipeline.core.errors import UserError
from pipeline.sources.account import SHOWN, Account
from pipeline.sources.content import MARK, Encoding, File, decoded

Located = tuple[str, dict[str, str]]

DELIMITERS = ",;\t|"
"""In this order: spreadsheets write semicolons where numbers have a comma."""
LONGEST_HEADER = 1_000_000
"""Characters in which the delimiter is looked for."""
_SEPARATOR = re.compile(r'"?sep=([^\r\n"])\1*"?\1*(?:\r\n|\r|\n)')  # Excel's own first line
_QUOTED = re.compile(r'(?<![^,;\t|\r\n])"(?:[^"]|"")*+"')
_QUOTED_BY_TABS = re.compile(r'(?<![^\t\r\n])"((?:[^"]|"")*+)"(?![^\t\r\n])')
_ALL_QUOTED = re.compile(r'"(?:[^"]|"")*+"(?:\t"(?:[^"]|"")*+")*+(?![^\r\n])')


def rows(file: File, encoding: Encoding, account: Account) -> Iterator[Located]:
    """The rows of a .csv or .tsv file by the names in its header, each with its place.

    UserError, with the line, for a row with too many or too few fields, and for what could be read in two ways.
    """
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
    text = decoded(file.path.read_bytes(), file, encoding)
    first = 1
    if named := _SEPARATOR.match(text):
        text, first = text[named.end() :], 2
        delimiter = named[1]
    else:
        delimiter = "\t" if file.path.suffix.lower() == ".tsv" else _delimiter(text)
    quotes = delimiter != "\t" or _quotes(text, file, first)
    header: list[str] | None = None
    for line, fields in _fields(text, file, delimiter, quotes, first, account):
        if header is None:
            header = _header(fields, f"{file.name}:{line}")
            continue
        if len(fields) != len(header):
            remedy = (
                f"quote what holds {delimiter!r}"
                if len(fields) > len(header)
                else "fill up the row, or take the line out if it is a comment"
            )
            raise UserError(f"{file.name}:{line}: {len(fields)} fields for {len(header)} columns; {remedy}")
        if fields == header:
            raise UserError(f"{file.name}:{line}: repeats the header, as joined files do: take the line out")
        yield f"{file.name}:{line}", dict(zip(header, fields, strict=True))


def _header(fields: list[str], where: str) -> list[str]:
    if repeated := [name for name, times in Counter(fields).items() if times > 1]:
        shown = ", ".join(map(repr, repeated[:SHOWN]))
        raise UserError(f"{where}: column names repeat: {shown}; give each column a name of its own")
    return fields


def _delimiter(text: str) -> str:
    """The delimiter by the header, without what stands in quotation marks there.

    If the header has several, it is the first by which the first row has as many fields as the header; if none fits,
    the first. With a delimiter that the header lacks, the file would have one column, too few for source and target.
    """
    start = text.lstrip("\r\n")[:LONGEST_HEADER]
    bare = re.split(r"[\r\n]", _QUOTED.sub("", start), maxsplit=1)[0]
    there = [mark for mark in DELIMITERS if mark in bare]
    if len(there) > 1:
        for mark in there:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
            found = [fields for fields, _ in zip(filter(None, reader), range(2), strict=False)]
            if len({len(fields) for fields in found}) == 1:
                return mark
    return there[0] if there else ","


def _fields(
    text: str, file: File, delimiter: str, quotes: bool, first: int, account: Account
) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row with the number of its first line; `first` is the number of the text's first line."""
    ends = [""]

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            ends[0] = line[len(line.rstrip("\r\n")) :]
            yield line

    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True)
    line, blank, header_end = first, 0, None
    try:
        for fields in reader:
            if not fields:
                blank += 1
            else:
                account.blank_lines += blank
                blank = 0
                header_end = ends[0] if header_end is None else header_end
                _require_sound(fields, header_end, ends[0], f"{file.name}:{line}")
                yield line, fields
            line = reader.line_num + first
    except csv.Error as error:
        raise UserError(
            f"{file.name}:{line}: {error}: put a text that holds quotation marks in quotation marks, double those "
            "within it, and close it"
        ) from None


def _require_sound(fields: list[str], header_end: str, end: str, where: str) -> None:
    if fields[0].startswith(MARK):
        raise UserError(f"{where}: begins with a byte order mark, as joined files do: take it out")
    if end and (end == "\r") != (header_end == "\r"):
        raise UserError(
            f"{where}: its line ends differ from the header's (a carriage return alone): quote a text that holds one, "
            "or give all lines one kind of end"
        )


def _quotes(text: str, file: File, first: int) -> bool:
    """Whether quotation marks at the ends of a field belong to the format, in a file with tabs.

    They do if every field of the header has them, or if exactly the fields have them that need them: with a tab, a line
    break or a quotation mark. They belong to the texts if the rows are whole without regard to them. UserError if both
    may be true.
    """
    if not re.search(r'(?<![^\t\r\n])"', text):
        return True
    literal, quoted = _is_table(text, csv.QUOTE_NONE), _is_table(text, csv.QUOTE_MINIMAL)
    if not (literal and quoted):
        return not literal
    if _ALL_QUOTED.match(text.lstrip("\r\n")):
        return True
    marked = list(_QUOTED_BY_TABS.finditer(text))
    rest = _QUOTED_BY_TABS.sub("", text)
    if all(re.search(r'[\t\r\n"]', one[1]) for one in marked) and '"' not in rest:
        if not any(re.search(r"[\r\n]", one[1]) for one in marked):
            return True
    elif not (all(re.search(r'[\t\r\n",]', one[1]) for one in marked) and not re.search('[",]', rest)):
        return False
    # Excel also quotes fields with a comma; and texts within quotation marks may run on by chance.
    line = text.count("\n", 0, marked[0].start()) + first
    raise UserError(
        f"{file.name}:{line}: the quotation marks around a field may belong to the text or to the format: quote every "
        "field, with the marks within a text doubled, or save the table as JSON lines"
    )


def _is_table(text: str, quoting: Literal[0, 3]) -> bool:
    """Whether all rows have the same number of fields between tabs, at least two."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=quoting, strict=True)
        sizes = {len(fields) for fields in reader if fields}
    except csv.Error:
        return False
    return len(sizes) == 1 and min(sizes) > 1
