"""A terminal obeys nothing that strangers have written, and a shell nothing in commands that are to be pasted."""

import io
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.commands import show, use
from pipeline.core import params, paths, progress
from pipeline.core.errors import UserError, printable
from pipeline.record import runs
from pipeline.record.runs import DIGEST, Stored
from tests import ROOT
from tests.made.clone import environment

OBEYED = ("\x1b[2J", "\x07", "\r", "\x9b31m", "\x1b]0;title\x07", "\x00", "\x7f", "\u202e", "\u2066", "\b")


@pytest.mark.parametrize("text", OBEYED)
def test_what_a_terminal_would_obey_is_shown_as_a_sign(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printable(f"a\tb{text}c\nd")
    assert shown.startswith("a\tb\ufffd")
    assert shown.endswith("c\nd")
    assert not set(shown) & set("\x1b\x07\r\x9b\x00\x7f\u202e\u2066\b")
    assert str(UserError(f"a{text}")) == printable(f"a{text}")
    progress.say(f"a{text}")
    assert capsys.readouterr().out == printable(f"a{text}") + "\n"


def test_a_recipe_does_not_reach_the_terminal_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (paths.PARAMS, use.DEFAULT):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"))
    use.FOLDER.mkdir()
    recipe = {
        "about": "red \x1b[31m",
        "source": "b",
        "needs": {},
        "params": {"prompt": {"template": "{source}\x1b[2J"}},
    }
    YAML().dump(recipe, use.FOLDER / "theirs.yaml")
    use.show()
    use.apply("theirs", dry_run=True)
    printed = capsys.readouterr().out
    assert "red \ufffd[31m" in printed
    assert "\x1b" not in printed


def test_no_module_prints_past_the_one_function_that_cleans() -> None:
    """Messages of strangers pass `progress.say` or `UserError`; what else prints shows nothing of theirs."""
    printing = {
        "cli.py",
        "progress.py",
        "stage.py",
        "processes.py",
        "apart_worker.py",
        "vllm_worker.py",
        "backend_vllm.py",
    }
    found = {
        path.name
        for path in (ROOT / "pipeline").rglob("*.py")
        if any(line.lstrip().startswith("print(") for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert found == printing


def stored(**tags: str) -> Stored:
    named = {DIGEST: "0" * 64} | {getattr(runs, key): value for key, value in tags.items()}
    return Stored("0" * 31 + ";", "a run", "FINISHED", named, {}, {})


@pytest.mark.parametrize(
    "planted", ["--output={}/planted", "x; touch {}/planted", "$(touch {}/planted)", "HEAD", "a" * 39]
)
def test_only_commits_are_given_to_git_and_pasted(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("init -q", "commit -q --allow-empty -m start"):
        subprocess.run(["git", *command.split()], check=True, env=environment())
    tag = planted.format(tmp_path)
    commands = show.restoring(stored(COMMITS=f"{tag}, {tag}", COMMIT=tag))
    assert [path.name for path in tmp_path.iterdir()] == [".git"]
    assert not any(command.startswith("git checkout") for command in commands)
    assert not any(tag in command for command in commands)
    assert all("0;" not in command or f"'{'0' * 31};'" in command for command in commands)


def test_a_commit_is_given_to_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True, env=environment())
    sha = "a" * 40
    assert f"git checkout {sha}" in show.restoring(stored(COMMITS=sha, COMMIT=sha))


@pytest.mark.parametrize("label", ["\x1b[31m", "a\nb", "\ufffe", "\u202e", "x" * 300, ""])
def test_a_name_among_the_parameters_is_a_label(label: str, project: params.Params) -> None:
    content = project.model_dump(mode="json")
    content["tracking"]["experiment"] = label
    content["prompt"]["instructions"] |= {label: "a"}
    content["compare"]["published"] = [{"metric": "rouge1", "value": 1.0, "about": label}]
    with pytest.raises(UserError) as refused:
        params.check(content, "params.yaml")
    text = str(refused.value)
    assert all(place in text for place in ("tracking.experiment", "prompt.instructions", "compare.published.0.about"))
    assert io.StringIO(text).getvalue() == printable(text)
