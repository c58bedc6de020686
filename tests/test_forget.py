"""Forgetting: the sums are those of two plain forward passes; texts are what the parameters say."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import forget, probes
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import Forgetting
from pipeline.core.errors import UserError
from pipeline.fetch import fetch
from pipeline.lora import adapter, start
from pipeline.model import attention, checkpoint, load, loss, pack
from pipeline.model.windows import Tokens
from pipeline.quantize import quantize
from pipeline.sources.account import Account
from tests.made.data import WORDS
from tests.made.models import reading_bos
from tests.made.parameters import lora, probe_of, with_probe
from tests.made.records import quantized_facts
from tests.made.variants import trained

LORA = lora()


def adapted(folder: Path, strength: float = 0.1) -> Any:
    """The tiny model with an adapter that acts."""
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME).requires_grad_(False)
    model = start.attach(base, LORA, 7)
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
    rows = [window.row() for window in windows]
    found = forget.measure(model, rows, "forget")
    monkeypatch.setattr(forget, "POSITIONS", 7)
    monkeypatch.setattr(forget, "TOGETHER", 40)
    again = forget.measure(model, rows, "forget")
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
    return pack.tree([window.row()])


def test_an_adapter_that_does_nothing_forgets_nothing(tiny_model: Path) -> None:
    (one,) = forget.measure(adapted(tiny_model, strength=0.0), [Tokens("a", list(range(40, 70))).row()], "forget")
    assert one.tuned == one.base
    assert one.cross_entropy == one.entropy


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
    (found,) = written.probes
    (probe,) = ready.forget.probes
    assert (found.name, found.style, found.source) == ("general", "plain", probe.source)
    assert found.tokens == probe.tokens == sum(one.tokens for one in found.windows)
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
    given = probe_of(tmp_path / "texts", "*.txt", window=32, tokens=200)
    forget.measure_seed(17, params.Forget(probes=[given]), project.runtime)
    (found,) = contracts.read(paths.forgetting(17), Forgetting).probes
    assert (found.window, found.bos) == (32, bos)
    said = "each with a BOS first" if bos else "without BOS, as the model reads text"
    assert f"windows of {found.window} tokens, {said}" in capsys.readouterr().out
    # Every text is longer than a window, so each is its tokens' beginning.
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(paths.BASE, dtype=torch.float32), checkpoint.tokenizer()
    by_place = {text.place: text.content for text in probes.texts(given)}

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
        forget.measure_seed(17, with_probe(ready.forget, **change), ready.runtime)
        contracts.read(paths.forgetting(17), Forgetting)
        found: dict[str, Any] = records.read_json(paths.forgetting(17))["probes"][0]
        return found

    assert "left_out" not in measured(*rows)
    assert "left out" not in capsys.readouterr().out
    assert measured(*rows, *rows, '{"text": null}')["left_out"] == {"records without a text": 1, "repeated texts": 12}
    assert "forget 17, general: left out: records without a text (1), repeated texts (12)\n" in capsys.readouterr().out


def test_without_a_probe_nothing_is_measured_and_that_is_written(ready: params.Params) -> None:
    forget.measure_seed(17, params.Forget(probes=[]), ready.runtime)
    found = records.read_json(paths.forgetting(17))
    assert found["probes"] == []
    assert sorted(found) == ["adapter_sha256", "model_sha256", "probes", "seed"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"window": 513}, "forget.probes.general.window = 513, but the model's context is 512 tokens"),
        ({"tokens": 10}, "gives 1 windows of text, too few for an interval"),
        ({"sha256": "0" * 64}, "forget.probes.general.sha256 = '0000"),
        ({"source": "pip:nothing"}, "forget.probes.general.source = 'pip:nothing': write pip:"),
        ({"source": "nowhere"}, "forget.probes.general.source = 'nowhere': no such file or folder in "),
    ],
)
def test_a_mistake_is_one_clear_error(ready: params.Params, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        forget.measure_seed(17, with_probe(ready.forget, **change), ready.runtime)
    assert not paths.forgetting(17).exists()


# Conversations


def written(folder: Path, count: int, **change: Any) -> params.Probe:
    """A probe of conversations of a question and an answer of several words."""
    folder.mkdir()
    draw = random.Random(3)
    talks = [[" ".join(draw.choices(WORDS, k=6)) + f" {n}?", " ".join(draw.choices(WORDS, k=5))] for n in range(count)]
    (folder / "talks.json").write_text(json.dumps([{"talks": talks}]))
    given = {"style": "chat", "column": "talks", "tokens": 1000, "window": 200}
    return probe_of(folder, "talks.json", **(given | change))


def test_the_loss_of_a_conversation_is_that_of_its_answer_behind_the_model_s_own_template(
    ready: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    probe = written(tmp_path / "own", 12)
    forget.measure_seed(17, params.Forget(probes=[probe, *ready.forget.probes]), ready.runtime)
    talk, general = contracts.read(paths.forgetting(17), Forgetting).probes
    assert (talk.name, talk.style, talk.texts, general.name) == ("own", "chat", 12, "general")
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    by_place = {one.id: one for one in probes.conversations(probe)}
    for window in talk.windows:
        one = by_place[window.place]
        asked = [{"role": "user", "content": one.source}]
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(before, add_special_tokens=False).input_ids
        answer = [*tokenizer(one.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels = [-100] * len(ids) + answer
        with torch.no_grad():
            mean = plain(input_ids=torch.tensor([ids + answer]), labels=torch.tensor([labels])).loss
        assert window.tokens == len(answer)
        assert window.base == pytest.approx(float(mean) * len(answer), rel=1e-4)
    # What another probe reads changes nothing of the first.
    forget.measure_seed(17, ready.forget, ready.runtime)
    assert contracts.read(paths.forgetting(17), Forgetting).probes == [general]


def test_whole_answers_are_read_until_they_have_the_tokens_and_long_conversations_are_left_out(
    ready: params.Params, tmp_path: Path
) -> None:
    def measured(probe: params.Probe) -> Any:
        forget.measure_seed(17, params.Forget(probes=[probe]), ready.runtime)
        return contracts.read(paths.forgetting(17), Forgetting).probes[0]

    whole = measured(written(tmp_path / "own", 30))
    some = measured(probe_of(tmp_path / "own", "talks.json", style="chat", column="talks", tokens=64, window=200))
    assert 64 <= some.tokens < whole.tokens
    assert some.windows == whole.windows[: len(some.windows)]
    assert some.tokens - some.windows[-1].tokens < 64
    rows = forget.rows(checkpoint.tokenizer(), 512, written(tmp_path / "b", 30, tokens=64), Account())
    lengths = sorted({len(row.prompt) + len(row.completion) for row in rows})
    assert len(lengths) > 1
    left = measured(
        probe_of(tmp_path / "own", "talks.json", style="chat", column="talks", tokens=999, window=lengths[0])
    )
    assert left.left_out == {"conversations longer than the window": 30 - left.texts}
    assert 0 < left.texts < 30


def test_a_model_without_a_chat_template_reads_no_conversations(
    ready: params.Params, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    monkeypatch.setattr(checkpoint, "tokenizer", lambda: tokenizer)
    with pytest.raises(UserError, match="forget.probes.own.style = 'chat', but the model's tokenizer has no chat temp"):
        forget.measure_seed(17, params.Forget(probes=[written(tmp_path / "own", 9)]), ready.runtime)
