"""An export holds what the run measured: the commands of its own card, run as they stand, write the run's predictions.

The tests share one finished project and put back what they break.
"""

import contextlib
import inspect
import io
import json
import math
import os
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from pipeline.commands import cli
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.export import card, export, licence, merge
from pipeline.model import checkpoint
from pipeline.model.prompt import Encoder
from tests import ROOT
from tests.made.clone import Finished, entered, environment
from tests.made.templates import HEADED

pytestmark = pytest.mark.usefixtures("mlflow_calls_what_its_dependencies_deprecate")

SEED = 17
ROW = "test-0/what"


@pytest.fixture(scope="module")
def copied(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.copy(tmp_path_factory.mktemp("export") / "project")


@pytest.fixture(autouse=True)
def here(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished project as the working directory."""
    return entered(copied, monkeypatch)


@pytest.fixture(scope="module")
def adapter(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the adapter, which no test changes."""
    folder = tmp_path_factory.mktemp("adapter") / "out"
    with contextlib.chdir(copied), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
        assert f"export: adapter of seed {SEED}, " in run("adapter", str(folder))
    return folder


def run(*arguments: str) -> str:
    """The command with these arguments, and what it printed; UserError as the command reports it."""
    result = CliRunner().invoke(cli.app, ["export", *arguments])
    if result.exit_code:
        assert isinstance(result.exception, SystemExit), result.exception
        raise UserError(result.stderr)
    return result.stdout


def blocks(folder: Path) -> list[str]:
    """The Python of a card."""
    found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert found
    return found


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the card's own commands print, in the folder, once a text of the test set stands in its place."""
    example = next(one for one in records.read_rows(paths.split("test"), records.Example) if one.id == ROW)
    [code] = blocks(folder)
    code, changed = re.subn(r"^source = .*$", lambda _: f"source = {example.source!r}", code, flags=re.MULTILINE)
    assert changed == 1
    printed = io.StringIO()
    with monkeypatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.chdir(folder)
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue().removesuffix("\n")


def predicted() -> str:
    rows = records.read_rows(paths.predictions(f"tuned-{SEED}"), records.Prediction)
    return next(row.text for row in rows if row.id == ROW)


def complete(folder: Path) -> dict[str, Any]:
    """The record of an export, once what holds of every one does: digests, no other file, no path of this machine."""
    record: dict[str, Any] = records.read_json(folder / export.RECORD)
    for name, one in record["files"].items():
        assert records.sha256_file(folder / name) == one["sha256"]
    listed = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    assert listed.keys() == {*record["files"], "README.md", export.RECORD}
    for name, file in listed.items():
        assert str(folder.parent.parent).encode() not in file.read_bytes(), name
    assert record["difference"]["rows"] == 8
    return record


def test_an_adapter_writes_what_the_run_predicted(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    difference = complete(adapter)["difference"]
    assert difference["loss"] == pytest.approx(difference["loss_measured"], rel=1e-5)
    assert written(adapter, monkeypatch) == predicted()


def test_merged_weights_write_what_the_run_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"export: merged of seed {SEED}, " in run("merged", str(tmp_path / "out"))
    difference = complete(tmp_path / "out")["difference"]
    assert difference["loss"] == pytest.approx(difference["loss_measured"], rel=1e-5)
    assert written(tmp_path / "out", monkeypatch) == predicted()


def test_gguf_files_write_what_the_run_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base and adapter apart, in float32: what llama.cpp computes of them is what was measured."""
    run("gguf", str(tmp_path / "out"), "--type", "F32")
    difference = complete(tmp_path / "out")["difference"]
    assert difference["loss"] == pytest.approx(difference["loss_measured"], rel=1e-5)
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./base-F32.gguf\nADAPTER ./adapter-F32.gguf\n")
    assert written(tmp_path / "out", monkeypatch) == predicted()


def test_a_merged_gguf_file_says_what_its_type_costs(tmp_path: Path) -> None:
    run("gguf", str(tmp_path / "out"), "--merged", "--type", "Q4_0")
    record = complete(tmp_path / "out")
    assert (record["what"], set(record["files"])) == ("gguf-merged", {"model-Q4_0.gguf", "Modelfile"})
    assert record["difference"]["logit_max"] > 0.01
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| {record['difference']['loss']:.3f} |" in text
    assert "written as Q4_0 with the output head in Q8_0" in text
    assert "lora-repro export gguf DEST --seed 17 --type Q4_0 --merged" in text
    assert record["type"] == "Q4_0"
    assert "With ollama: `ollama create tuned -f Modelfile`." in text
    assert "PARAMETER num_ctx 208" in (tmp_path / "out" / "Modelfile").read_text()
    compile(blocks(tmp_path / "out")[0], "README.md", "exec")


def test_files_that_lose_quality_are_said_to() -> None:
    """1 % of perplexity, as the bound of `lora-repro parity` is."""
    assert inspect.signature(cli.parity).parameters["max_rise"].default == card.MAX_RISE
    measured = merge.Difference(2.0, 2.0 + math.log(1.0099), 0.1, 0.01, 0.9, 801, 40)
    assert card.loss(measured) is None
    assert card.loss(None) is None
    assert card.loss(replace(measured, loss=2.0 + math.log(1.28))) == (
        "These files lose quality: the perplexity of 801 tokens of validation answers is 28.0 % above that of the "
        "model as it was trained."
    )


def test_a_lossy_export_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "MAX_RISE", -1.0)
    printed = run("gguf", str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "export: These files lose quality: " in printed
    assert "\n- These files lose quality: " in text
    assert "With ollama before 0.34.1: `ollama create tuned -f Modelfile`" in text
    assert records.read_json(tmp_path / "out" / export.RECORD)["type"] == "Q8_0"


def test_the_card_s_numbers_are_the_run_s(adapter: Path) -> None:
    loaded = ModelCard.load(adapter / "README.md")
    numbers, given = records.read_json(paths.METRICS), params.load()
    assert (loaded.data.license, loaded.data.library_name, loaded.data.base_model) == ("unknown", "peft", None)
    assert loaded.data.lora_repro["digest"] == records.read_json(paths.RECEIPT)["digest"]
    labels = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
    assert {one.metric_name.split(" ")[0]: one.metric_value for one in loaded.data.eval_results} == {
        label: round(numbers[name]["tuned"], 2) for name, label in labels.items()
    }
    for part in (
        f"{numbers['rouge1']['base']:.1f}", f"{numbers['cost']['general_loss']['general']['base']:.3f}",
        f"{numbers['cost']['trainable_parameters']:,} trainable parameters", "| `lora.r` | 4 |", "## Read with care",
        r'| `prompt.template` | "{source}\\n\\n{instruction}" |',
        given.model.sha256, "| `data.source` | local:source |", "MLflow run",
        "Licence: not known (the source states none)",
    ):  # fmt: skip
        assert str(part) in loaded.content, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merged", "DEST", "--type", "Q8_0"), "--type is for gguf: merged has no such choice"),
        (("adapter", "DEST", "--merged"), "--merged is for gguf: adapter has no such choice"),
        (("merged", "DEST", "--base"), "--base and --no-base are for adapter: merged holds its base in any case"),
        (("gguf", "DEST", "--type", "Q9_9"), "--type Q9_9: a GGUF file is written as "),
        (("adapter", "DEST", "--seed", "18"), "--seed 18 was not trained: give one of 17"),
        (("adapter", "out/export"), "is in out, which DVC manages"),
        (("adapter", "stages"), "stages exists and is not an export of this command"),
        (("adapter", "params.yaml", "--overwrite"), "params.yaml exists and is not an export of this command"),
    ],
)
def test_what_would_be_of_no_effect_or_do_harm_is_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(*(str(tmp_path / "out") if one == "DEST" else one for one in arguments))
    assert not (tmp_path / "out").exists()
    assert Path("stages/fetch.py").is_file()


def test_an_earlier_export_is_replaced_whole_and_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    run("adapter", str(folder), "--no-base")
    assert not (folder / "base").exists()
    assert '"<folder of the base>"' in blocks(folder)[0]
    with pytest.raises(UserError, match="already holds an export: name another folder, or add --overwrite"):
        run("adapter", str(folder))
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(card, "render", lambda _: 1 / 0)
        export.write(export.Asked("adapter", None, None, False, False), folder, True)
    assert (folder / export.RECORD).exists()
    (folder / "own").symlink_to(Path.cwd())
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    with pytest.raises(
        UserError, match=r"holds files that no export wrote and --overwrite would remove(?s:.*).git/HEAD\n.*own"
    ):
        run("adapter", str(folder), "--overwrite")
    (folder / "own").unlink()
    (folder / ".git" / "HEAD").unlink()
    (folder / "config.json").write_text("of an earlier one")
    record = records.read_json(folder / export.RECORD)
    records.write_json(folder / export.RECORD, record | {"files": record["files"] | {"config.json": {}}})
    (tmp_path / "link").symlink_to(folder)
    run("adapter", str(tmp_path / "link"), "--no-base", "--overwrite")
    assert not (folder / "config.json").exists()
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "out"]
    (folder / export.RECORD).write_text("{}")
    with pytest.raises(UserError, match="exists and is not an export of this command"):
        run("adapter", str(folder), "--overwrite")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(UserError, match=f"cannot write {place} .*: name a folder inside one that you may write to"):
            run("adapter", str(place))


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_a_place_whose_name_is_no_utf8_is_refused_before_anything_is_computed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokenizers opens no such path, neither here nor for whoever would load the export."""
    monkeypatch.setattr(merge, "base", lambda: pytest.fail("it is refused before"))
    for place in (tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"caf\xe9") / "out"):
        with pytest.raises(UserError, match=r"whose name is not UTF-8.*: rename it"):
            run(what, str(place))
        assert not place.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_the_run_s_is_not_exported(tmp_path: Path) -> None:
    lock = paths.DVC_LOCK.read_text()
    text = paths.PARAMS.read_text()
    weights = paths.adapter(SEED) / "adapter_model.safetensors"
    content, mode = weights.read_bytes(), weights.stat().st_mode
    for path, change, message in (
        (paths.PARAMS, text.replace("r: 4", "r: 8"), "stage train@17: changed since it ran: lora"),
        (paths.METRICS, "{}", "reports/metrics.json: not what stage compare wrote"),
        (paths.DVC_LOCK, None, "dvc.lock is missing"),
    ):
        kept = path.read_text()
        path.unlink() if change is None else path.write_text(change)
        try:
            with pytest.raises(UserError, match=re.escape(message)):
                run("merged", str(tmp_path / "out"))
        finally:
            path.write_text(kept)
    weights.chmod(0o644)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        UserError, match=r"out/adapters/17 \(adapter_model.safetensors\): not what stage train@17 wrote"
    ):
        run("merged", str(tmp_path / "out"))
    weights.write_bytes(content)
    weights.chmod(mode)
    assert paths.DVC_LOCK.read_text() == lock
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_modes_are_those_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run("adapter", str(tmp_path / "adapter"))
        run("gguf", str(tmp_path / "gguf"))
    finally:
        os.umask(before)
    found = list(tmp_path.rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o777 & ~umask}
    modes = {str(path): path.stat().st_mode & 0o777 for path in found if path.is_file()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert {path.name for path in found if path.is_dir()} == {"adapter", "base", "gguf"}


REVISION = "0123456789" * 4


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
def test_a_base_on_the_hub_is_named_by_its_revision(method: str) -> None:
    """The commands are right Python for it; they are not run, since they would ask the hub."""
    given = params.load()
    model = given.model.model_copy(update={"source": f"hf:owner/base@{REVISION}", "dtype": "bfloat16"})
    quantize = given.quantize.model_copy(update={"method": method})
    content = content_of(given.model_copy(update={"model": model, "quantize": quantize}))
    packages, code = card.loading(content)
    compile(code, "README.md", "exec")
    assert packages == "torch transformers peft" + ("" if method == "none" else " accelerate bitsandbytes")
    assert f'from_pretrained("owner/base", revision="{REVISION}", dtype="bfloat16"' in code
    assert ("BitsAndBytesConfig(load_in_4bit=True" in code) == (method == "nf4")
    assert ("BitsAndBytesConfig(load_in_8bit=True" in code) == (method == "int8")


@pytest.mark.parametrize(("method", "held"), [("nf4", False), ("int8", False), ("gptq", True), ("hqq", True)])
def test_an_adapter_goes_with_its_base_where_its_reader_could_not_make_it(method: str, held: bool) -> None:
    given = params.load(ROOT / "params.yaml")
    model = given.model.model_copy(update={"source": f"hf:owner/base@{REVISION}"})
    on_hub = given.model_copy(update={"model": model, "quantize": given.quantize.model_copy(update={"method": method})})
    asked = export.Asked("adapter", None, None, False, None)
    assert asked.includes_base(on_hub) == held
    assert replace(asked, with_base=True).includes_base(on_hub)
    if not held:
        assert not replace(asked, with_base=False).includes_base(on_hub)
        return
    with pytest.raises(UserError, match=f"--no-base with quantize.method = '{method}': whoever loads the adapter"):
        replace(asked, with_base=False).includes_base(on_hub)


def content_of(given: params.Params) -> card.Content:
    missing: Any = None
    return card.Content(
        "adapter", SEED, given, None, "", {}, None, "", missing, missing, None,
        {given.model.source: licence.Stated(None, "x")}, "",
    )  # fmt: skip


@pytest.mark.parametrize("thinking", [False, True])
def test_the_card_s_prompt_is_the_experiment_s(thinking: bool, tiny_model: Path) -> None:
    """Its code asks a model to think or not as the run did, and makes the same tokens."""
    tokenizer = checkpoint.tokenizer(tiny_model)
    tokenizer.chat_template = HEADED
    given = params.load(ROOT / "params.yaml").prompt.model_copy(update={"thinking": thinking})
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec("\n".join([*card._text(given), *card._prompt(given)]), names)
    example = records.Example("a", "a", next(iter(given.instructions)), names["source"], "b", "")
    expected = Encoder(tokenizer, given, 4096).prompt(example)
    assert tokenizer(names["prompt"], add_special_tokens=False).input_ids == expected


def test_local_sources_are_named_without_their_path() -> None:
    assert card.shown("/home/someone/data/tickets") == "local:tickets"
    assert card.shown("pip:toy==1.0/toy") == "pip:toy==1.0/toy"
    assert json.dumps(card.hub(f"hf:a/b@{REVISION}")) == f'["a/b", "{REVISION}"]'
    assert card.hub(f"hf:a/b@{REVISION}/part") is None


NASTY = (
    "a`b", "a``b`", "`", "a\n```\n# heading", "a\n---\nlicense: mit", "a | b |", "[x](http://evil.example)", "# a",
    "<script>x</script>", "![x](//evil.example)", "www.evil.example", "a\u2028b \u202ec", "\ud800x", "a\\", "<!-- a",
    "a\0\x1b[31mb", "*a* _b_ ~~c~~", "'\"\"\"{{ a }}{% b %}", "&lt;b&gt;", "a\r\n\r\n    b", "1\n- 2\n> 3",
    "\u00e9 \U0001f600",
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> card.Content:
    """What the card of an export is made of."""
    found: list[card.Content] = []

    def render(content: card.Content) -> str:
        found.append(content)
        return "a card"

    with contextlib.chdir(copied), pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")
        for name, value in environment().items():
            patched.setenv(name, value)
        patched.setattr(card, "render", render)
        export.write(export.Asked("adapter", None, None, False, None), tmp_path_factory.mktemp("card") / "out", False)
    return found[0]


def named(content: card.Content, text: str) -> str:
    """The card of an export where `text` is the name of sources, files and parameters, licence, run and instruction."""
    given, source = content.given, f"/data/{text.replace('/', '')}"
    prompt = {"template": text + "{instruction}{source}", "instructions": {text: text, "a": "b"}}
    changed: dict[str, dict[str, Any]] = {"model": {"source": source}, "data": {"source": source}, "prompt": prompt}
    changed["forget"] = {"probes": [content.given.forget.probes[0].model_copy(update={"source": source})]}
    return card.render(
        replace(
            content,
            given=given.model_copy(
                update={key: getattr(given, key).model_copy(update=change) for key, change in changed.items()}
            ),
            files={text: (1, "0" * 64), "other": (2, "1" * 64)},
            measured=None,
            why_not_measured=text,
            run=text,
            licences={source: licence.Stated(text, text)},
            origin=replace(content.origin, params=content.origin.params | {text: text}, changed=[text]),
        )
    )


def kinds(body: str) -> Counter[str]:
    """The kinds of what a reader makes of Markdown, with their numbers, without those that any text may have; all HTML
    is the card's own."""
    found: Counter[str] = Counter()
    for block in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body):
        found[block.type] += 1
        for token in block.children or []:
            assert token.type != "html_inline" or token.content in ("<code>", "</code>", "<br>"), token.content
            found[token.type] += token.type not in ("text", "text_special", "code_inline", "html_inline", "softbreak")
    return +found


@pytest.mark.parametrize("text", NASTY)
def test_a_card_shows_any_name_as_text(text: str, exported: card.Content) -> None:
    """No link, heading, row or tag is made of it; no code block, no metadata and no string of Python ends at it."""
    made = named(exported, text)
    assert made.encode()
    body = made.partition("\n---\n")[2]
    assert kinds(body) == kinds(named(exported, "plain").partition("\n---\n")[2])
    metadata: Any = ModelCard(made).data
    assert metadata.lora_repro["digest"] == exported.origin.digest
    assert metadata.license == "other"
    [code] = re.findall(r"```python\n(.*?)```\n", body, flags=re.DOTALL)
    assert all(one.isprintable() for one in code.splitlines())
    values: dict[str, Any] = {}
    start, end = code.index("instructions = "), code.index("text = text.replace")
    exec(compile(code[start:end], "README.md", "exec"), values)
    assert (values["instructions"], values["text"]) == ({text: text, "a": "b"}, text + "{instruction}{source}")
