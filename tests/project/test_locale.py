"""Nothing depends on the user's locale: no file is read or written in its encoding, no terminal ends a program."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT
from tests.made.clone import Finished, environment

CODE = ("pipeline", "stages", "claims", "bench", "lock")
IN_BYTES = {"rb", "wb", "ab", "xb", "r+b", "rb+"}
PROGRAMS = ("run", "Popen", "check_output")


def without_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that read or write text in the encoding of the locale."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {word.arg for word in call.keywords}
        called = call.func
        if "encoding" in given or not isinstance(called, ast.Name | ast.Attribute):
            continue
        name = called.id if isinstance(called, ast.Name) else called.attr
        owner = getattr(called.value, "id", "?") if isinstance(called, ast.Attribute) else None
        if name in ("read_text", "write_text"):
            wrong = owner not in (None, "records")  # `records.write_text` writes UTF-8
        elif name == "open":
            texts = {value.value for value in ast.walk(call) if isinstance(value, ast.Constant)}
            wrong = owner in (None, "path", "file", "io") and not texts & IN_BYTES
        else:
            wrong = name in PROGRAMS and not given.isdisjoint(("text", "universal_newlines"))
        if wrong:
            yield call


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("records.write_text(path, text)", 0),
        ("open(path)", 1),
        ("open(path, 'rb')", 0),
        ("path.open('a')", 1),
        ("subprocess.run(command, text=True)", 1),
        ("subprocess.run(command, text=True, encoding='utf-8')", 0),
        ("subprocess.run(command, capture_output=True)", 0),
    ],
)
def test_the_search_sees_what_it_should(code: str, found: int) -> None:
    assert len(list(without_encoding(ast.parse(code)))) == found


def test_no_file_and_no_program_is_read_in_the_encoding_of_the_locale() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}"
        for folder in CODE
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


TERMINALS = {
    "latin-1": {"PYTHONIOENCODING": "iso-8859-1"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
COMMANDS = (
    ("lora-repro", "show"),
    ("lora-repro", "check"),
    ("lora-repro", "use"),
    ("lora-repro", "plan"),
    ("lora-repro", "store"),
    ("lora-repro", "verify"),
    ("lora-repro", "compare", "--help"),
    ("lora-repro", "export", "--help"),
    ("lora-repro", "promote", "--dry-run"),
    ("python", "-m", "stages.compare"),
    ("python", "-m", "stages.track"),
    ("python", "-m", "claims.register", "EXACT"),
)


@pytest.mark.parametrize("terminal", TERMINALS)
def test_every_command_prints_what_the_terminal_can_show(terminal: str, finished: Finished, tmp_path: Path) -> None:
    # In the C locale a path with é has no name that MLflow's store could be compared with.
    folder = finished.copy(tmp_path / ("projekt-é" if terminal == "latin-1" else "projekt"))
    for command in COMMANDS:
        program = sys.executable if command[0] == "python" else str(Path(sys.executable).parent / command[0])
        done = subprocess.run(
            [program, *command[1:]], cwd=folder, env=environment() | TERMINALS[terminal], stdin=subprocess.DEVNULL,
            capture_output=True, check=False,
        )  # fmt: skip
        printed = done.stdout + done.stderr
        assert b"Traceback" not in printed, (command, printed.decode("latin-1"))
        assert done.returncode == 0, (command, printed.decode("latin-1"))
        if command == ("lora-repro", "show"):
            assert b"ROUGE-1" in printed
            assert b" -> " in printed
