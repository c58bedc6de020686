"""Every kind of model source from end to end: the real stages, a tiny random model, and params.yaml alone edited.

What is fetched of each source is compared in tests/fetch/test_fetch.py and tests/fetch/test_meta_layout.py; here, that
what follows `fetch` takes it as well, or that `fetch` says why not before it reads the weights.
"""

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM

from pipeline.core import paths, records
from pipeline.lora import adapter
from pipeline.model import checkpoint
from tests import ROOT
from tests.made import meta_files
from tests.made.data import SPLIT_GROUPS
from tests.made.gguf_files import GGUF_SIZES, WINDOW, write_gguf
from tests.made.models import of_family, sharded, trained_words
from tests.made.parameters import edit, edit_probe

pytestmark = pytest.mark.slow

TEXT = "red cat runs, 12 now"
IDS = torch.tensor([[1, 5, 6, 7, 8, 9, *range(20, 50)]])
TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'user' if message.role == 'user' else 'model' }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Gemma's way of marking turns, by control words of its vocabulary."""


@dataclass(frozen=True)
class Source:
    """Where a model is, its logits for `IDS`, its own token ids of `TEXT`, and the style of prompts it is for."""

    path: Path
    family: str
    logits: torch.Tensor
    text: list[int]
    style: str = "chat"


def meta_layout(folder: Path, tiny_model: Path) -> Source:
    del tiny_model
    words = trained_words(folder.with_suffix(".model"), "bpe")
    whole = meta_files.written(folder, words, ranks=2)
    return Source(folder, "llama", meta_files.forward(whole, IDS[0])[None], pieces(words), "plain")


def shards(folder: Path, tiny_model: Path) -> Source:
    assert len(sharded(folder, tiny_model)) > 2
    return Source(folder, "llama", AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits, ids_by(tiny_model))


def qwen2_gguf(folder: Path, tiny_model: Path) -> Source:
    of_family("qwen2", True, tiny_model, folder, **GGUF_SIZES["qwen2"])
    file = folder.with_suffix(".gguf")
    return Source(file, "qwen2", of_gguf(folder, file, "qwen2"), ids_by(tiny_model))


def gemma3_gguf(folder: Path, tiny_model: Path) -> Source:
    words = trained_words(folder.with_suffix(".model"), "bpe", False, control=["<start_of_turn>", "<end_of_turn>"])
    of_family(
        "gemma3_text", True, tiny_model, folder, **(GGUF_SIZES["gemma3"] | {"vocab_size": 300, "sliding_window": 256})
    )
    file, window = folder.with_suffix(".gguf"), WINDOW | {"attention.sliding_window": 256}
    return Source(
        file, "gemma3_text", of_gguf(folder, file, "gemma3", words=words, template=TURNS, **window), pieces(words)
    )


def of_gguf(checkpoint: Path, file: Path, family: str, **more: Any) -> torch.Tensor:
    """Write a checkpoint as GGUF in 8 bits, and compute the logits with what the file holds."""
    held = write_gguf(checkpoint, file, family, "Q8_0", **more)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.load_state_dict(held, strict=False)
    model.tie_weights()
    logits: torch.Tensor = model(IDS).logits
    return logits


def pieces(words: Path) -> list[int]:
    ids: list[int] = SentencePieceProcessor(model_file=str(words)).encode(TEXT)
    return ids


def ids_by(folder: Path) -> list[int]:
    ids: list[int] = checkpoint.tokenizer(folder)(TEXT, add_special_tokens=False).input_ids
    return ids


SOURCES: dict[str, Callable[[Path, Path], Source]] = {
    "Meta's layout": meta_layout,
    "several files": shards,
    "Qwen 2.5 as GGUF": qwen2_gguf,
    "Gemma 3 as GGUF": gemma3_gguf,
}


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    """A stage's own script, in this process."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "stages" / f"{script}.py"), run_name="__main__")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("kind", SOURCES)
def test_the_whole_experiment_runs_on(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SOURCES[kind](tmp_path / "m", tiny_model)
    edit(model={"source": str(given.path), "sha256": records.sha256_path(given.path)}, prompt={"style": given.style})
    for script in ("prepare", "fetch", "quantize"):
        run(monkeypatch, script)
    fetched = AutoModelForCausalLM.from_pretrained(paths.BASE)
    torch.testing.assert_close(fetched(IDS).logits, given.logits, rtol=1e-4, atol=1e-4)
    assert ids_by(paths.QUANTIZED) == given.text
    facts = records.read_json(paths.BASE_FACTS)
    assert (facts["family"], facts["sha256"]) == (given.family, records.sha256_tree(paths.BASE))

    run(monkeypatch, "train", "--seed", "17")
    run(monkeypatch, "infer")
    run(monkeypatch, "infer_tuned", "--seed", "17")
    run(monkeypatch, "forget", "--seed", "17")
    run(monkeypatch, "evaluate")
    run(monkeypatch, "evaluate_tuned", "--seed", "17")
    for variant in ("unquantized", "shots"):
        run(monkeypatch, f"infer_{variant}")
        run(monkeypatch, f"evaluate_{variant}")
    run(monkeypatch, "contamination")
    run(monkeypatch, "compare")

    summary, forgetting = (records.read_json(file) for file in (paths.training_summary(17), paths.forgetting(17)))
    assert summary["kept_loss"] < summary["validation"][0]["loss"]
    assert summary["logit_change"] > 1e-2
    assert forgetting["probes"][0]["kl"] > 1e-5
    test = [row.id for row in records.read_rows(paths.split("test"), records.Example)]
    assert len(test) == 2 * SPLIT_GROUPS["test"]
    for variant, of in (("base", None), ("tuned-17", adapter.Saved(paths.adapter(17)).sha256)):
        written = records.read_rows(paths.predictions(variant), records.Prediction)
        assert [row.id for row in written] == test
        conditions = records.read_json(paths.decoding(variant))
        assert conditions["model_sha256"] == records.sha256_tree(paths.QUANTIZED)
        assert conditions["adapter_sha256"] == of
        assert conditions["recheck"] == {"examples": 4, "identical": 4}
        if given.family == "gemma3_text":  # 2 is </s>, 4 the word that ends a turn
            assert conditions["generation"]["eos_token_id"] == [2, 4]
    metrics = records.read_json(paths.METRICS)
    assert metrics["rouge1"]["ci_low"] <= metrics["rouge1"]["diff"] <= metrics["rouge1"]["ci_high"]


def gemma3(folder: Path, tiny_model: Path) -> Path:
    return of_family("gemma3_text", True, tiny_model, folder)


LATER: dict[str, tuple[Callable[[Path, Path], Path], dict[str, dict[str, Any]], str]] = {
    "chat": (
        lambda *given: meta_layout(*given).path,
        {},
        "prompt.style = 'chat', but the model's tokenizer has no chat template: set it to plain",
    ),
    "prompt": (gemma3, {}, "prompt.max_tokens = 200, but the model's context is 96 tokens"),
    "forget": (
        gemma3,
        {"prompt": {"max_tokens": 64}, "probe": {"window": 100}},
        "forget.probes.general.window = 100, but the model's context is 96 tokens",
    ),
    "llama.cpp": (
        gemma3,
        {"prompt": {"max_tokens": 64}, "generation": {"backend": "llama.cpp"}},
        "a model of family 'gemma3_text', and GGUF files are written only of llama, mistral, qwen2, qwen3",
    ),
    "heads": (
        gemma3,
        {
            "prompt": {"max_tokens": 64},
            "quantize": {"method": "none", "double_quantization": False},
            "runtime": {"processes": 3, "sharding": "tensor"},
        },
        "over 3 processes, which do not divide this model: it has 4 attention heads and 2 key-value heads",
    ),
}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("reason", LATER)
def test_what_a_later_stage_would_refuse_is_refused_before_the_weights_are_read(
    reason: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, sections, message = LATER[reason]
    path = source(tmp_path / "m", tiny_model)
    edit_probe(**sections.get("probe", {}))
    edit(
        model={"source": str(path), "sha256": records.sha256_path(path)},
        **{name: values for name, values in sections.items() if name != "probe"},
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr("pipeline.fetch.meta_layout._whole", None)
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "fetch")
    assert message in capsys.readouterr().err
    assert not paths.BASE.exists()
