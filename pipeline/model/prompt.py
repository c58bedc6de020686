"""From an example to token ids: one prompt for training and inference, for base and tuned.

The completion is tokenized apart from the prompt. So training sees, token by token, the prefix that inference
continues. What a chat template writes before an answer, such as an empty thought, belongs to the prompt.

Names of control tokens are tokens in `prompt.template` and `prompt.instructions`, which the experimenter writes, and
text in the data (`pipeline.model.controls`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.records import Encoded, Example
from pipeline.core.text import canonical, holds_thought, opens_thought
from pipeline.model import apart
from pipeline.model.apart import TemplateError as TemplateError
from pipeline.model.controls import Controls
from pipeline.model.controls import plain_ids as plain_ids

Message = dict[str, str]

# Without a date, some chat templates print today's, which would change every prompt overnight.
DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class Row:
    """A training or validation row: token ids of the prompt, and of the completion with its closing EOS.

    `earlier` holds the same of the earlier answers of its conversation, if they are learnt too.
    """

    id: str
    group: str
    prompt: list[int]
    completion: list[int]
    earlier: list[tuple[list[int], list[int]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of a prompt, how many tokens it lost to `prompt.max_tokens`, and whether texts of its example hold
    names of control tokens. `history` and `source` are what it holds of its example's."""

    ids: list[int]
    lost: int
    controls: bool
    history: Sequence[Message]
    source: str


class Encoder:
    """Encodes examples for one tokenizer and one `prompt` section."""

    def __init__(self, tokenizer: Any, prompt: params.Prompt, context: int) -> None:
        """`context` is the longest sequence the model can take, in tokens."""
        require_model(prompt, context, bool(tokenizer.chat_template))
        self.tokenizer, self.params, self.context = tokenizer, prompt, context
        self.controls = Controls(tokenizer)
        self.end = self._end_of_completion()
        if prompt.style == "chat":
            self._require_switch()

    def prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt. UserError as `made`."""
        return self.made(example).ids

    def made(self, example: Example) -> Prompt:
        """The prompt of an example, shortened if `prompt.truncate_source` says so.

        UserError for what `require_row` refuses, for more than one BOS, and for a chat template that refuses the
        messages.
        """
        require_row(self.params, example)
        controls = self._holds_controls(example)
        history: Sequence[Message] = example.history
        source = example.source
        ids = whole = self._encode(example, history, source, controls)
        if not self.fits(whole) and self.params.truncate_source:
            ids, history, source = self._shortened(example, whole, controls)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError(
                f"the prompt of {example.id} starts with two BOS tokens ({self.tokenizer.bos_token}): "
                f"remove the one in prompt.template or in the chat template"
            )
        return Prompt(ids, len(whole) - len(ids) if self.fits(ids) else 0, controls, history, source)

    def after(self, shown: Sequence[Example], example: Example, prompt: Prompt) -> list[int]:
        """The token ids of `prompt`, which is that of `example`, after demonstrations: `shown`, each with its answer.

        In style chat these are turns of the conversation before the example's own, after its system messages. In style
        plain they are rows as training has them, whose EOS shows where an answer ends. What was cut from the prompt
        stays cut; `prompt.max_tokens` limits the prompt alone. UserError as `made`.
        """
        if not shown:
            return prompt.ids
        for one in shown:
            require_row(self.params, one)
        if self.params.style == "plain":
            start = 1 if starts_with_bos(self.tokenizer) else 0
            rows = [self._row(one, self._whole(one)) for one in shown]
            before = [token for row in rows for token in [*row.prompt[start:], *row.completion]]
            return [*prompt.ids[:start], *before, *prompt.ids[start:]]
        controls = prompt.controls or any(map(self._holds_controls, shown))
        turns = [message for one in shown for message in self._turns(one, controls)]
        return self._encode(example, prompt.history, prompt.source, controls, turns)

    def _whole(self, example: Example) -> Prompt:
        """The prompt of an example, however long it is."""
        controls = self._holds_controls(example)
        ids = self._encode(example, example.history, example.source, controls)
        return Prompt(ids, 0, controls, example.history, example.source)

    def _turns(self, example: Example, controls: bool) -> list[Message]:
        """An example with its answer as messages, marked if `controls` says so; without its system messages."""

        def marked(text: str) -> str:
            return self.controls.marked(text) if controls else text

        earlier = self._marked(example.history) if controls else example.history
        return [
            *earlier[_systems(earlier) :],
            {"role": "user", "content": self._fill(example, marked(example.source))},
            {"role": "assistant", "content": marked(example.target)},
        ]

    def _marked(self, history: Sequence[Message]) -> list[Message]:
        """Messages with marks for the control tokens in them."""
        return [message | {"content": self.controls.marked(message["content"])} for message in history]

    def _holds_controls(self, example: Example) -> bool:
        texts = (example.source, example.target, *(message["content"] for message in example.history))
        return any(map(self.controls.found_in, texts))

    def prompts(self, examples: Sequence[Example]) -> tuple[dict[str, list[int]], Encoded]:
        """The token ids of the prompts by example id, and what became of the examples. UserError as `made`."""
        made = [self.made(example) for example in examples]
        return {example.id: one.ids for example, one in zip(examples, made, strict=True)}, _counted(examples, made)

    def rows(self, examples: Sequence[Example]) -> tuple[list[Row], Encoded]:
        """The rows of examples, and what became of them. UserError as `row`."""
        made = [self.made(example) for example in examples]
        rows = [self._row(example, one) for example, one in zip(examples, made, strict=True)]
        return rows, _counted(examples, made)

    def conversations(self, examples: Sequence[Example]) -> tuple[list[Row], Encoded]:
        """As `rows`, with the earlier answers that each prompt holds, but for those with weight 0.

        UserError as `row`, and for an answer before which the chat template makes no prompt.
        """
        made = [self.made(example) for example in examples]
        rows = [
            replace(self._row(example, one), earlier=self._earlier(example, one))
            for example, one in zip(examples, made, strict=True)
        ]
        return rows, _counted(examples, made)

    def fits(self, prompt: list[int]) -> bool:
        return len(prompt) <= self.params.max_tokens

    def row(self, example: Example) -> Row:
        """Prompt and completion; the completion ends in the EOS at which decoding stops.

        UserError as `made`, and for an answer of which the tokenizer makes no token.
        """
        return self._row(example, self.made(example))

    def _row(self, example: Example, prompt: Prompt) -> Row:
        completion = self.controls.plain(example.target)
        if not completion:
            raise UserError(
                f"the answer of {example.id}, {example.target!r}, has no token in this model's vocabulary: remove it"
            )
        return Row(example.id, example.group, prompt.ids, [*completion, self.end])

    def _earlier(self, example: Example, prompt: Prompt) -> list[tuple[list[int], list[int]]]:
        """Prompt and completion of each answer in the history, as the model would be asked for it there.

        The prompt is made anew, since a template may write an answer of the history in another way than behind a
        prompt. The user's messages stand in it as they are, without `prompt.template`.
        """
        found = []
        for at, message in enumerate(prompt.history):
            if message["role"] != "assistant" or message.get("weight") == "0":
                continue
            completion = self.controls.plain(message["content"])
            before = self._marked(prompt.history[:at]) if prompt.controls else prompt.history[:at]
            ids = self._tokenized(self._rendered(example, before), prompt.controls)
            if not completion or not ids:
                raise UserError(
                    f"message {at + 1} of {example.id}, an answer, has no token, or no prompt before it, with this "
                    "model's tokenizer and chat template: give it weight 0 in the data, or set train.turns to last"
                )
            found.append((ids, [*completion, self.end]))
        return found

    def holds(self, row: Row) -> bool:
        """Whether the model's context holds the whole row, and each earlier answer behind its prompt."""
        sequences = ((row.prompt, row.completion), *row.earlier)
        return all(len(prompt) + len(completion) <= self.context for prompt, completion in sequences)

    def require_fit(self, prompts: dict[str, list[int]], split: str, new_tokens: int) -> None:
        """UserError unless every prompt fits, with `new_tokens` after it. `prompts`: token ids by example id."""
        long = sorted((len(ids), name) for name, ids in prompts.items() if not self.fits(ids))
        if long:
            raise UserError(
                f"{len(long)} of {len(prompts)} {split} prompts are longer than prompt.max_tokens = "
                f"{self.params.max_tokens}; the longest is {long[-1][1]} with {long[-1][0]} tokens{self.remedy}"
            )
        longest = max(map(len, prompts.values()))
        if longest + new_tokens > self.context:
            raise UserError(
                f"the longest {split} prompt ({longest} tokens) and {new_tokens} tokens of answer exceed the model's "
                f"context of {self.context} tokens: lower prompt.max_tokens or generation.max_new_tokens"
            )

    @property
    def remedy(self) -> str:
        """The end of a message about prompts that are longer than `prompt.max_tokens`."""
        limit = f"raise prompt.max_tokens (the model's context is {self.context})"
        if not self.params.truncate_source:
            return f": {limit} or set prompt.truncate_source to true"
        return (
            f", with only the first character of its source left: {limit}, or shorten what is never cut, which is "
            "prompt.template, prompt.instructions, and the system message of a conversation"
        )

    def _fill(self, example: Example, source: str) -> str:
        # Not str.format: braces in the source or in the instruction must stay what they are.
        before, after = self.params.template.split("{source}", 1)
        if "{instruction}" in before + after:
            instruction = instruction_of(self.params, example)
            before, after = (part.replace("{instruction}", instruction) for part in (before, after))
        return before + source + after

    def _encode(
        self, example: Example, history: Sequence[Message], source: str, controls: bool, turns: Sequence[Message] = ()
    ) -> list[int]:
        """The token ids of a prompt with this much of its history and source. `controls` as in `Prompt`.

        `turns` stand before the history, after its system messages, and are marked already.
        """
        if controls:
            history, source = self._marked(history), self.controls.marked(source)
        text = self._fill(example, source)
        if self.params.style == "chat":
            at = _systems(history)
            text = self._rendered(example, [*history[:at], *turns, *history[at:], {"role": "user", "content": text}])
        ids = self._tokenized(text, controls)
        if self.params.style == "plain" and starts_with_bos(self.tokenizer):
            ids = [self.tokenizer.bos_token_id, *ids]
        return ids

    def _tokenized(self, text: str, controls: bool) -> list[int]:
        """The token ids of a text in which names of control tokens are tokens. `controls`: it may hold marks."""
        ids: list[int]
        ids = self.controls.mixed(text) if controls else self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _rendered(self, example: Example, messages: Sequence[Message]) -> str:
        # Chat templates know these two fields: they may read others, such as a weight, for a part of the message.
        plain = [{name: message[name] for name in ("role", "content")} for message in messages]
        try:
            return rendered(self.tokenizer, plain, add_generation_prompt=True, enable_thinking=self.params.thinking)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the model's chat template refuses the messages of {example.id} ({roles}): {error}; correct "
                "the data, or take another model"
            ) from None

    def _shortened(
        self, example: Example, whole: list[int], controls: bool
    ) -> tuple[list[int], Sequence[Message], str]:
        """A prompt that fits, without its oldest turns, and if that is not enough, without the end of its source.

        Returned with what it holds of history and source.
        If it has room for no character of the source, it does not fit. `whole` is the uncut prompt.
        """
        left = _later(example.history)

        def encoded(turns: int) -> list[int]:
            return self._encode(example, left[turns], example.source, controls)

        without = bisect_left(range(len(left)), True, key=lambda turns: self.fits(encoded(turns)))
        if 0 < without < len(left):
            return encoded(without), left[without], example.source
        ids = encoded(len(left) - 1) if len(left) > 1 else whole
        ids, source = self._cut(example, left[-1], ids, controls)
        return ids, left[-1], source

    def _cut(
        self, example: Example, history: Sequence[Message], ids: list[int], controls: bool
    ) -> tuple[list[int], str]:
        """The prompt with the beginning of the source that fits, or with its first character. `ids` has all of it.

        A character is what a reader takes for one (a grapheme cluster, Unicode's annex 29). Text may be tokenized
        differently at the cut, so it is cut again until it fits, each time by twice as much.
        """
        import regex

        source = example.source
        ends = [found.end() for found in regex.finditer(r"\X", source)]
        starts = [start for start, _ in self.tokenizer(
            source, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping]  # fmt: skip
        tokens, kept, factor = len(starts), len(ends), 1
        while not self.fits(ids) and kept > 1:
            tokens = max(0, tokens - factor * (len(ids) - self.params.max_tokens))
            factor *= 2
            kept = max(1, min(kept - 1, bisect_right(ends, starts[tokens] if tokens else 0)))
            ids = self._encode(example, history, source[: ends[kept - 1]], controls)
        return ids, source[: ends[kept - 1]] if ends else source

    def _end_of_completion(self) -> int:
        """The token that closes an answer: the special one that the chat template puts behind it, else EOS."""
        if self.params.style == "chat":
            mark = "\u2042"
            try:
                filled = rendered(
                    self.tokenizer,
                    [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}],
                    enable_thinking=self.params.thinking,
                )
            except TemplateError as error:
                raise UserError(
                    f"the model's chat template renders no question with its answer ({error}): take another model, or "
                    "set prompt.style to plain"
                ) from None
            behind = self.tokenizer(filled.rpartition(mark)[2], add_special_tokens=False).input_ids
            # Not `all_special_ids`: it lacks tokens without a named role, as Gemma's <end_of_turn> and Phi 3's <|end|>.
            added = self.tokenizer.added_tokens_decoder
            if behind and behind[0] in added and added[behind[0]].special:
                return int(behind[0])
        if self.tokenizer.eos_token_id is None:
            raise UserError("the model's tokenizer has no EOS token: without one, decoding cannot learn to stop")
        return int(self.tokenizer.eos_token_id)

    def _require_switch(self) -> None:
        """UserError unless the chat template does what `prompt.thinking` asks for."""
        ask = [{"role": "user", "content": "a"}]
        try:
            one, other = (
                rendered(self.tokenizer, ask, add_generation_prompt=True, enable_thinking=wanted)
                for wanted in (self.params.thinking, not self.params.thinking)
            )
        except TemplateError as error:
            raise UserError(
                f"the model's chat template renders no question ({error}): take another model, or set prompt.style to "
                "plain"
            ) from None
        if self.params.thinking and one == other and not opens_thought(one):
            raise UserError(
                "prompt.thinking = true, but the model's chat template has no such switch (enable_thinking changes "
                "nothing in a prompt): set it to false, or take a model whose template has it"
            )
        if not self.params.thinking and opens_thought(one):
            raise UserError(
                "prompt.thinking = false, but the model's chat template begins a thought in every prompt: set it to "
                "true, or take another model"
            )


def _counted(examples: Sequence[Example], made: Sequence[Prompt]) -> Encoded:
    return Encoded(
        examples=len(examples),
        controls=sum(one.controls for one in made),
        cut=sum(one.lost > 0 for one in made),
        lost=sum(one.lost for one in made),
        thoughts=sum(holds_thought(example.target) for example in examples),
    )


def notices(split: str, found: Encoded) -> list[str]:
    """What a user should know of the examples of a split, a sentence each; empty if there is nothing."""
    of = f"of {found.examples:,} {split.replace('train', 'training')} examples"
    told = []
    if found.controls:
        told.append(
            f"{found.controls:,} {of} hold the name of a control token of this model: it is encoded as text, not as "
            "the token"
        )
    if found.cut:
        told.append(f"the prompts of {found.cut:,} {of} were cut to prompt.max_tokens and lost {found.lost:,} tokens")
    if found.thoughts:
        told.append(f"the targets of {found.thoughts:,} {of} hold a thought or its mark, such as <think>")
    return told


def _systems(history: Sequence[Message]) -> int:
    """The number of system messages at the beginning of a conversation."""
    return next((at for at, message in enumerate(history) if message["role"] != "system"), len(history))


def _later(history: Sequence[Message]) -> list[list[Message]]:
    """A conversation without its first turns: none, one, two and so on. System messages at its beginning stay.

    A turn begins with a message of the user, so that what is left is a conversation too.
    """
    first = _systems(history)
    begins = [at for at in range(first + 1, len(history)) if history[at]["role"] == "user"]
    ends = [len(history)] if first < len(history) else []
    return [list(history), *([*history[:first], *history[at:]] for at in [*begins, *ends])]


def model_faults(prompt: params.Prompt, context: int | None, chat_template: bool | None) -> Iterator[str]:
    """Why no prompts can be made for a model. `context` is in tokens. None is a fact that is not known."""
    if context is not None and prompt.max_tokens > context:
        yield f"prompt.max_tokens = {prompt.max_tokens}, but the model's context is {context} tokens"
    if prompt.style == "chat" and chat_template is False:
        yield "prompt.style = 'chat', but the model's tokenizer has no chat template: set it to plain"


def require_model(prompt: params.Prompt, context: int | None, chat_template: bool | None) -> None:
    """UserError with all that `model_faults` finds."""
    if faults := list(model_faults(prompt, context, chat_template)):
        raise UserError("; ".join(faults))


def require_row(prompt: params.Prompt, example: Example) -> None:
    """UserError for a row that no prompt can be made of, whatever the model is.

    It has an aspect without an instruction, or earlier messages that no chat template would mark.
    """
    if example.history and prompt.style == "plain":
        raise UserError(
            f"prompt.style = 'plain', but {example.id} has {len(example.history)} earlier messages of a "
            "conversation, which a chat template alone can tell apart: set prompt.style to chat"
        )
    if "{instruction}" in prompt.template:
        instruction_of(prompt, example)


def instruction_of(prompt: params.Prompt, example: Example) -> str:
    """The instruction for the aspect of an example. UserError if there is none, and no default."""
    instructions = prompt.instructions
    by_name = {canonical(name): text for name, text in instructions.items()}
    instruction = by_name.get(canonical(example.aspect), by_name.get("default"))
    if instruction is None:
        raise UserError(
            f"prompt.instructions has no entry for {example.aspect!r} (example {example.id}) and no default; "
            f"it has {', '.join(instructions) or 'none'}"
        )
    return instruction


def beginning(tokenizer: Any) -> list[int]:
    """The token ids before a text without a chat template: BOS if the model's training put it there, else none."""
    return [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text without a chat template, whole. Control tokens in it are read as their characters."""
    return [*beginning(tokenizer), *plain_ids(tokenizer, text)]


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS before plain text, as the model's training did."""
    bos = tokenizer.bos_token_id
    return bos is not None and bool(tokenizer("a").input_ids[0] == bos)


def rendered(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    """What the tokenizer's chat template makes of a conversation, as its `apply_chat_template` does.

    It is rendered in another process, the same for all conversations. TemplateError and UserError as of
    `apart.rendered`.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateError(str(error)) from None
    return apart.rendered(template, messages, tokenizer.special_tokens_map | {"date_string": DATE} | options)
