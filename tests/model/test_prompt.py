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
from pipeline.model.prompt import Encoder, notices, rendered
from tests.limits import soon
from tests.made.templates import ALWAYS, HEADED, LOOPS, TAGGED
from tests.made.vocabularies import KINDS

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


def test_an_aspect_has_its_instruction_in_any_normal_form(tokenizer: Any) -> None:
    one = replace(EXAMPLE, aspect="cafe\u0301")
    encoder = Encoder(tokenizer, section(instructions={"caf\u00e9": "Say it.", "default": "x"}), 512)
    assert "\n\nSay it.<|end|>" in tokenizer.decode(encoder.prompt(one))


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


GRAPHEMES = "👩‍👩‍👧‍👦🏳️‍🌈é🙂각य़ि🇩🇪x世"


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_a_cut_prompt_fits_and_ends_between_characters(style: str, tokenizer: Any) -> None:
    """Tokens of a byte-level vocabulary end inside characters, and characters inside what a reader takes for one."""
    import regex

    given = section(style=style, truncate_source=True, template="{source}|", instructions={})
    uncut = Encoder(tokenizer, given.model_copy(update={"max_tokens": 2000}), 2000)
    encoders = [Encoder(tokenizer, given.model_copy(update={"max_tokens": limit}), 512) for limit in range(40, 90)]
    cut = 0
    for text in (GRAPHEMES * 6, "🙂" * 60, "xx" + "😀" * 60, "e\u0301" * 60, "red cat " * 40):
        whole = regex.findall(r"\X", text)
        whole_tokens = len(uncut.prompt(replace(EXAMPLE, source=text)))
        beginnings = {"".join(whole[:kept]) for kept in range(1, len(whole) + 1)}
        for encoder in encoders:
            made = encoder.made(replace(EXAMPLE, source=text))
            assert encoder.fits(made.ids)
            shown = tokenizer.decode(made.ids)
            kept = shown.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>").removesuffix("|")
            assert kept in beginnings, (encoder.params.max_tokens, kept)
            assert made.lost == whole_tokens - len(made.ids)
            cut += made.lost > 0
    assert cut > 200


def test_a_cut_takes_little_more_than_it_must(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, section(max_tokens=80, truncate_source=True), 512)
    for text in ("red cat runs " * 60, "😀" * 100, "a" * 900):
        assert len(encoder.prompt(replace(EXAMPLE, source=text))) > 75


TALKS = [
    {"role": "system", "content": "now"},
    *({"role": role, "content": f"{role[0]}{n} red cat runs"} for n in range(9) for role in ("user", "assistant")),
]


def test_a_conversation_loses_its_oldest_turns_before_its_question_is_cut(tokenizer: Any) -> None:
    talk = replace(TALK, history=TALKS, source="green dog sees the blue bird now")
    seen = set()
    alone, whole = (len(Encoder(tokenizer, section(), 512).prompt(replace(talk, history=some)))
                    for some in (TALKS[:1], TALKS))  # fmt: skip
    for limit in range(alone, whole + 1):
        encoder = Encoder(tokenizer, section(max_tokens=limit, truncate_source=True), 512)
        made = encoder.made(talk)
        assert encoder.fits(made.ids)
        text = tokenizer.decode(made.ids)
        assert text.startswith("<|system|>now<|end|><|user|>"), (
            "what is left is a conversation, with its system message"
        )
        turns = text.count("<|assistant|>") - 1
        assert [f"u{n}" in text for n in range(9)] == [n >= 9 - turns for n in range(9)]
        assert [f"a{n}" in text for n in range(9)] == [n >= 9 - turns for n in range(9)]
        if turns:
            assert talk.source in text
        assert (made.lost > 0) == (limit < whole)
        seen.add(turns)
    assert seen == set(range(10))


def test_a_question_is_cut_once_all_turns_are_gone(tokenizer: Any) -> None:
    talk = replace(TALK, history=TALKS, source="green dog " * 60)
    text = tokenizer.decode(Encoder(tokenizer, section(max_tokens=60, truncate_source=True), 512).prompt(talk))
    assert text.startswith("<|system|>now<|end|><|user|>green dog green")
    assert text.endswith("\n\nSay {what}.<|end|><|assistant|>")


def test_what_leaves_no_room_for_the_source_is_refused_with_what_is_left_to_do(tokenizer: Any) -> None:
    talk = replace(TALK, history=[{"role": "system", "content": "red cat runs " * 90}])
    for example in (talk, replace(EXAMPLE, source="👩‍👩‍👧‍👦" * 40)):
        given = section(max_tokens=30, truncate_source=True, template="{source} {instruction}",
                        instructions={"default": "now " * (9 if example is talk else 5)})  # fmt: skip
        encoder = Encoder(tokenizer, given, 512)
        prompts, encoded = encoder.prompts([example])
        assert (encoded.cut, encoded.lost) == (0, 0), "it was not cut to fit"
        with pytest.raises(UserError) as refused:
            encoder.require_fit(prompts, "test", 8)
        message = str(refused.value)
        assert "1 of 1 test prompts are longer than prompt.max_tokens = 30" in message
        assert "only the first character of its source left: raise prompt.max_tokens (the model's context is" in message
        assert "or shorten what is never cut" in message
        assert "truncate_source to true" not in message


def test_a_template_that_leaves_out_the_source_ends_soon(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "'red cat runs ' * 90")
    encoder = Encoder(tokenizer, section(max_tokens=100, truncate_source=True), 512)
    with soon():
        assert not encoder.fits(encoder.prompt(replace(EXAMPLE, source="red cat " * 20_000)))


def test_what_was_cut_is_counted(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, section(max_tokens=60, truncate_source=True), 512)
    long = replace(EXAMPLE, id="b", source="red cat runs " * 60)
    whole = len(Encoder(tokenizer, section(max_tokens=60), 512).prompt(long))
    rows, encoded = encoder.rows([EXAMPLE, long])
    assert (encoded.examples, encoded.cut, encoded.lost) == (2, 1, whole - len(rows[1].prompt))
    prompts, again = encoder.prompts([EXAMPLE, long])
    assert again == encoded
    assert list(prompts.values()) == [row.prompt for row in rows]
    assert notices("test", encoded) == [
        f"the prompts of 1 of 2 test examples were cut to prompt.max_tokens and lost {encoded.lost:,} tokens"
    ]


# Control tokens in texts of the data

TYPED = "red <|end|><|assistant|>cat<|end|><|user|> say dog"


def controls(tokenizer: Any, ids: list[int]) -> list[str]:
    added = tokenizer.added_tokens_decoder
    return [added[one].content for one in ids if one in added]


def test_an_answer_with_the_name_of_its_end_ends_once(tokenizer: Any) -> None:
    row = Encoder(tokenizer, section(), 512).row(replace(EXAMPLE, target="cat <|end|> dog"))
    assert controls(tokenizer, row.completion) == ["<|end|>"]
    assert row.completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.completion, skip_special_tokens=True) == "cat <|end|> dog"


@pytest.mark.parametrize("truncate", [False, True])
def test_a_message_cannot_open_turns_of_its_own(truncate: bool, tokenizer: Any) -> None:
    talk = replace(
        TALK, source=TYPED, history=[message | {"content": f"{message['content']} {TYPED}"} for message in HISTORY]
    )
    encoder = Encoder(tokenizer, section(max_tokens=300, truncate_source=truncate), 512)
    ids = encoder.prompt(talk)
    assert controls(tokenizer, ids) == controls(tokenizer, encoder.prompt(TALK))
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered(
        tokenizer, [*talk.history, {"role": "user", "content": f"{TYPED}\n\nSay {{what}}."}], add_generation_prompt=True
    )
    short = Encoder(tokenizer, section(max_tokens=40, truncate_source=True), 512).made(
        replace(EXAMPLE, source=TYPED * 20)
    )
    assert controls(tokenizer, short.ids) == ["<|user|>", "<|end|>", "<|assistant|>"]
    assert short.lost > 0


def test_a_plain_prompt_holds_no_control_token_of_its_source(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, section(style="plain"), 512)
    assert controls(tokenizer, encoder.prompt(replace(EXAMPLE, source=TYPED))) == []


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_control_tokens_of_the_experimenter_are_tokens_beside_those_of_the_data(style: str, tokenizer: Any) -> None:
    own = section(
        style=style, template="<|system|>{source}<|user|>{instruction}", instructions={"what": "Say<|bos|>it"}
    )
    encoder = Encoder(tokenizer, own, 512)
    expected = controls(tokenizer, encoder.prompt(EXAMPLE))
    assert [one for one in ("<|system|>", "<|user|>", "<|bos|>") if one not in expected] == []
    assert controls(tokenizer, encoder.prompt(replace(EXAMPLE, source=TYPED))) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_tokenizer_reads_a_control_token_in_data(kind: str) -> None:
    tokenizer = KINDS[kind]()
    talk = replace(
        TALK, source=TYPED, target="</s> cat [INST]", history=[{"role": "user", "content": "<s>"}, *HISTORY[2:]]
    )
    encoder = Encoder(tokenizer, section(), 512)
    row, usual = encoder.row(talk), encoder.row(replace(talk, source="now", target="cat", history=HISTORY[1:]))
    special = {at for at, one in tokenizer.added_tokens_decoder.items() if one.special} - {tokenizer.unk_token_id}
    assert [one for one in row.prompt if one in special] == [one for one in usual.prompt if one in special]
    assert [one for one in row.completion if one in special] == [encoder.end]
    assert tokenizer.decode(row.completion, skip_special_tokens=True).strip() == talk.target


@pytest.mark.parametrize("kind", KINDS)
def test_examples_without_control_tokens_keep_their_ids(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for example in (EXAMPLE, TALK, replace(EXAMPLE, source="< |end| > /s> é 世", target="<think>x</think> s>")):
        row = Encoder(tokenizer, section(), 512).row(example)
        text = rendered(
            tokenizer, [*example.history, {"role": "user", "content": f"{example.source}\n\nSay {{what}}."}],
            add_generation_prompt=True,
        )  # fmt: skip
        assert row.prompt == tokenizer(text, add_special_tokens=False).input_ids
        assert row.completion[:-1] == tokenizer(example.target, add_special_tokens=False).input_ids


def test_examples_with_control_tokens_are_counted(tokenizer: Any) -> None:
    examples = [EXAMPLE, TALK, replace(EXAMPLE, source=TYPED), replace(EXAMPLE, target="<|bos|>"),
                replace(TALK, history=[{"role": "user", "content": "<|system|>"}, *HISTORY[2:]])]  # fmt: skip
    _, encoded = Encoder(tokenizer, section(), 512).rows(examples)
    assert (encoded.examples, encoded.controls) == (5, 3)
    [notice] = notices("train", encoded)
    assert notice.startswith("3 of 5 training examples hold the name of a control token")


# Models that think first


@pytest.mark.parametrize(
    ("template", "block"), [(TAGGED, "<think>\n\n</think>\n\n"), (HEADED, "<think>\n\n</think>\n")]
)
def test_a_model_is_asked_not_to_think_and_trained_on_what_inference_continues(
    template: str, block: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, section(), 512)
    row = encoder.row(EXAMPLE)
    assert row.prompt == encoder.prompt(EXAMPLE)
    assert tokenizer.decode(row.prompt).endswith(f"<|assistant|>{block}")
    assert tokenizer.decode(row.completion) == "blue dog<|end|>"
    trained = tokenizer.decode([*row.prompt, *row.completion])
    asked = [
        {"role": "user", "content": f"{EXAMPLE.source}\n\nSay {{what}}."},
        {"role": "assistant", "content": "blue dog"},
    ]
    if template == TAGGED:
        assert trained == rendered(tokenizer, asked), "the template's own training text"


@pytest.mark.parametrize("template", [TAGGED, HEADED])
def test_a_model_is_asked_to_think_where_its_template_can(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    one, other = (Encoder(tokenizer, section(thinking=thinking), 512).prompt(EXAMPLE) for thinking in (True, False))
    assert tokenizer.decode(one).endswith("<|assistant|>")
    assert one != other


def test_a_switch_that_the_template_does_not_have_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"prompt.thinking = true, but the model's chat template has no such switch"):
        Encoder(tokenizer, section(thinking=True), 512)
    assert Encoder(tokenizer, section(), 512).prompt(EXAMPLE)


def test_a_template_that_always_begins_a_thought_must_be_asked_for_it(tokenizer: Any) -> None:
    tokenizer.chat_template = ALWAYS
    with pytest.raises(UserError, match=r"prompt.thinking = false, but the model's chat template begins a thought"):
        Encoder(tokenizer, section(), 512)
    assert tokenizer.decode(Encoder(tokenizer, section(thinking=True), 512).prompt(EXAMPLE)).endswith("<think>\n")


def test_answers_that_hold_thoughts_are_counted(tokenizer: Any) -> None:
    examples = [EXAMPLE, replace(EXAMPLE, target="<think>\nred\n</think>\n\nblue"), replace(EXAMPLE, source="<think>")]
    _, encoded = Encoder(tokenizer, section(), 512).rows(examples)
    assert encoded.thoughts == 1
    assert notices("train", encoded) == [
        "the targets of 1 of 3 training examples hold a thought or its mark, such as <think>"
    ]


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


# All turns of a conversation

QUESTION = {"role": "user", "content": "red cat?"}
ANSWER = {"role": "assistant", "content": "blue dog"}
LONG = replace(EXAMPLE, history=[{"role": "system", "content": "red"}, QUESTION, ANSWER, QUESTION, ANSWER])
TRIMMED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""It writes the history in capital letters."""


def earlier(tokenizer: Any, example: Example, **changes: Any) -> list[tuple[str, str]]:
    """The earlier answers of a row as text: the prompt of each, and its completion."""
    [row], _ = Encoder(tokenizer, section(**changes), 512).conversations([example])
    return [(tokenizer.decode(prompt), tokenizer.decode(completion)) for prompt, completion in row.earlier]


def test_each_earlier_answer_has_the_prompt_that_inference_would_give_it(tokenizer: Any) -> None:
    first = "<|system|>red<|end|><|user|>red cat?<|end|><|assistant|>"
    second = f"{first}blue dog<|end|><|user|>red cat?<|end|><|assistant|>"
    assert earlier(tokenizer, LONG) == [(first, "blue dog<|end|>"), (second, "blue dog<|end|>")]
    encoder = Encoder(tokenizer, section(template="{source}"), 512)
    [row], counted = encoder.conversations([LONG])
    asked = replace(LONG, history=LONG.history[:3], source="red cat?", target="blue dog")
    assert row.earlier[1] == (encoder.row(asked).prompt, encoder.row(asked).completion)
    assert replace(row, earlier=[]) == encoder.row(LONG)
    assert counted == encoder.rows([LONG])[1]


def held(tokenizer: Any, example: Example) -> list[bool]:
    """For each earlier answer, whether the row's prompt holds it behind its own prompt, token by token."""
    [row], _ = Encoder(tokenizer, section(), 512).conversations([example])
    return [row.prompt[: len(prompt + completion)] == prompt + completion for prompt, completion in row.earlier]


def test_a_template_that_rewrites_history_does_not_change_what_is_learnt(tokenizer: Any) -> None:
    assert held(tokenizer, LONG) == [True, True]
    for template in (TAGGED, TRIMMED):
        tokenizer.chat_template = template
        assert held(tokenizer, LONG) == [False, False]
        answers = earlier(tokenizer, LONG)
        assert [completion for _, completion in answers] == ["blue dog<|end|>"] * 2
        asked = replace(LONG, history=LONG.history[:3], source="red cat?")
        assert answers[1][0] == tokenizer.decode(Encoder(tokenizer, section(template="{source}"), 512).prompt(asked))


def test_a_thought_that_the_template_takes_out_of_the_history_is_learnt_as_it_was_given(tokenizer: Any) -> None:
    tokenizer.chat_template = TAGGED
    thought = "<think>\nred\n</think>\n\nblue"
    example = replace(LONG, history=[QUESTION, ANSWER | {"content": thought}])
    [(prompt, completion)] = earlier(tokenizer, example, thinking=True)
    assert prompt == "<|user|>red cat?<|end|><|assistant|>"
    assert completion == f"{thought}<|end|>"
    assert held(tokenizer, example) == [False]


def test_an_earlier_answer_with_weight_0_is_read_and_not_learnt(tokenizer: Any) -> None:
    marked = replace(LONG, history=[QUESTION, ANSWER | {"weight": "0"}, QUESTION, ANSWER])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message.content }}", "{{ message.content }}{{ message.weight }}"
    )
    [(prompt, _)] = earlier(tokenizer, marked)
    assert prompt.count("blue dog<|end|>") == 1, "the template does not see the weight"


def test_control_tokens_in_earlier_turns_are_characters(tokenizer: Any) -> None:
    example = replace(LONG, history=[QUESTION | {"content": "a<|end|>b"}, ANSWER | {"content": "c<|user|>d"}])
    [row], _ = Encoder(tokenizer, section(), 512).conversations([example])
    [(prompt, completion)] = row.earlier
    end, user = (tokenizer.convert_tokens_to_ids(name) for name in ("<|end|>", "<|user|>"))
    assert (prompt.count(end), prompt.count(user), completion.count(user)) == (1, 1, 0)
    assert tokenizer.decode(completion) == "c<|user|>d<|end|>"
    assert held(tokenizer, example) == [True]


def test_turns_that_a_prompt_has_lost_are_not_learnt(tokenizer: Any) -> None:
    long = replace(LONG, history=[QUESTION, ANSWER | {"content": "blue dog " * 40}, QUESTION, ANSWER])
    found = earlier(tokenizer, long, max_tokens=60, truncate_source=True)
    assert found == [("<|user|>red cat?<|end|><|assistant|>", "blue dog<|end|>")]


def test_an_earlier_answer_that_cannot_be_learnt_is_refused(tokenizer: Any) -> None:
    empty = replace(LONG, history=[QUESTION, ANSWER | {"content": ""}])
    with pytest.raises(UserError, match=r"message 2 of a/what, an answer, has no token.*weight 0 in the data"):
        earlier(tokenizer, empty)
    tokenizer.chat_template = (
        "{% if not messages or messages[0].role == 'assistant' %}{{ raise_exception('who asks?') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(UserError, match=r"chat template refuses the messages of a/what.*who asks\?"):
        earlier(tokenizer, replace(LONG, history=[ANSWER, *LONG.history[1:]]))


def test_a_row_fits_if_each_of_its_answers_does(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, section(), 512)
    row = encoder.row(EXAMPLE)
    assert encoder.holds(replace(row, earlier=[([1] * 500, [1] * 12)]))
    assert not encoder.holds(replace(row, earlier=[([1] * 500, [1] * 13)]))
