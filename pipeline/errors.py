"""The one error a user is meant to see: what is wrong, with which value, and what to do about it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the parameters, the data, the model or the environment that the user can mend.

    Entry points print it without a traceback and exit with code 1; anything else that escapes is a defect of ours. Its
    text goes into logs, so addresses that other people's errors quote lose their passwords here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_passwords(message))


def without_passwords(text: str) -> str:
    """`text`, its addresses without the user name and password that they may hold."""
    text = re.sub(r"//[^/@\s]*@", "//", text)
    return re.sub(r"(?i)([?&](?:password|passwd|token|secret)=)[^&\s'\"]+", r"\1...", text)


def listing(problems: Iterable[str], headline: str) -> UserError:
    """All problems at once, one line each, under one headline."""
    return UserError("\n".join([headline, *(f"  - {problem}" for problem in problems)]))


@contextmanager
def panics_told() -> Iterator[None]:
    """UserError in place of a panic in a library that is written in Rust, as tokenizers is: what comes of one is an
    exception, and no `Exception`."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(
            f"a library broke off ({type(error).__name__}: {str(error).partition(chr(10))[0][:500]}): the model's "
            "tokenizer is damaged, or does not fit the text; name another model"
        ) from None
