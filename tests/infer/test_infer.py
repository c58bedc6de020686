"""Inference: explicit decoding, batches that do not change a text, and no line lost or doubled by a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.core.records import Prediction
from pipeline.infer import backend_transformers, infer
from pipeline.model import checkpoint, resume
from pipeline.model.prompt import plain_ids


def decoded(project: params.Params, **changes: Any) -> list[Prediction]:
    infer.decode("base", project.prompt, project.generation.model_copy(update=changes), project.runtime)
    return records.read_rows(paths.predictions("base"), Prediction)


def test_every_test_row_is_answered_in_order_with_its_conditions(quantized: params.Params) -> None:
    rows = decoded(quantized)
    assert [row.id for row in rows] == [f"test-{n}/{aspect}" for n in range(4) for aspect in ("what", "who")]
    assert all(1 <= row.tokens <= 8 for row in rows)
    assert all((row.finish == "stop") == (row.tokens < 8) or row.tokens == 8 for row in rows)
    decoding = records.read_json(paths.decoding("base"))
    assert decoding["generation"]["do_sample"] is False
    assert decoding["generation"]["max_new_tokens"] == 8
    assert decoding["generation"]["batch_size"] == 4
    assert decoding["generation"]["backend"] == "transformers"
    assert "gguf_type" not in decoding["generation"]
    assert decoding["device"] == "cpu"
    assert decoding["adapter_sha256"] is None


def test_in_float32_the_batch_size_changes_no_token(quantized: params.Params) -> None:
    one_by_one = [(row.text, row.tokens) for row in decoded(quantized, batch_size=1)]
    assert len({text for text, _ in one_by_one}) > 1
    assert [(row.text, row.tokens) for row in decoded(quantized, batch_size=3)] == one_by_one
    assert [(row.text, row.tokens) for row in decoded(quantized, batch_size=8)] == one_by_one


def test_greedy_decoding_is_the_argmax_chain(quantized: params.Params, tiny_model: Path) -> None:
    import torch

    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = checkpoint.tokenizer(tiny_model)
    config = infer.configuration(quantized.generation, [1], tokenizer)
    prompt = [5, 6, 7, 8]
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < 12 and ids[-1] != 1:
            ids.append(int(loaded(torch.tensor([ids])).logits[0, -1].argmax()))
    families = [[("chain", prompt)], [("other", [9, 10])]]
    engine = backend_transformers.Engine(loaded, config, quantized.generation, "cpu", 1, {})
    assert dict(backend_transformers.complete(engine, families))["chain"] == ids[4:]


def test_a_models_own_generation_defaults_do_not_leak_in(quantized: params.Params) -> None:
    before = decoded(quantized)
    planted = paths.QUANTIZED / "generation_config.json"
    leak = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 1.9, "max_new_tokens": 3, "min_new_tokens": 3}
    planted.write_text(json.dumps(json.loads(planted.read_text()) | leak))
    facts = records.read_json(paths.QUANTIZED_FACTS)
    records.write_json(paths.QUANTIZED_FACTS, facts | {"sha256": records.sha256_tree(paths.QUANTIZED)})
    assert decoded(quantized) == before


def test_a_cap_on_new_tokens_is_reported_as_length(quantized: params.Params) -> None:
    rows = decoded(quantized, max_new_tokens=1)
    assert {row.tokens for row in rows} == {1}
    assert "length" in {row.finish for row in rows}


def test_a_killed_run_goes_on_behind_its_last_whole_line(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = decoded(quantized, batch_size=1)  # rounds of four examples
    original, calls = backend_transformers.complete, []

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        for number, answer in enumerate(original(*arguments)):
            if (len(calls), number) == (2, 2):
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(backend_transformers, "complete", dies)
        decoded(quantized, batch_size=1)
    (file,) = paths.SCRATCH.glob("infer-base-*/predictions-0.jsonl")
    assert len(file.read_text().splitlines()) == 6
    file.write_text(file.read_text()[:-20])  # the last line cut off by a power failure
    capsys.readouterr()
    names: list[str] = []

    def notes(engine: Any, families: Any) -> Any:
        names.extend(name for family in families for name, _ in family)
        return original(engine, families)

    monkeypatch.setattr(backend_transformers, "complete", notes)
    assert decoded(quantized, batch_size=1, recheck=0) == expected
    assert len(names) == 4  # the round that was under way, whole: its batches are those of an uninterrupted run
    assert "going on behind 5 examples" in capsys.readouterr().out
    assert not list(paths.SCRATCH.glob("infer-base-*"))


def test_beam_search_is_what_transformers_does_within_the_limits(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    original = backend_transformers.beam_search

    def notes(model: Any, config: Any, prompts: Any) -> Any:
        batches.append([len(prompt) for prompt in prompts])
        return original(model, config, prompts)

    monkeypatch.setattr(backend_transformers, "beam_search", notes)
    greedy = decoded(quantized, recheck=0)
    assert not batches
    beams = decoded(quantized, num_beams=3, batch_size=3, recheck=0)
    assert [row.text for row in beams] != [row.text for row in greedy]
    assert [len(batch) for batch in batches] == [3, 3, 2]
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths, reverse=True)
    longest = batches[0][0]
    batches.clear()
    assert decoded(quantized, num_beams=3, batch_tokens=6 * (longest + 8), recheck=0) == beams
    assert len(batches[0]) == 2


def test_examples_are_decoded_again_alone_and_counted(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded(quantized, recheck=3)
    assert records.read_json(paths.decoding("base"))["recheck"] == {"examples": 3, "identical": 3}
    original = backend_transformers.complete

    def depends_on_its_batch(engine: Any, families: Any) -> Any:
        if len(families) == 1:
            return iter([(families[0][0][0], [20])])
        return original(engine, families)

    monkeypatch.setattr(backend_transformers, "complete", depends_on_its_batch)
    decoded(quantized, recheck=3)
    assert records.read_json(paths.decoding("base"))["recheck"] == {"examples": 3, "identical": 0}
    decoded(quantized, recheck=0)
    assert records.read_json(paths.decoding("base"))["recheck"] == {"examples": 0, "identical": 0}


def test_two_at_once_are_refused(quantized: params.Params) -> None:
    with resume.folder("infer-base", {}), pytest.raises(UserError, match="is being computed by another process"):
        decoded(quantized)


def test_a_prompt_that_does_not_fit_fails_before_the_model_is_loaded(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_transformers, "load_base", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="longer than prompt.max_tokens = 16"):
        infer.decode(
            "base", quantized.prompt.model_copy(update={"max_tokens": 16}), quantized.generation, quantized.runtime
        )


def test_what_became_of_texts_is_said_and_recorded(
    quantized: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = records.read_rows(paths.split("test"), records.Example)
    odd = records.Example("odd/what", "odd", "what", "red <|end|> cat", "blue", "red")
    long = records.Example("long/what", "long", "what", "red cat runs " * 80, "blue", "red")
    records.write_rows(paths.split("test"), [*examples, odd, long])
    cut = quantized.prompt.model_copy(update={"truncate_source": True})
    rows = decoded(quantized.model_copy(update={"prompt": cut}))
    decoding, printed = records.read_json(paths.decoding("base")), capsys.readouterr().out
    assert decoding["thinking"] is False
    found = decoding["encoded"]
    assert (found["examples"], found["controls"], found["cut"], found["thoughts"]) == (10, 1, 1, 0)
    assert max(row.prompt_tokens for row in rows) <= 200
    assert "infer base: 1 of 10 test examples hold the name of a control token" in printed
    assert "infer base: the prompts of 1 of 10 test examples were cut" in printed


def test_names_of_control_tokens_that_a_model_writes_in_characters_stay_in_its_text(tiny_model: Path) -> None:
    tokenizer = checkpoint.tokenizer(tiny_model)
    ids = [*plain_ids(tokenizer, "cat <|end|> dog"), tokenizer.eos_token_id]
    assert infer.text(tokenizer, ids) == "cat <|end|> dog"


def test_special_tokens_that_mark_thoughts_stay_in_the_text(tiny_model: Path) -> None:
    """Else a report could not count the outputs that hold thoughts."""
    tokenizer = checkpoint.tokenizer(tiny_model)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[THINK]", "[/THINK]", "<|channel|>", "<|other|>"]})
    ids = tokenizer("[THINK]red cat[/THINK]<|other|>dog<|channel|>analysis<|end|>", add_special_tokens=False).input_ids
    assert infer.text(tokenizer, ids) == "[THINK]red cat[/THINK]dog<|channel|>analysis"
    assert infer.text(tokenizer, tokenizer("<|other|>dog<|end|>", add_special_tokens=False).input_ids) == "dog"
