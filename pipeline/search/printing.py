"""What sweeps and searches print: tables of experiments, and the last lines of a log."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.core.errors import printable

LOG_LINES = 15


def tail(text: str) -> str:
    """The last `LOG_LINES` lines of a log."""
    return "\n".join(text.strip().splitlines()[-LOG_LINES:])


def quoted(log: str) -> str:
    return "\n".join(f"  | {line}" for line in log.splitlines())


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table as wide as its cells are."""
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    Console(soft_wrap=True, width=1000).print(table)
