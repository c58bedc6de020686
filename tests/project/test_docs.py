"""What the docs promise is there: tests, commands and their options, targets, parameters, files and headings."""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from dvc.cli.parser import DvcParser, get_main_parser
from ruamel.yaml import YAML
from typer.exceptions import TyperException
from typer.main import get_command

from pipeline import probes
from pipeline.commands.cli import app
from pipeline.core import contracts, params, yaml12
from pipeline.core.errors import UserError
from pipeline.prepare import chats
from pipeline.sources import tables
from tests import ROOT
from tests.made import methods

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
NAMED = re.compile(r"`(tests/[\w/]+\.py)((?:::\w+)*)`(?: \(`(\w+)`\))?")


def test_there_are_pages() -> None:
    assert {"security.md", "faults.md", "README.md", "CONTRIBUTING.md"} <= {page.name for page in PAGES}
    assert len(NAMED.findall((ROOT / "docs" / "security.md").read_text(encoding="utf-8"))) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    missing = [file for file, _, _ in NAMED.findall(page.read_text(encoding="utf-8")) if not (ROOT / file).is_file()]
    for file, names, part in NAMED.findall(page.read_text(encoding="utf-8")):
        text = (ROOT / file).read_text(encoding="utf-8") if file not in missing else ""
        wanted = [rf"^\s*(?:class|def) {name}\b" for name in names.split("::")[1:]]
        wanted += [rf"def test_\w*{part}"] if part else []
        missing += [f"{file} {pattern}" for pattern in wanted if not re.search(pattern, text, re.MULTILINE)]
    assert missing == []


def test_what_happens_to_a_row_is_told_for_every_reader_format_and_count() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## What happens to a row")[2]
    readers = re.findall(r"\.\w+", tables.SUFFIXES)
    assert len(readers) == 9
    formats = get_args(params.Data.model_fields["format"].annotation)
    assert len(formats) == 3
    counts = [one.name for one in fields(contracts.Split) if one.default is None]
    assert len(counts) == 5
    named = [*readers, *probes.PLAIN, *(f"format: {one}" for one in formats), *counts]
    named += [*chats.SYSTEM, "filtered", "dropped", "held_out", "merged"]
    assert [name for name in named if f"`{name}`" not in text] == []


# Commands, parameters and code in the pages


WITH_COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
INLINE = re.compile(r"`((?:lora-repro|make|dvc|python -m) [^`]+)`")
PLACEHOLDER = "PLACEHOLDER"
OTHER_PROGRAMS = {
    "accelerate", "bash", "cd", "export", "git", "head", "kubectl", "mlflow", "mv", "open", "pip", "rm", "scontrol",
    "source", "srun", "torchrun", "xdg-open",
}  # fmt: skip
"""Programs whose own arguments are not checked; what they start is."""


def yaml(name: str) -> dict[str, Any]:
    content = yaml12.read(ROOT / name)
    assert isinstance(content, dict)
    return content


def problems_of_page(text: str) -> Iterator[str]:
    """What is wrong in the fenced blocks of a page, and in the commands within sentences, which may lack arguments."""
    for language, body in FENCE.findall(text):
        yield from (f"{problem} (in a {language} block)" for problem in problems_of_block(language, body))
    for command in INLINE.findall(FENCE.sub("", text)):
        for problem in problems_of_shell(" ".join(command.split())):
            if not re.search("Missing parameter|arguments are required|expected one argument", problem):
                yield f"{problem} (in `{command}`)"


def problems_of_block(language: str, body: str) -> Iterator[str]:
    match language:
        case "console":  # after `$ ` a command, and the lines that its backslashes continue it to; the rest is output
            commands = re.findall(r"^\$ ((?:.*\\\n)*.*)", body, re.MULTILINE)
            if not commands:
                yield "no command"
            for command in commands:
                yield from problems_of_shell(command)
        case "shell" | "bash":
            for command in re.findall(r"^(?!#)((?:.*\\\n)*.+)", body, re.MULTILINE):
                yield from problems_of_shell(command)
        case "yaml":
            yield from problems_of_yaml(body)
        case "python":
            try:
                compile(body, "block", "exec")
            except SyntaxError as error:
                yield f"not Python: {error}"
        case _:
            yield f"a block of language {language!r}, which is not checked"


def problems_of_shell(line: str) -> Iterator[str]:
    """What is wrong in a line of shell: of each of its commands, and of those in `$(...)`.

    `<...>`, `…` and `${...}` stand for any word; what is in `[...]` may be left out, and is checked.
    """
    line = line.replace("\\\n", " ")
    for command in re.findall(r"\$\(([^()]*)\)", line):
        yield from problems_of_shell(command)
    for pattern in (r"\$\([^()]*\)", r"\$\{[^{}]*\}", r"<[^<>]*>", "…"):
        line = re.sub(pattern, PLACEHOLDER, line)
    line = re.sub(r"\[(-[^\[\]]*)\]", r"\1", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("&|;"):
            yield from problems_of_command(words)
            words = []
        else:
            words.append(word)


def problems_of_command(words: list[str]) -> Iterator[str]:
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    if not words:
        return
    program, arguments = Path(words[0]).name, words[1:]
    if program in CHECKS:
        yield from (f"{program}: {problem}" for problem in CHECKS[program](arguments))
    elif program not in OTHER_PROGRAMS:
        yield f"{words[0]} is a program that no check knows"
    if "--" in arguments:
        yield from problems_of_command(arguments[arguments.index("--") + 1 :])
    elif "-c" in arguments and program == "bash":
        yield from problems_of_shell(arguments[arguments.index("-c") + 1])
    elif "-m" in arguments and program in ("accelerate", "torchrun", "python", "python3"):
        yield from problems_of_module(arguments[arguments.index("-m") + 1])


def problems_of_module(name: str) -> Iterator[str]:
    try:
        found = find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        yield f"there is no module {name}"


def problems_of_lora_repro(arguments: list[str]) -> Iterator[str]:
    """By the command's own parser, which runs nothing; files, recipes and parameters that are named must be there."""
    group: Any = get_command(app)
    context = group.context_class(group, info_name="lora-repro")
    try:
        name, command, rest = group.resolve_command(context, arguments)
        given = command.make_context(name, list(rest), parent=context).params
    except TyperException as error:
        yield str(error)
        return
    recipe, file = given.get("recipe"), given.get("file")
    if recipe and not recipe.isupper() and not (ROOT / "recipes" / f"{recipe}.yaml").is_file():
        yield f"there is no recipe {recipe}"
    if file and not file.name.isupper() and not (ROOT / file).is_file():
        yield f"there is no file {file}"
    yield from problems_of_parameters(given.get("overrides") or [])


def problems_of_dvc(arguments: list[str]) -> Iterator[str]:
    """By DVC's own parser, which runs nothing; stages and parameters that are named must be there."""

    def refuse(_parser: DvcParser, message: str, _command: Any = None) -> None:
        raise UserError(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DvcParser, "error", refuse)
        try:
            given = get_main_parser().parse_args(arguments)
        except UserError as error:
            yield str(error)
            return
    yield from problems_of_parameters(getattr(given, "set_param", None) or [])
    for target in given.targets or [] if given.cmd in ("repro", "commit") else []:
        file, _, stage = target.rpartition(":")
        if target.endswith(".yaml"):
            if not (ROOT / target).is_file():
                yield f"there is no file {target}"
        elif PLACEHOLDER not in stage and stage not in stages_of(file or "dvc.yaml"):
            yield f"there is no stage {target}"


def stages_of(file: str) -> set[str]:
    """Every name that DVC knows stages of a graph by: of all of a kind, and of each."""
    lists = yaml("params.default.yaml") | yaml("claims/claims.yaml") | yaml("claims/training.yaml")
    found = set()
    for name, stage in YAML(typ="safe", pure=True).load((ROOT / file).read_text(encoding="utf-8"))["stages"].items():
        axes = [stage["foreach"]] if "foreach" in stage else list(stage.get("matrix", {}).values())
        items = [lists[axis[2:-1]] if isinstance(axis, str) else axis for axis in axes]
        found |= {name, *(f"{name}@{'-'.join(map(str, item))}" for item in product(*items) if item)}
    return found


def problems_of_parameters(settings: list[str]) -> Iterator[str]:
    for setting in settings:
        name = setting.partition("=")[0].rpartition(":")[2]
        section: Any = yaml("params.default.yaml")
        for key in name.split("."):
            if not isinstance(section, dict) or key not in section:
                if name != "name":  # any name
                    yield f"there is no parameter {name}"
                break
            section = section[key]


def problems_of_make(arguments: list[str]) -> Iterator[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", text, re.MULTILINE)
    extras = [f".venv/installed-{path.stem}" for path in (ROOT / "lock").glob("*.txt")]
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        if is_variable and not re.search(rf"^{name} \?=|\$\(if \$\({name}\)", text, re.MULTILINE):
            yield f"there is no variable {name}"
        if not is_variable and word not in [*targets, *extras, ".venv/installed"]:
            yield f"there is no target {word}"


def problems_of_yaml(body: str) -> Iterator[str]:
    """Keys are those of the parameters with their sections, or those of a search's file."""
    try:
        content = yaml12.load(body, "block")
    except UserError as error:
        yield str(error)
        return
    if not isinstance(content, dict):
        yield "not a mapping"
        return
    if content.keys() <= yaml("sweeps/example.yaml").keys() and "parameters" in content:
        return
    given = yaml("params.default.yaml")
    for key, value in content.items():
        if key not in given:
            yield f"there is no parameter {key}"
        elif isinstance(value, dict):
            yield from (f"there is no parameter {key}.{name}" for name in value if name not in (given[key] or {}))


def problems_of_python(arguments: list[str]) -> Iterator[str]:
    if arguments[:1] != ["-m"]:
        yield "only `python -m` is checked"


CHECKS: dict[str, Callable[[list[str]], Iterator[str]]] = {
    "lora-repro": problems_of_lora_repro,
    "dvc": problems_of_dvc,
    "make": problems_of_make,
    "python": problems_of_python,
    "python3": problems_of_python,
}


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_parameters_and_code_of_a_page_are_those_of_the_project(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(FENCE.findall(text)), "a block that the pattern does not see"
    assert list(problems_of_page(text)) == []


def test_the_pages_have_commands_of_every_kind() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in WITH_COMMANDS)
    assert {language for language, _ in FENCE.findall(text)} == {"console", "bash", "yaml", "python"}
    assert len(FENCE.findall(text)) > 20
    assert len(INLINE.findall(FENCE.sub("", text))) > 60


@pytest.mark.parametrize(
    ("language", "body", "told"),
    [
        ("console", "$ lora-repro verfy\n", "No such command 'verfy'"),
        ("console", "output\n$ lora-repro verify --recompte # a comment\n", "No such option: --recompte"),
        ("console", "$ lora-repro export adaptor DEST\n", "adaptor"),
        ("console", "$ lora-repro export gguf DEST [--merge]\n", "No such option: --merge"),
        ("console", "$ lora-repro export\n", "Missing parameter"),
        ("console", "$ lora-repro sweep -S lora.rank=4,8\n", "there is no parameter lora.rank"),
        ("console", "$ lora-repro sweep sweeps/none.yaml\n", "there is no file sweeps/none.yaml"),
        ("console", "$ lora-repro plan samsum-8b\n", "there is no recipe samsum-8b"),
        ("console", "$ make repo\n", "there is no target repo"),
        ("console", "$ make .venv/installed-serch\n", "there is no target .venv/installed-serch"),
        ("console", "$ make claims KINDS=EXACT\n", "there is no variable KINDS"),
        ("console", "$ dvc exp rum -S lora.r=8\n", "invalid choice: 'rum'"),
        ("console", "$ dvc exp run --sett lora.r=8\n", "unrecognized arguments: --sett"),
        ("console", "$ dvc exp run -S lora.rank=8\n", "there is no parameter lora.rank"),
        ("console", "$ dvc exp run -S ../params.yaml:lora.rank=8 ../dvc.yaml\n", "there is no parameter lora.rank"),
        ("console", "$ dvc exp apply\n", "arguments are required"),
        (
            "console",
            "$ dvc repro claims/dvc.yaml:claim@no-such-claim\n",
            "there is no stage claims/dvc.yaml:claim@no-such-claim",
        ),
        ("console", "$ dvc commit --force tran@17\n", "there is no stage tran@17"),
        ("console", "$ dvc repro --force --single-item trak\n", "there is no stage trak"),
        ("console", "$ dvc repro train@x\n", "there is no stage train@x"),
        ("console", "$ dvc repro claim/dvc.yaml\n", "there is no file claim/dvc.yaml"),
        ("console", "$ python -m bench.sped\n", "there is no module bench.sped"),
        ("console", "$ python -m no_such.module\n", "there is no module no_such.module"),
        ("console", "$ torchrun --nnodes 2 \\\n    -m stages.tran --seed 17\n", "there is no module stages.tran"),
        ("console", "$ loar-repro verify\n", "a program that no check knows"),
        ("console", "$ cd a && lora-repro verfy\n", "No such command 'verfy'"),
        ("console", '$ URI="$(lora-repro stor)" git status\n', "No such command 'stor'"),
        ("console", "$ kubectl exec -it <head pod> -- bash -c 'cd a && make repo'\n", "there is no target repo"),
        ("bash", "#!/bin/bash\nsrun --nodes=2 \\\n  -- lora-repro verfy\n", "No such command 'verfy'"),
        ("console", "only output\n", "no command"),
        ("yaml", "data: {sources: a}\n", "there is no parameter data.sources"),
        ("yaml", "datas: {source: a}\n", "there is no parameter datas"),
        ("yaml", "data: {source: a\n", "is not YAML"),
        ("yaml", "text\n", "not a mapping"),
        ("python", "import\n", "not Python"),
        ("", "make repro\n", "which is not checked"),
    ],
)
def test_what_is_wrong_in_a_block_is_found(language: str, body: str, told: str) -> None:
    assert "".join(problems_of_page(f"A page.\n\n```{language}\n{body}```\n")).count(told) == 1


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("Run `lora-repro verfy`.", "No such command 'verfy'"),
        ("Run `make repo`.", "there is no target repo"),
        ("Run `dvc exp rum`.", "invalid choice: 'rum'"),
        ("Run `dvc exp run\n-S lora.rank=8`.", "there is no parameter lora.rank"),
        ("Run `lora-repro export`, `dvc exp apply` and `make test`.", None),
    ],
)
def test_what_is_wrong_in_a_sentence_is_found(sentence: str, told: str | None) -> None:
    found = list(problems_of_page(sentence + "\n"))
    assert found == [] if told is None else told in "".join(found)


# Links, and where pages are listed


LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Relative links that lead to no file, to no heading, or out of the pages that the site has."""
    for link in LINK.findall(re.sub(r"`[^`]*`", "", FENCE.sub("", text))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file():
            yield f"{link}: there is no such file"
        elif page.parent.name == "docs" and page.parent not in target.parents:
            yield f"{link}: not in docs/, so the site lacks it"
        elif anchor and anchor not in headings(text if target == page else target.read_text(encoding="utf-8")):
            yield f"{link}: there is no such heading"


def headings(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*WITH_COMMANDS, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("link", "told"),
    [
        ("[a](none.md)", "there is no such file"),
        ("[a](models.md#who-decides)", "there is no such heading"),
        ("[a](#a-titel)", "there is no such heading"),
        ("[a](../README.md)", "not in docs/"),
        ("![a](repot.png)", "there is no such file"),
        ("[a](models.md#who-decodes), [b](#a-title), ![c](report.png)", None),
    ],
)
def test_a_link_that_leads_nowhere_is_found(link: str, told: str | None) -> None:
    found = list(broken_links(ROOT / "docs" / "export.md", f"# A title\n\n{link}\n"))
    assert found == [] if told is None else told in "".join(found)


def test_the_table_of_methods_is_that_of_their_tests() -> None:
    text = methods.PAGE.read_text(encoding="utf-8")
    assert methods.page(text) == text
    assert methods.table() in text
    assert len(methods.METHODS) > 15


def test_every_page_is_listed_in_the_readme_on_the_first_page_and_in_the_site() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {link.removeprefix("docs/") for link in LINK.findall(readme) if link.endswith(".md")} == {
        *pages,
        "CONTRIBUTING.md",
    }
    assert {link for link in LINK.findall(first) if link.endswith(".md")} == pages
    assert set(re.findall(r"\w+\.md", str(yaml("mkdocs.yml")["nav"]))) == {*pages, "index.md"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 165


def test_the_site_is_strict_and_asks_nothing_of_any_network() -> None:
    site = yaml("mkdocs.yml")
    assert site["strict"] is True
    assert site["theme"]["font"] is False
    assert {"search", "offline"} <= set(site["plugins"])
    # Without a file of this name among them the offline plugin adds a script of its own, from a network.
    assert any("iframe-worker" in name for name in site["extra"]["polyfills"])
    for name in (*site["extra"]["polyfills"], *site["extra_css"]):
        assert "://" not in (ROOT / "docs" / name).read_text(encoding="utf-8")
