"""Prompts: the same prefix in training and inference, one BOS, an answer that ends."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.model import apart, apart_worker, checkpoint
from pipeline.model.prompt import Encoder, rendered
from tests.limits import soon
from tests.made.templates import LOOPS

EXAMPLE = Example("a/what", "a", "what", "red cat runs {fast} here.", "blue dog", "red cat")


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return checkpoint.tokenizer(tiny_model)


def section(**changes: Any) -> params.Prompt:
    base = {
        "style": "chat",
        "template": "{source}\n\n{instruction}",
        "instructions": {"what": "Say {what}."},
        "thinking": False,
        "max_tokens": 200,
        "truncate_source": False,
    }
    return params.Prompt.model_validate(base | changes)


def test_a_chat_prompt_is_the_template_filled_in(tokenizer: Any) -> None:
    ids = Encoder(tokenizer, section(), 512).prompt(EXAMPLE)
    assert tokenizer.decode(ids) == "<|user|>red cat runs {fast} here.\n\nSay {what}.<|end|><|assistant|>"


def test_training_continues_the_very_prefix_of_inference_and_ends_in_eos(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, section(), 512)
    row = encoder.row(EXAMPLE)
    assert row.prompt == encoder.prompt(EXAMPLE)
    assert tokenizer.decode(row.completion) == "blue dog<|end|>"
    assert row.completion[-1] == encoder.end == tokenizer.eos_token_id


def test_an_answer_of_which_nothing_is_left_is_refused(tokenizer: Any) -> None:
    """As by a normalizer that drops zero-width spaces: only the EOS would be learnt."""
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    encoder = Encoder(tokenizer, section(), 512)
    with pytest.raises(UserError, match=r"the answer of a/what, '\\u200b', has no token"):
        encoder.row(replace(EXAMPLE, target="\u200b"))


def test_the_end_is_what_the_chat_template_puts_behind_an_answer(tokenizer: Any) -> None:
    """Llama 3's instruct models end a turn with <|eot_id|>, which is not every tokenizer's EOS."""
    tokenizer.eos_token = "<|bos|>"
    assert tokenizer.decode([Encoder(tokenizer, section(), 512).end]) == "<|end|>"


def test_the_end_needs_no_other_role(tokenizer: Any) -> None:
    """Gemma's <end_of_turn> and Phi 3's <|end|> are special, but none of the tokenizer's named tokens."""
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|system|>")
    end = Encoder(tokenizer, section(), 512).end
    assert tokenizer.convert_ids_to_tokens(end) == "<|system|>"
    assert end not in tokenizer.all_special_ids


def test_an_end_that_is_no_special_token_leaves_it_to_the_eos(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "\n")
    assert Encoder(tokenizer, section(), 512).end == tokenizer.eos_token_id


def test_plain_prompts_start_with_bos_where_the_model_has_one(tokenizer: Any) -> None:
    plain = section(style="plain")
    assert Encoder(tokenizer, plain, 512).prompt(EXAMPLE)[0] != tokenizer.bos_token_id
    tokenizer.add_bos_token = True
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    ids = Encoder(tokenizer, plain, 512).prompt(EXAMPLE)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_two_bos_are_refused(tokenizer: Any) -> None:
    planted = section(template="<|bos|>{source}", style="chat")
    tokenizer.chat_template = "<|bos|>{{ messages[0].content }}"
    with pytest.raises(UserError, match="starts with two BOS tokens"):
        Encoder(tokenizer, planted, 512).prompt(EXAMPLE)


def test_the_date_does_not_enter_a_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    assert tokenizer.decode(Encoder(tokenizer, section(), 512).prompt(EXAMPLE)) == "26 Jul 2024"


def test_an_aspect_without_instruction_is_named(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"no entry for 'what' \(example a/what\) and no default; it has who"):
        Encoder(tokenizer, section(instructions={"who": "x"}), 512).prompt(EXAMPLE)


def test_an_aspect_without_instruction_takes_the_default_one(tokenizer: Any) -> None:
    default = section(instructions={"who": "x", "default": "Say it."})
    assert "\n\nSay it.<|end|>" in tokenizer.decode(Encoder(tokenizer, default, 512).prompt(EXAMPLE))


def test_a_template_without_instruction_needs_none(tokenizer: Any) -> None:
    bare = section(template="> {source}", instructions={})
    ids = Encoder(tokenizer, bare, 512).prompt(EXAMPLE)
    assert tokenizer.decode(ids) == "<|user|>> red cat runs {fast} here.<|end|><|assistant|>"


HISTORY = [
    {"role": "system", "content": "now"},
    {"role": "user", "content": "red {source}"},
    {"role": "assistant", "content": "blue"},
]
TALK = Example("t", "t", "what", "green", "dog", "green", ["dog"], HISTORY)


def test_the_history_comes_before_the_message_through_the_chat_template(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, section(), 512)
    expected = (
        "<|system|>now<|end|><|user|>red {source}<|end|><|assistant|>blue<|end|>"
        "<|user|>green\n\nSay {what}.<|end|><|assistant|>"
    )
    assert tokenizer.decode(encoder.prompt(TALK)) == expected
    assert encoder.row(TALK).prompt == encoder.prompt(TALK)


def test_a_plain_prompt_has_no_place_for_a_history(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"prompt.style = 'plain', but t has 3 earlier messages.*set prompt.style to"):
        Encoder(tokenizer, section(style="plain"), 512).prompt(TALK)


def test_a_chat_template_that_refuses_the_roles_is_told(tokenizer: Any) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    encoder = Encoder(tokenizer, section(), 512)
    assert encoder.prompt(EXAMPLE)
    with pytest.raises(UserError, match=r"refuses the messages of t \(system, user, assistant, user\): No system!"):
        encoder.prompt(TALK)


def test_limits_are_checked_before_anything_is_computed(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"prompt.max_tokens = 200, but the model's context is 100 tokens"):
        Encoder(tokenizer, section(), 100)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template: set it to plain"):
        Encoder(tokenizer, section(), 512)


def test_long_prompts_are_refused_with_the_remedy(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, section(max_tokens=16), 512)
    prompts = {EXAMPLE.id: encoder.prompt(EXAMPLE)}
    with pytest.raises(UserError, match=r"1 of 1 test prompts are longer than prompt.max_tokens = 16.*a/what"):
        encoder.require_fit(prompts, "test", 8)
    with pytest.raises(UserError, match="exceed the model's context of 512 tokens"):
        Encoder(tokenizer, section(), 512).require_fit(prompts, "test", 500)


def test_truncation_cuts_the_source_and_keeps_the_instruction(tokenizer: Any) -> None:
    long = Example("b/what", "b", "what", "red cat runs " * 60, "blue", "red")
    ids = Encoder(tokenizer, section(max_tokens=60, truncate_source=True), 512).prompt(long)
    assert 55 <= len(ids) <= 60
    text = tokenizer.decode(ids)
    assert text.startswith("<|user|>red cat runs red")
    assert text.endswith("\n\nSay {what}.<|end|><|assistant|>")


# What a template may take

HOSTILE = {
    "loops": LOOPS,
    "a number": "{{ 9 ** (9 ** 9) }}",
    "a text": "{{ 'x' * 100000000000 }}",
    "a text that doubles": "{% set n = namespace(t='x') %}"
    "{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a long text": "{{ 'x' * 20000000 }}",
    "a macro in itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "no template": "{% if %}",
    "depth": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_that_takes_too_much_is_one_error(kind: str, tokenizer: Any) -> None:
    honest = tokenizer.chat_template
    tokenizer.chat_template = HOSTILE[kind]
    with soon(), pytest.raises(UserError, match="the model's chat template .*take another model, or set prompt.style"):
        Encoder(tokenizer, section(), 512)
    tokenizer.chat_template = honest
    assert Encoder(tokenizer, section(), 512).prompt(EXAMPLE)  # the next template finds everything in its place


def test_a_template_that_shows_itself_late_is_one_error(tokenizer: Any) -> None:
    """It renders what is tried of it at first, and turns on one row; also in a thread, where no signal is handled."""
    tokenizer.chat_template = "{% if 'fast' in messages[0].content %}" + LOOPS + "{% endif %}" + tokenizer.chat_template
    encoder = Encoder(tokenizer, section(), 512)
    assert encoder.prompt(replace(EXAMPLE, source="red"))
    with soon(), ThreadPoolExecutor(1) as threads:
        asked = threads.submit(encoder.prompt, EXAMPLE)
        assert "takes more than 2 s of the processor" in str(asked.exception())
        assert isinstance(asked.exception(), UserError)
    assert encoder.prompt(replace(EXAMPLE, source="red"))


def test_a_rendered_template_is_what_transformers_makes_of_it(tokenizer: Any) -> None:
    messages = [*HISTORY, {"role": "user", "content": "Grüße\u2028 \ud800 {{ 1 }} <|end|>"}]
    for template in (
        tokenizer.chat_template,
        {"default": tokenizer.chat_template, "other": "x"},
        "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}\n{{ m | tojson }}{% endif %}\n{% endfor %} "
        "{{ date_string }}",
    ):
        tokenizer.chat_template = template
        for options in ({}, {"add_generation_prompt": True}):
            own = tokenizer.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024", **options)
            assert rendered(tokenizer, messages, **options) == own


def test_templates_run_apart_without_the_secrets_of_the_environment(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart.worker().end()
    monkeypatch.setenv("HF_TOKEN", "planted0secret")
    rendered(tokenizer, HISTORY)
    process = apart.worker().process
    assert process
    assert "planted0secret" not in str(psutil.Process(process.pid).environ())
    assert apart.worker().end() == 0


def test_an_environment_in_which_templates_cannot_be_tried_is_one_error(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart.worker().end()
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(apart_worker, "__file__", str(tmp_path / "broken.py"))
    with soon(), pytest.raises(UserError, match="the process that tries chat templates and tokenizers ended with 3"):
        Encoder(tokenizer, section(), 512)
