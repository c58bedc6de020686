"""The one error a user is meant to see: what is wrong, with which value, and what to do about it."""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the parameters, the data, the model or the environment that the user can mend.

    Entry points print it without a traceback and exit with code 1; anything else that escapes is a defect of ours.
    """


def listing(problems: Iterable[str], headline: str) -> UserError:
    """All problems at once, one line each, under one headline."""
    return UserError("\n".join([headline, *(f"  - {problem}" for problem in problems)]))
