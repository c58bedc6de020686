"""From an example to token ids: one prompt for training and inference, for base and tuned.

The completion is tokenized apart from the prompt, so the prefix that training sees is, token by token, the one that
inference continues.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.model import apart

# Some chat templates print today's date unless they are told one, which would change every prompt overnight.
DATE = "26 Jul 2024"
INSTEAD = "take another model"


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
        conversation where there is no chat template to tell them apart, or where it refuses them.
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

        UserError for an answer of which the tokenizer leaves nothing to learn.
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
        """UserError unless every prompt, and `new_tokens` behind it, fits. `prompts`: example id -> ids."""
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
                    f"the model's chat template refuses the messages of {example.id} ({roles}): {error}; mend the "
                    "data, or take another model"
                ) from None
            ids: list[int] = self.tokenizer(filled, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if starts_with_bos(self.tokenizer):
                ids = [self.tokenizer.bos_token_id, *ids]
        return ids

    def _cut(self, source: str, excess: int) -> str:
        """`source` without its last `excess` tokens, and one more for what joins up differently at the cut."""
        ids = self.tokenizer(source, add_special_tokens=False).input_ids
        kept: str = self.tokenizer.decode(ids[: max(0, len(ids) - excess - 1)])
        return kept

    def _end_of_completion(self) -> int:
        """The token that closes an answer: what the chat template puts behind one, else the tokenizer's EOS."""
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
            # Not `all_special_ids`: those have a role by name, and Gemma's <end_of_turn> or Phi 3's <|end|> have none.
            added = self.tokenizer.added_tokens_decoder
            if behind and behind[0] in added and added[behind[0]].special:
                return int(behind[0])
        if self.tokenizer.eos_token_id is None:
            raise UserError("the model's tokenizer has no EOS token: without one, decoding cannot learn to stop")
        return int(self.tokenizer.eos_token_id)


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the model was trained with a BOS in front of plain text, as its tokenizer tells."""
    bos = tokenizer.bos_token_id
    return bos is not None and bool(tokenizer("a").input_ids[0] == bos)


# Chat templates


class TemplateError(Exception):
    """What a chat template raised, as text."""


def rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """What the tokenizer's chat template makes of a conversation, as its `apply_chat_template` does.

    In another process (`pipeline.model.apart`), the same for all conversations. TemplateError for what the template
    raises;
    UserError where it takes longer than `apart.SECONDS` says, or ends that process in another way.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateError(str(error)) from None
    given = tokenizer.special_tokens_map | {"date_string": DATE} | options
    return _apart.ask("render", template=template, messages=messages, options=given)


def require_readable(file: Path) -> None:
    """UserError for a tokenizer.json that breaks its library, ends the process that reads it, or keeps it busy; other
    faults are left to the one who loads it, who knows more of them."""
    try:
        _apart.ask("tokenizer", file=str(file))
    except TemplateError as error:
        if str(error).startswith("PanicException"):
            raise UserError(f"the model's {file.name} breaks the library that reads it ({error}): {INSTEAD}") from None


class _Apart:
    """The process in which templates are rendered: started when one is, and again when one has ended it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, task: str, **given: Any) -> str:
        request = {"task": task, "seconds": apart.SECONDS[task], "given": given}
        with self.lock:
            if self.process is None:
                self.process = self._start()
            assert self.process.stdin
            assert self.process.stdout
            line = ""
            try:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except BrokenPipeError:
                pass
            except BaseException:  # the answer of an interrupted request must not be taken for the next one's
                self.process.kill()
                self.end()
                raise
            if not line:
                raise self._lost(task, self.end())
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _start(self) -> subprocess.Popen[str]:
        # Tokens and passwords of the user's environment are none of its business.
        kept = ("PATH", "HOME", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-P", apart.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment | {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for this process
        )

    def end(self) -> int:
        """End the process, and give its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        with contextlib.suppress(BrokenPipeError), process:  # closes its pipes, upon which it ends
            pass
        return process.returncode

    def _lost(self, task: str, status: int) -> UserError:
        if status >= 0:
            return UserError(
                f"the process that tries chat templates and tokenizers ended with {status}: what it printed says why; "
                "try again, or install this environment anew"
            )
        what, instead = "tokenizer", INSTEAD
        if task == "render":
            what, instead = "chat template", f"{INSTEAD}, or set prompt.style to plain"
        if status == -signal.SIGXCPU:
            return UserError(f"the model's {what} takes more than {apart.SECONDS[task]} s of the processor: {instead}")
        return UserError(f"the model's {what} ended the process that tried it ({_signal(-status)}): {instead}")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_apart = _Apart()
atexit.register(_apart.end)
