"""Rows of a data set: the same for the same arguments, and written as a user's files."""

import json
import random
from dataclasses import asdict
from pathlib import Path

from pipeline.core import records

WORDS = [
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "runs",
    "sleeps",
    "sings",
    "fast",
    "slow",
    "here",
    "there",
    "now",
]
ASPECTS = ("what", "who")
SPLIT_GROUPS = {"train": 8, "validation": 4, "test": 4}


def rows(split: str, groups: int) -> list[records.Example]:
    """Examples with two aspects a group, none of them alike; the same for the same arguments."""
    draw = random.Random(split)
    made = []
    for number in range(groups):
        source = " ".join(draw.choices(WORDS, k=12)) + f" {split} {number}."
        for aspect in ASPECTS:
            name = f"{split}-{number}"
            made.append(
                records.Example(f"{name}/{aspect}", name, aspect, source, " ".join(draw.choices(WORDS, k=4)), source)
            )
    return made


def write_data(folder: Path) -> None:
    """A local data set of JSON lines, and general text beside it."""
    for split, groups in SPLIT_GROUPS.items():
        lines = [json.dumps(asdict(row)) for row in rows(split, groups)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    general = [json.dumps({"text": row.source}) for row in rows("general", 12)]
    (folder / "general.jsonl").write_text("\n".join(general) + "\n")
