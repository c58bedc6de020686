"""The stage `prompts`: whatever is wrong with a validation or a test prompt is found before anything is computed."""

import shutil
from dataclasses import replace
from typing import Any

import pytest

from pipeline import prompts
from pipeline.core import contracts, params, paths, records
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.model import checkpoint
from tests.made.parameters import edit
from tests.made.records import base_facts


@pytest.fixture
def fetched(project: params.Params, tiny_model: Any) -> params.Params:
    """A project with data and base in place, and nothing of the base but its tokenizer."""
    shutil.copytree(tiny_model, paths.BASE, ignore=shutil.ignore_patterns("*.safetensors"))
    contracts.write(paths.BASE_FACTS, base_facts())
    return project


def check(given: params.Params, **change: Any) -> None:
    settings, asked = given.prompt.model_copy(update=change), given.baseline
    prompts.require_fitting(settings, given.generation.max_new_tokens, asked)


def plant(split: str, **change: Any) -> None:
    """Change the last example of a split."""
    rows = records.read_rows(paths.split(split), Example)
    records.write_rows(paths.split(split), [*rows[:-1], replace(rows[-1], **change)])


def test_what_fits_is_written_down_the_same_for_all_data(
    fetched: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    check(fetched)
    before = paths.FITTING.read_bytes()
    assert "prompts: 8 validation and 8 test prompts fit, the longest has" in capsys.readouterr().out
    plant("test", source="red <|end|>", target="<think>blue")
    check(fetched)
    assert paths.FITTING.read_bytes() == before
    printed = capsys.readouterr().out
    assert "prompts: 1 of 8 test examples hold the name of a control token" in printed
    assert "prompts: the targets of 1 of 8 test examples hold a thought" in printed


SYSTEM = [{"role": "system", "content": "now"}]
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "too long": ({"source": "red cat runs " * 80}, "1 of 8 {} prompts are longer than prompt.max_tokens = 200"),
    "a role that the template refuses": ({"history": SYSTEM}, "refuses the messages of {}-3/who .*No system!"),
    "an aspect without instruction": ({"aspect": "why"}, "prompt.instructions has no entry for 'why' .*{}-3/who"),
}


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_prompt_is_found(fault: str, split: str, fetched: params.Params) -> None:
    tokenizer = checkpoint.tokenizer(paths.BASE)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    tokenizer.save_pretrained(paths.BASE)
    change, message = FAULTS[fault]
    plant(split, **change)
    with pytest.raises(UserError, match=message.format(split)):
        check(fetched)
    assert not paths.FITTING.exists()


def test_a_test_prompt_without_room_for_an_answer_is_found(fetched: params.Params) -> None:
    contracts.write(paths.BASE_FACTS, base_facts(context=200))
    plant("test", source="red cat runs " * 35)
    with pytest.raises(UserError, match=r"the longest test prompt \(1.. tokens\) and 80 tokens of answer exceed"):
        prompts.require_fitting(fetched.prompt, 80, fetched.baseline)


def test_limits_above_the_context_are_found_before_the_tokenizer_is_read(
    fetched: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "tokenizer", lambda *_: pytest.fail("the tokenizer was read"))
    with pytest.raises(UserError, match="prompt.max_tokens = 9000, but the model's context is 512"):
        check(fetched, max_tokens=9000)


@pytest.mark.usefixtures("fetched")
def test_the_stage_reads_what_it_declares() -> None:
    edit(generation={"max_new_tokens": 400})
    declared = params.read("prompts")
    assert declared.number("generation.max_new_tokens") == 400
    with pytest.raises(LookupError, match="does not declare the params section generation in dvc.yaml"):
        declared[params.Generation]
    with pytest.raises(LookupError):
        declared.number("generation.batch_size")
