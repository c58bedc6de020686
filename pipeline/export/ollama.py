"""Ollama's Modelfile for exported GGUF files: the chat template in ollama's language (Go's), and decoding options."""

import re
from pathlib import Path
from typing import Any

from pipeline import gguf
from pipeline.core import params, records
from pipeline.model import checkpoint, prompt


def decodes(generation: params.Generation) -> bool:
    """Whether llama.cpp and ollama can decode as `generation` says."""
    return generation.num_beams == 1 and not generation.no_repeat_ngram_size


def modelfile(
    base: str,
    adapter: str | None,
    folder: Path,
    generation: params.Generation,
    tokens: int,
    thinking: bool = False,
) -> str:
    """The text of the Modelfile beside the files `base` and `adapter` (None: merged into the base).

    `folder` has the tokenizer, and `tokens` is the room for a prompt with its answer; ollama cuts off what its default
    does not hold. The experiment's instructions are left out: ollama sends the user's message as it is, and takes names
    of control tokens in it for the tokens. `thinking` is `prompt.thinking`.
    """
    tokenizer = checkpoint.tokenizer(folder)
    lines = [f"FROM ./{base}"]
    if adapter is not None:
        lines += [
            f"ADAPTER ./{adapter}",
            "# Ollama from 0.34.1 on is reported to refuse ADAPTER: export with --merged.",
        ]
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif (template := _template(tokenizer, thinking)) is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# The model's chat template cannot be told in ollama's language: write TEMPLATE by hand.")
    if not decodes(generation):
        lines.append("# Ollama has neither beam search nor a limit on n-grams: it writes other texts than were scored.")
    lines += [
        *_choice(generation.sampling),
        f"PARAMETER repeat_penalty {generation.repetition_penalty}",
        f"PARAMETER repeat_last_n {tokens}",
        f"PARAMETER num_ctx {tokens}",
        f"PARAMETER num_predict {generation.max_new_tokens}",
    ]
    config = records.read_json(folder / "config.json")
    stops = [tokenizer.convert_ids_to_tokens(one) for one in gguf.stops(folder, config, tokenizer)]
    for stop in stops:
        # A value extends to the last quote in its line, but it ends at a line break behind a quote.
        lines.append(
            "# A token that ends an answer holds a quote and a line break, which a Modelfile cannot tell."
            if '"' in stop and re.search(r"[\r\n]", stop)
            else f'PARAMETER stop "{stop}"'
        )
    return "\n".join(lines) + "\n"


def _choice(drawing: params.Sampling | None) -> list[str]:
    """The parameters that say how a token is chosen. Ollama's draws are others than those that were scored."""
    if drawing is None:
        return ["PARAMETER temperature 0", "PARAMETER top_k 1"]
    return [f"PARAMETER {name} {value}" for name, value in drawing.model_dump(exclude={"samples"}).items()]


def _template(tokenizer: Any, thinking: bool = False) -> str | None:
    """The chat template in ollama's language (Go's), composed of what it writes around messages.

    None if the pieces do not compose to what the template itself renders, for each of `_CONVERSATIONS`.
    """
    try:
        pieces = _pieces(tokenizer, thinking)
        if pieces is None or any(
            _compose(pieces, messages) != _render(tokenizer, messages, True, thinking) for messages in _CONVERSATIONS
        ):
            return None
    except prompt.TemplateError:
        return None
    bos = tokenizer.bos_token if tokenizer.bos_token and tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
    go = {name: _go(text) for name, text in pieces.items()}
    default, system = _go(pieces["default"].removeprefix(bos)), _go(pieces["system"].removeprefix(bos))
    template = (
        "{{ if not .System }}" + default + "{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "system" }}' + system + "{{ .Content }}" + go["after_system"]
        + '{{ else if eq .Role "user" }}' + go["user"] + "{{ .Content }}" + go["after_user"]
        + '{{ else if eq .Role "assistant" }}' + go["assistant"] + "{{ .Content }}" + go["after_assistant"]
        + "{{ end }}{{ end }}" + go["answer"]
    )  # fmt: skip
    return None if template.endswith('"') else template  # the first three quotes in a row end it


_CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "one"}],
    [{"role": "system", "content": "zero"}, {"role": "user", "content": "one"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
]


def _render(tokenizer: Any, messages: list[dict[str, str]], prompted: bool, thinking: bool) -> str:
    return prompt.rendered(tokenizer, messages, add_generation_prompt=prompted, enable_thinking=thinking)


def _pieces(tokenizer: Any, thinking: bool) -> dict[str, str] | None:
    """What a chat template writes around messages, found by marks in their place; None if it does not write the marks.

    `default` is what it writes before the user's first message if there is no system message.
    """
    s, u, a, v = "\u2042S", "\u2042U", "\u2042A", "\u2042V"
    user = {"role": "user", "content": u}
    plain, system = _render(tokenizer, [user], False, thinking), {"role": "system", "content": s}
    prompted = _render(tokenizer, [user], True, thinking)
    with_system = _render(tokenizer, [system, user], False, thinking)
    turns = [user, {"role": "assistant", "content": a}, {"role": "user", "content": v}]
    long = _render(tokenizer, turns, False, thinking)
    if not prompted.startswith(plain) or any(text.count(u) != 1 for text in (plain, with_system, long)):
        return None
    if with_system.count(s) != 1 or long.count(a) != 1 or long.count(v) != 1:
        return None
    before_user, after_user = plain.split(u)
    before_system, between = with_system.split(s)
    before_answer, behind = long.split(a)
    opening = before_answer.split(u)[1].removeprefix(after_user)
    # Between an answer and the next message are the end of the answer, usually the same as that of a user's message,
    # and the beginning of a user's message.
    turn, between_system = behind.split(v)[0], between.split(u)[0]
    own_user = turn.removeprefix(after_user)
    if not before_user.endswith(own_user):
        own_user = _shared_end(before_user, turn)
    if not between_system.endswith(own_user):
        return None
    return {
        "default": before_user.removesuffix(own_user),
        "system": before_system,
        "after_system": between_system.removesuffix(own_user),
        "user": own_user,
        "after_user": after_user,
        "assistant": opening,
        "after_assistant": turn.removesuffix(own_user),
        "answer": prompted.removeprefix(plain),
    }


def _shared_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _compose(pieces: dict[str, str], messages: list[dict[str, str]]) -> str:
    """What ollama renders for `messages` with the template of these pieces."""
    text = "" if messages[0]["role"] == "system" else pieces["default"]
    for message in messages:
        text += pieces[message["role"]] + message["content"] + pieces[f"after_{message['role']}"]
    return text + pieces["answer"]


def _go(text: str) -> str:
    """Text as it is written in a Go template inside a Modelfile's triple quotes."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '""{{ "\\"" }}')
