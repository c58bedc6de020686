"""Recipes: each is legal, none depends on what was there before, and none takes anything away unasked."""

import csv
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from pipeline.commands import cli
from pipeline.commands import use as recipes
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.prepare import prepare
from pipeline.sources import source
from tests import ROOT
from tests.made.clone import environment

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
DATA_SETS = ("samsum", "dialogsum", "cnn_dailymail", "xsum", "wmt16", "e2e_nlg")
MODELS = (
    *("SmolLM2-135M-Instruct", "SmolLM2-360M-Instruct", "SmolLM2-1.7B-Instruct", "TinyLlama-1.1B", "llama-7b@"),
    *("Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B"),
)


def parsed(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the recipes and the default, without git, and without a GPU."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    shutil.copytree(ROOT / "recipes", "recipes")
    for name in ("params.yaml", "params.default.yaml"):
        shutil.copy(ROOT / name, name)
    monkeypatch.setattr(recipes, "gpus", list)
    # A repository around the temporary folder is none of this project's.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return Path.cwd()


def use(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["use", *arguments])


def used(*arguments: str) -> str:
    """What `params.yaml` holds after a use that succeeds."""
    result = use(*arguments)
    assert result.exit_code == 0, result.output
    return Path("params.yaml").read_text(encoding="utf-8")


def write(name: str, text: str, head: str = "about: mine\nsource: me\nneeds: {}\n") -> str:
    Path(name).write_text(head + text, encoding="utf-8")
    return name


def change(old: str, new: str) -> str:
    """`params.yaml` by hand."""
    path = Path("params.yaml")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    return text.replace(old, new)


# The recipes


def test_there_are_as_many_as_are_meant() -> None:
    assert len(RECIPES) == 26
    assert [path.stem for path in RECIPES if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", path.stem)] == []


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_gives_legal_params_with_every_comment_and_none_of_its_own(path: Path) -> None:
    text = used(path.stem)
    params.load()
    comments = [line.strip() for line in text.splitlines() if line.strip().startswith("#")]
    default = (ROOT / "params.default.yaml").read_text(encoding="utf-8").splitlines()
    assert comments == [line.strip() for line in default if line.strip().startswith("#")]
    assert len(comments) > 80
    assert max(map(len, text.splitlines())) <= max([120, *map(len, default)])


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_changes_what_it_says_and_nothing_else(path: Path) -> None:
    used(path.stem)
    default, made, over = parsed(Path("params.default.yaml")), params.load().model_dump(), parsed(path)["params"]
    for section, before in params.check(default, "default").model_dump().items():
        if section == "seeds":
            assert made[section] == over.get(section, before)
            continue
        given = over.get(section, {})
        for key, value in before.items():
            if key not in given:
                assert made[section][key] == value
            elif isinstance(given[key], dict) and key in ("files", "holdout", "words", "limits"):
                assert made[section][key] == {**value, **given[key]}
            else:
                assert made[section][key] == given[key]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_explained_and_has_sources_that_are_pinned(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert len(parsed(path)["about"]) <= 100
    used(path.stem)
    given = params.load()
    for one, digest in given.sources:
        if one.startswith("data/"):
            assert digest is None
            assert path.stem.startswith("local-")
        else:
            source.check(one, digest, "data")
            assert one.startswith("hf:") == (digest is None)


def test_together_they_take_every_data_set_and_every_model() -> None:
    texts = [path.read_text(encoding="utf-8") for path in [*RECIPES, ROOT / "params.default.yaml"]]
    for name in (*DATA_SETS, *MODELS):
        assert any(f"/{name}" in text for text in texts), name


def test_a_gated_model_names_its_licence() -> None:
    gated = 0
    for path in RECIPES:
        recipe = parsed(path)
        found = re.match(r"hf:(meta-llama/.+)@", recipe["params"].get("model", {}).get("source", ""))
        assert recipe["needs"].get("licence", []) == ([f"https://huggingface.co/{found[1]}"] if found else [])
        gated += bool(found)
    assert gated == 7


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (
            "{metric: bleu, value: 30, about: a}",
            r"compare.published holds figures in \['bleu'\], which evaluate.metrics",
        ),
        ("{metric: rouge1, value: 101, about: a}", "compare.published.0.value = 101"),
        ("{metric: meteor, value: 30, about: a}", "compare.published.0.metric = 'meteor'"),
        ("{metric: rouge1, value: 30, about: ''}", "compare.published.0.about = ''"),
    ],
)
def test_a_published_figure_is_one_that_can_be_compared(figure: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipes.apply(write("mine.yaml", f"params: {{compare: {{published: [{figure}]}}}}\n"))


# Templates for one's own data


def own(number: int) -> tuple[str, str]:
    """A text with a quotation mark, a comma and a line break in it, and a short one, none like another."""
    return " ".join(f'w{number}"{word},\n' for word in range(12)), f"short {number}"


def local_jsonl(split: str, numbers: range) -> None:
    lines = [json.dumps(dict(zip(("text", "summary"), own(number), strict=True))) for number in numbers]
    Path(f"data/mine/{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def local_csv(split: str, numbers: range) -> None:
    with Path(f"data/mine/{split}.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([("customer", "ticket", "answer"), *((f"c{number // 2}", *own(number)) for number in numbers)])


def local_parquet(split: str, numbers: range) -> None:
    pairs = [dict(zip(("de", "en"), own(number), strict=True)) for number in numbers]
    Dataset.from_dict({"translation": pairs}).to_parquet(f"data/mine/{split}-00000-of-00001.parquet")


def local_chat(split: str, numbers: range) -> None:
    if split == "train":
        keys = (("conversations", "from", "value"), ("messages", "role", "content"))
        rows = []
        for number in numbers:
            key, by, text = keys[number % 2]
            said = zip(("user", "assistant"), own(number), strict=True)
            rows.append({key: [{by: role, text: content} for role, content in said]})
        Path("data/mine/conversations.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


WRITERS = {
    "local-jsonl": local_jsonl, "local-csv": local_csv, "local-parquet": local_parquet, "local-chat": local_chat,
    "local-plain": local_jsonl,
}  # fmt: skip


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", [path.stem for path in RECIPES if path.stem.startswith("local-")])
def test_a_template_reads_such_files_as_it_describes_once_it_is_given_their_digest(name: str) -> None:
    Path("data/mine").mkdir(parents=True)
    for split, rows in (("train", range(60)), ("validation", range(60, 80)), ("test", range(80, 100))):
        WRITERS[name](split, rows)
    text = used(name)
    with pytest.raises(UserError, match="data.sha256 is null: pin the content of data/mine with sha256: ") as told:
        prepare.write_splits(params.load().data)
    digest = str(told.value).rpartition(" ")[2]
    Path("params.yaml").write_text(text.replace("sha256: null", f"sha256: {digest}", 1), encoding="utf-8")
    prepare.write_splits(params.load().data)
    found = {split: records.read_rows(paths.split(split), records.Example) for split in paths.SPLITS}
    numbers = [int(row.target.removeprefix("short ")) for examples in found.values() for row in examples]
    assert sorted(numbers) == sorted(range(60 if name == "local-chat" else 100))
    for examples in found.values():
        assert all(row.source == own(int(row.target.removeprefix("short ")))[0].strip() for row in examples)
    if name == "local-csv":
        assert not {row.group for row in found["train"]} & {row.group for row in found["test"]}


# Using one


def test_the_committed_params_are_those_of_the_default(folder: Path) -> None:
    assert used("default").encode() == (ROOT / "params.yaml").read_bytes()
    (folder / "params.yaml").unlink()
    assert used("default").encode() == (ROOT / "params.yaml").read_bytes()


@pytest.mark.usefixtures("folder")
def test_what_a_recipe_gives_does_not_depend_on_what_was_there() -> None:
    first = {name: used(name) for name in ("default", "samsum-7b", "ui-fr-en")}
    assert len(set(first.values())) == 3
    for name in ("samsum-7b", "default", "ui-fr-en", "samsum-7b", "samsum-7b", "default"):
        assert used(name) == first[name]


@pytest.mark.usefixtures("folder")
def test_runtime_and_tracking_stay_byte_by_byte() -> None:
    change("  device: auto\n", "  device:   cuda  # the big one\n  # in the cellar\n")
    text = change("  experiment: lora-repro\n", "  experiment: theirs")
    machine = re.compile(r"^runtime:.*", re.DOTALL | re.MULTILINE)
    before = machine.search(text)
    for name in ("samsum-7b", "default"):
        after = machine.search(used(name))
        assert before
        assert after
        assert after[0] == before[0] + "\n"
    assert params.load().runtime.device == "cuda"


@pytest.mark.usefixtures("folder")
def test_a_change_is_shown_and_a_second_use_changes_nothing() -> None:
    result = use("lora-bf16")
    assert "-  method: nf4\n+  method: none\n" in result.stdout
    assert "params.yaml is now recipe lora-bf16: the default experiment" in result.stdout
    assert result.stdout.endswith("needs  a package index (PyPI or a mirror)\nnext   dvc repro\n")
    assert "\x1b" not in result.stdout
    again = use("lora-bf16")
    assert again.exit_code == 0
    assert "+" not in again.stdout
    assert "nothing changes" in again.stdout


@pytest.mark.usefixtures("folder")
def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m+  method: none" in use("lora-bf16").stdout


@pytest.mark.usefixtures("folder")
def test_a_dry_run_shows_and_writes_nothing() -> None:
    before = Path("params.yaml").read_bytes()
    result = use("fp4", "--dry-run")
    assert result.exit_code == 0
    assert "+  method: fp4\n" in result.stdout
    assert "nothing was written (--dry-run)\n" in result.stdout
    assert Path("params.yaml").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["params.default.yaml", "params.yaml", "recipes"]


@pytest.mark.usefixtures("folder")
def test_values_keep_the_way_they_are_written() -> None:
    name = write(
        "mine.yaml",
        "params:\n"
        "  data:\n"
        "    words: {max: 40}\n"
        "    files:\n      train:\n        - a/*.csv\n        - b.csv\n"
        "  lora: {target_modules: [q_proj, v_proj]}\n"
        "  train: {learning_rate: 2e-4}\n"
        "  prompt:\n    template: |\n      {source}\n      {instruction}\n"
        "    instructions: {default: 'Say it, please: in one line.', challenge: null}\n",
    )
    with pytest.raises(UserError, match="prompt.instructions.challenge = None"):
        recipes.apply(name)
    Path(name).write_text(Path(name).read_text().replace(", challenge: null", ""))
    text = used(name)
    for part in (
        "  words:\n    min: 1\n    max: 40\n",
        "    train:\n      - a/*.csv\n      - b.csv\n    validation: val.jsonl\n",
        "  target_modules: [q_proj, v_proj]\n",
        "  learning_rate: 2e-4\n",
        '  template: "{source}\\n{instruction}\\n"\n',
        "  instructions: {default: 'Say it, please: in one line.'}\n",
    ):
        assert part in text


# What would be lost


@pytest.mark.usefixtures("folder")
def test_changes_that_are_nowhere_else_are_kept() -> None:
    used("samsum-7b")
    before = change("  r: 64\n", "  r: 8\n")
    change("  device: auto\n", "  device: cpu\n")
    result = use("default")
    assert result.exit_code == 1
    assert "params.yaml holds changes that are in no recipe and no commit. Compared with" in result.stderr
    assert " Compared with recipe samsum-7b:" in result.stderr
    assert "  - lora.r = 8 (64)\n" in result.stderr
    assert result.stderr.count("\n  - ") == 2  # device is the machine's
    assert "--force" in result.stderr
    assert "  r: 8\n" in Path("params.yaml").read_text(encoding="utf-8")
    shown = use("default", "--dry-run")
    assert shown.exit_code == 0
    assert "it would be refused: params.yaml holds" in shown.stdout
    assert "  r: 16\n" in used("default", "--force")
    assert before != Path("params.yaml").read_text(encoding="utf-8")


@pytest.mark.usefixtures("folder")
def test_changes_that_git_has_are_given_up() -> None:
    change("  r: 16\n", "  r: 8\n")
    for command in ("init -q", "add -A", "commit -qm mine"):
        subprocess.run(["git", *command.split()], env=environment(), check=True)
    assert "  r: 16\n" in used("fp4")
    used("default")
    change("  r: 16\n", "  r: 4\n")
    refused = use("fp4")
    assert refused.exit_code == 1
    assert "lora.r = 4 (" in refused.stderr


@pytest.mark.usefixtures("folder")
def test_a_recipe_of_ones_own_is_known_by_its_path_and_once_it_lies_with_the_others() -> None:
    name = write("mine.yaml", "params: {lora: {r: 8}}\n")
    assert "  r: 8\n" in used(name)
    assert "nothing changes" in use(f"./{name}").stdout
    assert use("default").exit_code == 1
    shutil.move(name, "recipes")
    assert "* mine" in use().stdout
    assert "  r: 16\n" in used("default")


# Mistakes


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp44", "no recipe is called fp44; did you mean fp4"),
        ("samsum", "did you mean samsum-"),
        ("zzz", "there are default, "),
        ("recipes/none.yaml", "recipe recipes/none.yaml: there is no such file"),
    ],
)
def test_an_unknown_name_is_told_what_is_near(name: str, message: str) -> None:
    result = use(name)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "head", "message"),
    [
        ("params: {lora: {rank: 8}}", None, "lora.rank = 8: unknown key"),
        ("params: {lora: {r: 0}}", None, "lora.r = 0"),
        ("params: {lorra: {r: 8}}", None, "lorra = {'r': 8}: unknown key; did you mean lora"),
        ("params: {lora: 8}", None, "lora = 8"),
        ("params: {runtime: {device: cpu}}", None, "params.runtime describes the machine"),
        ("params: {model: {source: 'hf:a/b@main', sha256: null}}", None, "needs.hub = False"),
        ("params: [", None, "is not YAML"),
        ("- 1", "", "is not a recipe: it must hold about, source, needs, params"),
        ("params: {}", "about: a\nneeds: {gpu: 3}\n", "source: Field required"),
        ("params: {}", "about: a\nsource: b\nneeds: {gpu: 3}\n", "needs.gpu: Extra inputs"),
        ("params:", None, "params: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_in_a_recipe_is_told(text: str, head: str | None, message: str) -> None:
    before = Path("params.yaml").read_bytes()
    name = write("mine.yaml", text, *([] if head is None else [head]))
    result = use(name)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "mine.yaml" in result.stderr
    assert Path("params.yaml").read_bytes() == before


@pytest.mark.usefixtures("folder")
def test_what_is_missing_or_broken_around_it_is_told() -> None:
    change("  device: auto\n", "  device: gpu\n")
    assert "runtime.device = 'gpu'" in use("fp4").stderr
    Path("params.yaml").write_text("a: [", encoding="utf-8")
    assert "params.yaml is not YAML: " in use("fp4").stderr
    Path("params.yaml").write_text("- 1", encoding="utf-8")
    assert "params.yaml holds no sections" in use("fp4").stderr
    Path("params.default.yaml").unlink()
    assert "params.default.yaml is missing: run this in the project folder" in use("fp4").stderr


# What it needs


@pytest.mark.usefixtures("folder")
def test_the_list_says_what_each_needs_and_which_one_is_here() -> None:
    used("fp4")
    lines = use().stdout.splitlines()
    assert lines[0].split() == ["default", "package", "index", *parsed(ROOT / "recipes/default.yaml")["about"].split()]
    assert [line.split()[1] for line in lines if line.startswith("* ")][:1] == ["fp4"]
    assert any(re.fullmatch(r"  samsum-7b +hub, licence, GPU 19 GB  Llama-2-7B.*", line) for line in lines)
    assert any(re.fullmatch(r"  local-plain +own data, own model +template: .*", line) for line in lines)


@pytest.mark.usefixtures("folder")
def test_what_a_recipe_needs_is_said_at_once() -> None:
    printed = use("samsum-7b").stdout
    given = params.load()
    prepare, model = str(given.data.source), given.model.source
    assert f"needs  the Hugging Face hub (huggingface.co), for {prepare[3:]} and {model[3:]}\n" in printed
    page = "https://huggingface.co/meta-llama/Llama-2-7b-hf"
    assert f"needs  the licence accepted on {page}, then `hf auth login` or HF_TOKEN\n" in printed
    assert "needs  a GPU with 19 GB: warning, no NVIDIA GPU was found\n" in printed
    assert "needs  a package index, for the text of forget; not with forget.probes: []\n" in printed
    own = "needs  your data in data/mine (not there yet); with data.sha256: null the error names its digest\n"
    assert own in use("local-csv").stdout
    Path("data/mine").mkdir(parents=True)
    assert "data/mine (found)" in use("local-csv").stdout


NVIDIA_SMI = """#!/bin/sh
test "$*" = "--query-gpu=name,memory.total --format=csv,noheader,nounits" && printf '%b' '{printed}'
exit {code}
"""


@pytest.mark.parametrize(
    ("printed", "code", "told"),
    [
        (r"NVIDIA A10G, 23028\nTesla T4, 15360\n", 0, "NVIDIA A10G with 24 GB found"),
        (r"Tesla T4, 15360\n", 0, "warning, the largest here is Tesla T4 with 16 GB"),
        ("", 0, "warning, no NVIDIA GPU was found"),
        (r"No devices were found\n", 0, "warning, no NVIDIA GPU was found"),
        (r"NVIDIA A10G, 23028\n", 9, "warning, no NVIDIA GPU was found"),
    ],
)
def test_a_gpu_is_asked_for_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, code: int, told: str
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(NVIDIA_SMI.format(printed=printed, code=code))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert recipes._gpu_found(24) == told


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "key", "kind"), [("prepare", "data", "datasets/"), ("fetch", "model", "")])
def test_without_the_hub_a_run_ends_at_once_and_says_what_to_do(
    folder: Path, tmp_path: Path, stage: str, key: str, kind: str
) -> None:
    """Through DVC, with huggingface_hub's own code."""
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "dvc.yaml"):
        shutil.copy(ROOT / name, name)
    used("samsum-7b")
    subprocess.run(["dvc", "init", "-q", "--no-scm"], env=environment(), check=True)
    offline = environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    started = time.monotonic()
    done = subprocess.run(["dvc", "repro", stage], cwd=folder, env=offline, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    given = params.load()
    wanted = str(getattr(given, key).source).removeprefix("hf:")
    page = f"https://huggingface.co/{kind}{wanted.partition('@')[0]}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for part in (f"{key}.source: cannot fetch {wanted}", "HF_HUB_OFFLINE", page, "HF_TOKEN", "or use a local path"):
        assert part in errors[0]
    assert "Traceback" not in done.stderr
