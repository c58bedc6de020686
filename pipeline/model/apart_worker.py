"""The process in which `pipeline.model.apart` tries chat templates and tokenizers. It may come to harm.

    python -P pipeline/model/apart_worker.py

A chat template is a program. Its sandbox denies it files and the network, but not nested loops, a number with a billion
digits, or a text that fills the memory. A tokenizer's file can end the process that reads it. So they run here, and the
system ends whatever takes too much. Requests and answers are JSON, one a line: nothing that comes back is run. This
file is started by its path and imports nothing of this package.

Time is the processor's, so a busy or sleeping machine does not end an honest template. macOS does not enforce a limit
on memory: there the limit on time bounds it.
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
"""Processor seconds for one conversation or one tokenizer. The system counts whole ones, so it may be one more.
A usual template takes a thousandth of a second, the largest tokenizers take two."""
MEMORY = 2 * 2**30
"""Bytes of address space."""
LONGEST = 2**24
"""Characters that a template may write: more than the context of any model holds."""
PROBES = ("The cat sat, didn't it?", "  two  spaces\n\tand a tab", "1234.5 % of x=y", "Grüße, 世界 🙂", "")
"""Texts that a tokenizer is tried with."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is not an answer
    tasks: dict[str, Callable[..., str]] = {"render": _render, "tokenizer": _tokenizer}
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401  # before the limits hold

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _limit(resource.RLIMIT_AS, MEMORY)
    for line in sys.stdin:
        request = json.loads(line)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + request["seconds"])
        try:
            answer = {"text": tasks[request["task"]](**request["given"])}
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a template raises anything; a panic in tokenizers is not an `Exception`
            own = type(error).__name__ == "TemplateError"  # the template's own words
            text = str(error) if own else f"{type(error).__name__}: {error}".removesuffix(": ")
            answer = {"error": text.partition("\n")[0][:500]}
        print(json.dumps(answer), file=answers, flush=True)


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process, if the system has this limit."""
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _render(template: str, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """What a chat template makes of a conversation, by the function behind transformers' `apply_chat_template`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts: list[str]
    texts, _ = render_jinja_template(conversations=[messages], chat_template=template, **options)
    [text] = texts
    if len(text) > LONGEST:
        raise ValueError(f"it writes {len(text):,} characters")
    return text


def _tokenizer(file: str) -> str:
    """Read a tokenizer.json, and try it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    for text in PROBES:
        tokenizer.decode(tokenizer.encode(text).ids)
    return ""


if __name__ == "__main__":
    main()
