"""Files of a source, and what reading one gives."""

from pathlib import Path
from typing import Any

from pipeline.sources import tables
from pipeline.sources.account import Account
from pipeline.sources.tables import File


def written(folder: Path, name: str, content: str | bytes) -> File:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return File(name, "some", path)


def read(file: File, encoding: str = "utf-8", account: Account | None = None) -> list[Any]:
    """Each record with its place; `account` counts what is left out."""
    return list(tables.records(file, encoding, account=account))


def cells(file: File, account: Account | None = None) -> list[list[Any]]:
    """The records as lists of their own values."""
    return [
        [held for name, held in record.items() if name not in tables.BUILT_IN]
        for _, record in read(file, account=account)
    ]
