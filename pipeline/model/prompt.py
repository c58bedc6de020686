"""From an example to token ids: one prompt for training and inference, for base and tuned.

The completion is tokenized apart from the prompt. So training sees, token by token, the prefix that inference
continues.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.model import apart
from pipeline.model.apart import TemplateError as TemplateError
from pipeline.model.controls import plain_ids as plain_ids

# Without a date, some chat templates print today's, which would change every prompt overnight.
DATE = "26 Jul 2024"


@dataclass(frozen=True, slots=True)
class Row:
    """A training or validation row: token ids of the prompt, and of the completion with its closing EOS."""

    id: str
    group: str
    prompt: list[int]
    completion: list[int]


class Encoder:
    """Encodes examples for one tokenizer and one `prompt` section."""

    def __init__(self, tokenizer: Any, prompt: params.Prompt, context: int) -> None:
        """`context` is the longest sequence the model can take, in tokens."""
        if prompt.max_tokens > context:
            raise UserError(f"prompt.max_tokens = {prompt.max_tokens}, but the model's context is {context} tokens")
        if prompt.style == "chat" and not tokenizer.chat_template:
            raise UserError("prompt.style = 'chat', but the model's tokenizer has no chat template: set it to plain")
        self.tokenizer, self.params, self.context = tokenizer, prompt, context
        self.end = self._end_of_completion()

    def prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt.

        UserError for an aspect without an instruction, for more than one BOS, and for earlier messages of a
        conversation without a chat template to mark them, or with one that refuses them.
        """
        if example.history and self.params.style == "plain":
            raise UserError(
                f"prompt.style = 'plain', but {example.id} has {len(example.history)} earlier messages of a "
                "conversation, which a chat template alone can tell apart: set prompt.style to chat"
            )
        ids = self._encode(example, example.source)
        excess = len(ids) - self.params.max_tokens
        if excess > 0 and self.params.truncate_source:
            ids = self._encode(example, self._cut(example.source, excess))
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError(
                f"the prompt of {example.id} starts with two BOS tokens ({self.tokenizer.bos_token}): "
                f"remove the one in prompt.template or in the chat template"
            )
        return ids

    def fits(self, prompt: list[int]) -> bool:
        return len(prompt) <= self.params.max_tokens

    def row(self, example: Example) -> Row:
        """Prompt and completion; the completion ends in the EOS at which decoding stops.

        UserError for an answer of which the tokenizer makes no token.
        """
        completion = self.tokenizer(example.target, add_special_tokens=False).input_ids
        if not completion:
            raise UserError(
                f"the answer of {example.id}, {example.target!r}, has no token in this model's vocabulary: remove it"
            )
        return Row(example.id, example.group, self.prompt(example), [*completion, self.end])

    def holds(self, row: Row) -> bool:
        """Whether the model's context holds the whole row."""
        return len(row.prompt) + len(row.completion) <= self.context

    def require_fit(self, prompts: dict[str, list[int]], split: str, new_tokens: int) -> None:
        """UserError unless every prompt fits, with `new_tokens` after it. `prompts`: token ids by example id."""
        long = sorted((len(ids), name) for name, ids in prompts.items() if not self.fits(ids))
        if long:
            raise UserError(
                f"{len(long)} of {len(prompts)} {split} prompts are longer than prompt.max_tokens = "
                f"{self.params.max_tokens}; the longest is {long[-1][1]} with {long[-1][0]} tokens: raise "
                f"prompt.max_tokens (the model's context is {self.context}) or set prompt.truncate_source to true"
            )
        longest = max(map(len, prompts.values()))
        if longest + new_tokens > self.context:
            raise UserError(
                f"the longest {split} prompt ({longest} tokens) and {new_tokens} tokens of answer exceed the model's "
                f"context of {self.context} tokens: lower prompt.max_tokens or generation.max_new_tokens"
            )

    def _fill(self, example: Example, source: str) -> str:
        # Not str.format: braces in the source or in the instruction must stay what they are.
        before, after = self.params.template.split("{source}", 1)
        if "{instruction}" in before + after:
            instruction = self._instruction(example)
            before, after = (part.replace("{instruction}", instruction) for part in (before, after))
        return before + source + after

    def _instruction(self, example: Example) -> str:
        instructions = self.params.instructions
        instruction = instructions.get(example.aspect, instructions.get("default"))
        if instruction is None:
            raise UserError(
                f"prompt.instructions has no entry for {example.aspect!r} (example {example.id}) and no default; "
                f"it has {', '.join(instructions) or 'none'}"
            )
        return instruction

    def _encode(self, example: Example, source: str) -> list[int]:
        text = self._fill(example, source)
        if self.params.style == "chat":
            messages = [*example.history, {"role": "user", "content": text}]
            try:
                filled = rendered(self.tokenizer, messages, add_generation_prompt=True)
            except TemplateError as error:
                roles = ", ".join(message["role"] for message in messages)
                raise UserError(
                    f"the model's chat template refuses the messages of {example.id} ({roles}): {error}; correct "
                    "the data, or take another model"
                ) from None
            ids: list[int] = self.tokenizer(filled, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if starts_with_bos(self.tokenizer):
                ids = [self.tokenizer.bos_token_id, *ids]
        return ids

    def _cut(self, source: str, excess: int) -> str:
        """`source` without its last `excess` tokens, and one more: text may be tokenized differently at the cut."""
        ids = self.tokenizer(source, add_special_tokens=False).input_ids
        kept: str = self.tokenizer.decode(ids[: max(0, len(ids) - excess - 1)])
        return kept

    def _end_of_completion(self) -> int:
        """The token that closes an answer: the special one that the chat template puts behind it, else EOS."""
        if self.params.style == "chat":
            mark = "\u2042"
            try:
                filled = rendered(
                    self.tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
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


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS before plain text, as the model's training did."""
    bos = tokenizer.bos_token_id
    return bos is not None and bool(tokenizer("a").input_ids[0] == bos)


def rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """What the tokenizer's chat template makes of a conversation, as its `apply_chat_template` does.

    It is rendered in another process, the same for all conversations. TemplateError and UserError as of
    `apart.rendered`.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateError(str(error)) from None
    return apart.rendered(template, messages, tokenizer.special_tokens_map | {"date_string": DATE} | options)
