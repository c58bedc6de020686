"""The console command: quick, and a user's mistake is a sentence, not a traceback."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.commands import cli
from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.record import track
from pipeline.report import page, wording
from tests import ROOT
from tests.made.clone import environment

PARAMS = ROOT / "params.yaml"


def test_show_prints_the_verdict_and_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS.read_text(encoding="utf-8"), encoding="utf-8")

    def describe(seeds: list[int], tracking: params.Tracking) -> str:
        return f"run of {seeds} in {tracking.experiment}"

    monkeypatch.setattr(wording, "closing_lines", lambda _, page: f"Better.\n\n  report   {page}")
    monkeypatch.setattr(page, "describe", lambda _: "here")
    monkeypatch.setattr(track, "describe", describe)
    given = params.load()
    result = CliRunner().invoke(cli.app, ["show"])
    assert result.exit_code == 0
    expected = f"run of {given.seeds} in {given.tracking.experiment}"
    assert result.stdout == f"Better.\n\n  report   here\n  run      {expected}\n"


def test_a_mistake_is_a_message_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def closing_lines(_: str, __: str) -> str:
        raise UserError("there is no report: run `dvc repro`")

    monkeypatch.setattr(wording, "closing_lines", closing_lines)
    monkeypatch.setattr(page, "describe", lambda _: "here")
    result = CliRunner().invoke(cli.app, ["show"])
    assert result.exit_code == 1
    assert (result.stdout, result.stderr) == ("", "error: there is no report: run `dvc repro`\n")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def closing_lines(_: str, __: str) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(wording, "closing_lines", closing_lines)
    monkeypatch.setattr(page, "describe", lambda _: "here")
    assert isinstance(CliRunner().invoke(cli.app, ["show"]).exception, ZeroDivisionError)


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "version", lambda name: {"lora-repro": "1.2.3"}[name])
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == "lora-repro 1.2.3\n"


def test_version_of_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", absent)
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "lora-repro, run from its source without being installed\n")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from pipeline.commands.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'numpy', 'pandas', 'dvc', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PARAMS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "show" in done.stdout


@pytest.mark.parametrize(
    "terminal",
    [{"PYTHONIOENCODING": "iso-8859-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}],
)
@pytest.mark.parametrize("folder", [b"projekt-\xc3\xa9", b"caf\xe9", "世界 →".encode()])
def test_the_address_of_the_store_has_the_bytes_of_its_path_in_any_locale(
    terminal: dict[str, str], folder: bytes, tmp_path: Path
) -> None:
    """Shells and `make ui` take it: with a character replaced, MLflow would make a new store elsewhere."""
    place = tmp_path / os.fsdecode(folder)
    place.mkdir()
    (place / "params.yaml").write_text(PARAMS.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-c", "from pipeline.commands.cli import app; app()", "store"]
    surroundings = environment() | {"PYTHONPATH": str(ROOT)} | terminal
    done = subprocess.run(command, cwd=place, env=surroundings, capture_output=True, check=False)
    expected = b"sqlite:///" + os.fsencode(tmp_path.resolve()) + b"/" + folder + b"/.mlflow/mlflow.db\n"
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr


def test_a_server_whose_name_the_locale_lacks_is_printed(tmp_path: Path) -> None:
    text = PARAMS.read_text(encoding="utf-8")
    changed = re.sub(r"(?m)^  uri:.*$", "  uri: http://bücher.example:5000", text)
    assert changed != text
    (tmp_path / "params.yaml").write_text(changed, encoding="utf-8")
    command = [sys.executable, "-c", "from pipeline.commands.cli import app; app()", "store"]
    ascii_alone = {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=environment() | ascii_alone, capture_output=True, check=False)
    assert done.stdout == "http://bücher.example:5000\n".encode(), done.stderr
