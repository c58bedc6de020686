"""Forgetting: the sums are those of two plain forward passes; texts are what the parameters say."""

import html
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import forget
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import Forgetting
from pipeline.core.errors import UserError
from pipeline.fetch import fetch
from pipeline.lora import adapter
from pipeline.model import attention, checkpoint, load, loss, pack
from pipeline.model.prompt import Row
from pipeline.model.windows import Tokens
from pipeline.quantize import quantize
from pipeline.sources.account import Account
from tests.made.data import WORDS
from tests.made.models import reading_bos
from tests.made.records import quantized_facts
from tests.made.variants import trained

LORA = params.Lora(r=4, alpha=8.0, rslora=False, dropout=0.0, target_modules="all-linear")


def adapted(folder: Path, strength: float = 0.1) -> Any:
    """The tiny model with an adapter that acts."""
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME).requires_grad_(False)
    model = adapter.attach(base, LORA, 7)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, tensor in adapter.tensors(model).items():
            if "lora_B" in name:
                tensor.normal_(std=strength)
    return model.eval()


# Measuring


def test_the_sums_are_those_of_plain_passes_however_they_are_cut(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_model)
    windows = [Tokens(str(i), list(range(40 + i, 40 + i + length))) for i, length in enumerate((30, 2, 17, 44, 30))]
    found = forget.measure(model, windows, "forget")
    monkeypatch.setattr(forget, "POSITIONS", 7)
    monkeypatch.setattr(forget, "TOGETHER", 40)
    again = forget.measure(model, windows, "forget")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for window, one, other in zip(windows, found, again, strict=True):
        ids_1xL = torch.tensor([window.ids])
        with torch.no_grad():
            base_NxV = plain(input_ids=ids_1xL).logits[0, :-1].log_softmax(-1)
            tuned_NxV = loss.logits(model, pack.pack([tree(window)], ids_1xL.device))[0].log_softmax(-1)
        target_N = ids_1xL[0, 1:]
        expected = [
            float(torch.nn.functional.nll_loss(log, target_N, reduction="sum")) for log in (base_NxV, tuned_NxV)
        ]
        expected += [float(-(base_NxV.exp() * log).sum()) for log in (tuned_NxV, base_NxV)]
        for sums in (one, other):
            assert (sums.place, sums.tokens) == (window.place, len(window.ids) - 1)
            assert [sums.base, sums.tuned, sums.cross_entropy, sums.entropy] == pytest.approx(expected, rel=1e-4)
        assert one.cross_entropy > one.entropy


def tree(window: Tokens) -> Any:
    return pack.tree([Row("", "", window.ids[:1], window.ids[1:])])


def test_an_adapter_that_does_nothing_forgets_nothing(tiny_model: Path) -> None:
    (one,) = forget.measure(adapted(tiny_model, strength=0.0), [Tokens("a", list(range(40, 70)))], "forget")
    assert one.tuned == one.base
    assert one.cross_entropy == one.entropy


# Texts


def section(folder: Path, files: str | list[str], **change: Any) -> params.Forget:
    given: dict[str, Any] = {"source": str(folder), "sha256": records.sha256_tree(folder), "files": files}
    given |= {"encoding": "utf-8", "column": None, "html": False, "tokens": 64, "window": 16}
    return params.Forget.model_validate(given | change)


def texts(folder: Path, files: str | list[str], **change: Any) -> list[str]:
    given = section(folder, files, **change)
    assert given.source
    return [text.content for text in forget.texts(given, given.source)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("One text.\nOf two lines.\n")
    (tmp_path / "own" / "b.txt").write_text("Another.")
    (tmp_path / "own" / "again.txt").write_text("Another.")
    (tmp_path / "own" / "empty.txt").write_text(" \n")
    rows = [{"body": {"text": "<p>Caf&eacute; &amp; bar<br>open</p>"}}, {"body": {"text": ""}}, {"body": {}}]
    (tmp_path / "own" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own" / "whole.json").write_text(json.dumps({"body": {"text": "Whole."}}, indent=2))
    return tmp_path / "own"


def test_plain_text_is_a_document_a_file_once_and_in_an_order_of_its_own(folder: Path) -> None:
    found = texts(folder, "*.txt")
    assert sorted(found) == ["Another.", "One text.\nOf two lines.\n"]
    (folder / "a.txt").rename(folder / "z.txt")
    assert texts(folder, "*.txt") == found


def test_a_column_is_a_document_a_record_and_html_is_read_as_text(folder: Path) -> None:
    files = ["rows.jsonl", "whole.json"]
    assert sorted(texts(folder, files, column="body.text")) == ["<p>Caf&eacute; &amp; bar<br>open</p>", "Whole."]
    assert sorted(texts(folder, files, column="body.text", html=True)) == ["Caf\u00e9 & bar\nopen", "Whole."]


def test_what_gives_no_text_of_its_own_is_counted(folder: Path) -> None:
    def left_out(files: str | list[str], **change: Any) -> dict[str, int]:
        account = Account()
        given = section(folder, files, **change)
        assert given.source
        forget.texts(given, given.source, account)
        return dict(+account.left_out)

    assert left_out("*.txt") == {"empty texts": 1, "repeated texts": 1}
    assert left_out("*.jsonl", column="body.text") == {"empty texts": 1, "records without a text": 1}
    assert left_out("a.txt") == {}
    (folder / "de.po").write_text('#, fuzzy\nmsgid "a"\nmsgstr "b"\n\nmsgid "c"\nmsgstr "d"\n')
    assert left_out("de.po", column="msgid") == {"fuzzy entries": 1}


@pytest.mark.parametrize(
    ("files", "column", "told"),
    [
        ("*.txt", "body", r"forget.column = 'body', but a.txt is plain text: set it to null"),
        ("*.jsonl", None, r"forget.column is null, but rows.jsonl holds records: name the column"),
        ("*.jsonl", "text", r"forget.column = 'text': rows.jsonl has no such column; it has body.text"),
        ("*.jsonl", "body", r"forget.column = 'body': at rows.jsonl:1 it is dict, not text"),
        ("*.csv", None, r"forget.files = '\*.csv': forget.source has no such file"),
        ("../*.txt", None, r"forget.files = '../\*.txt': must lie in forget.source"),
    ],
)
def test_what_does_not_fit_is_told(folder: Path, files: str, column: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        texts(folder, files, column=column)


def test_another_encoding_is_told_by_the_key_that_sets_it(folder: Path) -> None:
    (folder / "a.txt").write_bytes("caf\u00e9".encode("cp1252"))
    with pytest.raises(UserError, match=r"a.txt:1 is not UTF-8 .*: set forget.encoding to the encoding"):
        texts(folder, "a.txt")
    assert texts(folder, "a.txt", encoding="cp1252") == ["caf\u00e9"]


TAGS = (
    "<", "<p", "</p", "<BR", "<br/", "p", "a", "<a", " href='x'", ">", "/", ">", " ", "  ", "\t", "\n", "\xa0",
    "\u2028", "\x0c", "\x1c", "&", "&lt;", "&lt", "&gt;", "&#", "&#x", "0", "00000", "1", "65", "6", "123456789",
    "&#65;", ";", "&#0000000000065;", "&#99999999;", "&#1114112;", "&#0;", "&#x41;", "x", "&nbsp;", "&amp;lt;", "é",
)  # fmt: skip


def test_the_text_of_html_is_that_of_the_plain_expressions() -> None:
    def plain(text: str) -> str:
        text = re.sub(r"(?i)<(br|/?p)\b[^>]*>", "\n", text)
        text = html.unescape(re.sub(r"</?[A-Za-z][^>]*>", "", text))
        return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\xa0]+", " ", text)).strip()

    draw = random.Random(0)
    for _ in range(50_000):
        text = "".join(draw.choices(TAGS, k=draw.randrange(16)))
        assert forget.without_tags(text) == plain(text), text


def test_a_character_of_thousands_of_digits_is_none() -> None:
    assert forget.without_tags("a&#" + "9" * 10_000 + ";b") == "a\ufffdb"
    assert forget.without_tags("a&#" + "0" * 10_000 + "65;b") == "aAb"


# The stage


@pytest.fixture
def ready(project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> params.Params:
    """A project with an adapter of seed 17, and the tiny model in the place of the quantized base."""
    facts = quantized_facts(sha256="a" * 64, dtype="float32", method="none", double_quantization=False)
    contracts.write(paths.QUANTIZED_FACTS, facts)
    shutil.copytree(tiny_model, paths.QUANTIZED)
    model = adapted(tiny_model)
    adapter.save(model, adapter.tensors(model), paths.adapter(17), "a" * 64)
    monkeypatch.setattr(checkpoint, "tokenizer", lambda: AutoTokenizer.from_pretrained(tiny_model))
    monkeypatch.setattr(
        load,
        "quantized",
        lambda *_: AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention.NAME),
    )
    return project


def test_the_stage_writes_sums_and_means(ready: params.Params) -> None:
    forget.measure_seed(17, ready.forget, ready.runtime)
    written = contracts.read(paths.forgetting(17), Forgetting)
    found = written.measured
    assert found is not None
    assert found.tokens == ready.forget.tokens == sum(one.tokens for one in found.windows)
    assert found.texts == len({one.place for one in found.windows}) > 1
    assert written.adapter_sha256 == adapter.Saved(paths.adapter(17)).sha256
    assert found.base_loss == pytest.approx(sum(one.base for one in found.windows) / found.tokens)
    assert found.tuned_loss == pytest.approx(sum(one.tuned for one in found.windows) / found.tokens)
    assert found.kl == pytest.approx(found.cross_entropy - found.base_entropy)
    assert found.kl > 0
    first = paths.forgetting(17).read_bytes()
    forget.measure_seed(17, ready.forget, ready.runtime)
    assert paths.forgetting(17).read_bytes() == first


@pytest.mark.parametrize(("family", "bos"), [("gemma3_text", True), ("qwen3", False)])
def test_the_loss_is_that_of_transformers_on_text_as_the_model_reads_it(
    family: str, bos: bool, project: params.Params, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = reading_bos(family, bos, tiny_model, tmp_path / "m")
    fetch.write_base(params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32"))
    quantized = project.quantize.model_copy(update={"method": "none", "double_quantization": False})
    quantize.write_quantized(quantized, project.runtime)
    trained(rslora=False)
    (tmp_path / "texts").mkdir()
    for number in range(9):
        words = random.Random(number).choices(WORDS, k=40)
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(words))
    given = section(tmp_path / "texts", "*.txt", window=32, tokens=200)
    forget.measure_seed(17, given, project.runtime)
    found = contracts.read(paths.forgetting(17), Forgetting).measured
    assert found is not None
    assert (found.window, found.bos) == (32, bos)
    said = "each with a BOS first" if bos else "without BOS, as the model reads text"
    assert f"windows of {found.window} tokens, {said}" in capsys.readouterr().out
    # Every text is longer than a window, so each is its tokens' beginning.
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(paths.BASE, dtype=torch.float32), checkpoint.tokenizer()
    by_place = {text.place: text.content for text in forget.texts(given, str(tmp_path / "texts"))}

    def loss_of(bos: bool) -> float:
        total = 0.0
        for window in found.windows:
            ids = tokenizer(by_place[window.place], add_special_tokens=bos).input_ids[: window.tokens + 1]
            with torch.no_grad():
                mean = plain(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
            total += float(mean) * (len(ids) - 1)
        return total / found.tokens

    assert len({window.place for window in found.windows}) == len(found.windows)
    assert found.base_loss == pytest.approx(loss_of(bos), rel=1e-5)
    if bos:
        assert loss_of(False) > found.base_loss + 0.5


def test_what_was_left_out_is_written_and_told(
    ready: params.Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sorted(set((tmp_path / "data" / "general.jsonl").read_text().splitlines()))

    def measured(*lines: str) -> dict[str, Any]:
        (tmp_path / "more").mkdir(exist_ok=True)
        (tmp_path / "more" / "general.jsonl").write_text("\n".join(lines))
        change = {"source": str(tmp_path / "more"), "sha256": records.sha256_tree(tmp_path / "more")}
        forget.measure_seed(17, ready.forget.model_copy(update=change), ready.runtime)
        contracts.read(paths.forgetting(17), Forgetting)
        found: dict[str, Any] = records.read_json(paths.forgetting(17))["measured"]
        return found

    assert "left_out" not in measured(*rows)
    assert "left out" not in capsys.readouterr().out
    assert measured(*rows, *rows, '{"text": null}')["left_out"] == {"records without a text": 1, "repeated texts": 12}
    assert "forget 17: left out: records without a text (1), repeated texts (12)\n" in capsys.readouterr().out


def test_without_a_source_nothing_is_measured_and_that_is_written(ready: params.Params) -> None:
    forget.measure_seed(17, ready.forget.model_copy(update={"source": None}), ready.runtime)
    found = records.read_json(paths.forgetting(17))
    assert found["source"] is None
    assert sorted(found) == ["adapter_sha256", "model_sha256", "seed", "source"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"window": 513}, "forget.window = 513, but the model's context is 512 tokens"),
        ({"tokens": 10}, "gives 1 windows of text, too few for an interval"),
        ({"sha256": "0" * 64}, "forget.sha256 = '0000"),
        ({"source": "pip:nothing"}, "forget.source = 'pip:nothing': write pip:"),
        ({"source": "nowhere"}, "forget.source = 'nowhere': no such file or folder in "),
    ],
)
def test_a_mistake_is_one_clear_error(ready: params.Params, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        forget.measure_seed(17, ready.forget.model_copy(update=change), ready.runtime)
    assert not paths.forgetting(17).exists()
