"""The error for a model that cannot be fetched."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core import records
from pipeline.core.errors import UserError

MOST_LAYERS = 1000
"""The largest published models have less than 200."""


class UnfitError(UserError):
    """What is wrong with a model. `named` puts the model's name before it."""


@contextmanager
def named(source: str) -> Iterator[None]:
    """Say which `model.source` an `UnfitError` is about."""
    try:
        yield
    except UnfitError as error:
        raise UserError(f"model.source = {source!r}: {error}") from error.__cause__


def require_few_layers(count: int) -> None:
    """UnfitError for more layers than models have: they would all be built before any weight is read."""
    if count > MOST_LAYERS:
        raise UnfitError(f"it has {count:,} layers: {MOST_LAYERS:,} are the most")


def require_content(files: Iterable[Path]) -> None:
    """UnfitError for a file in whose place a clone without Git LFS has a pointer to it."""
    for file in files:
        if records.is_lfs_pointer(file):
            raise UnfitError(
                f"{file.name} is a Git LFS pointer in place of the file: run `git lfs pull` where the repository was "
                "cloned, and then pin the content anew"
            )
