"""Gettext catalogues: their pairs, what is no pair and counted, and how a catalogue may be broken."""

import random
import struct
from collections import Counter
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.sources.account import Account
from tests.made.files import read, written

HEADER = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'


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
    account = Account()
    assert read(file, account=account) == [
        ("fr/x.po:5", {"msgid": "One %s", "msgstr": 'Un "%s"\n', "msgctxt": None, **extra}),
        ("fr/x.po:11", {"msgid": "Two", "msgstr": "Deux", "msgctxt": "menu", **extra}),
        ("fr/x.po:30", {"msgid": "Last", "msgstr": "Dernier", "msgctxt": None, **extra}),
    ]

    assert account.left_out == {
        "fuzzy entries": 1, "untranslated entries": 1, "entries with a plural": 1, "obsolete entries": 1,
    }  # fmt: skip


def test_every_entry_of_a_catalogue_is_a_record_or_counted(tmp_path: Path) -> None:
    kinds = {
        'msgid "{n}"\nmsgstr "t"': None,
        'msgctxt "c"\nmsgid "{n}"\nmsgstr "t"': None,
        '#, fuzzy\nmsgid "{n}"\nmsgstr "t"': "fuzzy entries",
        '#~ msgid "{n}"\n#~ msgstr "t"': "obsolete entries",
        '#, fuzzy\nmsgid "{n}"\nmsgid_plural "{n}s"\nmsgstr[0] "t"\nmsgstr[1] "u"': "entries with a plural",
        'msgid "{n}"\nmsgstr ""': "untranslated entries",
        'msgctxt "{n}"\nmsgid ""\nmsgstr "t"': "entries without a msgid",
    }
    draw, counted = random.Random(0), 0
    for _ in range(20):
        chosen = draw.choices(list(kinds), k=draw.randrange(1, 12))
        # polib takes entries behind an obsolete one for obsolete only where they say so; their order does not matter.
        entries = [entry.replace("{n}", f"m{number}") for number, entry in enumerate(chosen)]
        account = Account()
        found = read(written(tmp_path, "x.po", HEADER + "\n\n".join(entries) + "\n"), account=account)
        assert len(found) == sum(kinds[entry] is None for entry in chosen)
        assert account.left_out == Counter(why for entry in chosen if (why := kinds[entry]))
        counted += account.left_out.total()
    assert counted > 50


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
    account = Account()
    found = read(written(tmp_path, "x.mo", compiled(pairs, charset)), "ascii", account)
    assert account.left_out == {"entries with a plural": 1, "untranslated entries": 1}
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
        ('msgid "a"\nmsgstr "b\\x41"', r"x\.po:5: the escape \\x is not read: write the character itself"),
        ('msgid "a\\\\\\q"\nmsgstr "b"', r"x\.po:4: the escape \\q is not read"),
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
