"""Tries what strangers wrote in a process that may come to harm: their chat templates, and their tokenizers.

    python -P pipeline/model/apart.py

A chat template is a program. Its sandbox keeps it from files and from the network, and not from loops within loops,
from a number with a billion digits, nor from a text that fills the memory; a tokenizer's file can end the process that
reads it. So they run here, where the system ends whatever takes too much. Requests and answers are lines of JSON, one
a line: nothing that comes back is run. Imports nothing of this package, and is started by its path.

The time is the one that the processor spends, so that a busy or a sleeping machine ends no honest template. macOS
enforces no limit on memory: there the limit on time bounds it.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

SECONDS = {"render": 2, "tokenizer": 30}
"""Of the processor, for one conversation and for one tokenizer, and up to one more, as the system counts in whole ones.
A template that does what it is for takes a thousandth of one, the largest tokenizers take two."""
MEMORY = 2 * 2**30
"""Bytes of address space."""
LONGEST = 2**24
"""Characters of what a template may write: more than the context of any model holds."""
PROBES = ("The cat sat, didn't it?", "  two  spaces\n\tand a tab", "1234.5 % of x=y", "Grüße, 世界 🙂", "")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    tasks: dict[str, Callable[..., str]] = {"render": _render, "tokenizer": _tokenizer}
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401  # outside of the limit

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _limit(resource.RLIMIT_AS, MEMORY)
    for line in sys.stdin:
        request = json.loads(line)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + request["seconds"])
        try:
            answer = {"text": tasks[request["task"]](**request["given"])}
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever a template brings about; what tokenizers raises is no `Exception`
            own = type(error).__name__ == "TemplateError"  # what a template says itself
            told = str(error) if own else f"{type(error).__name__}: {error}".removesuffix(": ")
            answer = {"error": told.partition("\n")[0][:500]}
        print(json.dumps(answer), file=answers, flush=True)


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process, where the system has it."""
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _render(template: str, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """What a chat template makes of a conversation, as `apply_chat_template` of transformers has it rendered."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts: list[str]
    texts, _ = render_jinja_template(conversations=[messages], chat_template=template, **options)
    [text] = texts
    if len(text) > LONGEST:
        raise ValueError(f"it writes {len(text):,} characters")
    return text


def _tokenizer(file: str) -> str:
    """Read a tokenizer.json, and use it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    for text in PROBES:
        tokenizer.decode(tokenizer.encode(text).ids)
    return ""


if __name__ == "__main__":
    main()
