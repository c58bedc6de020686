"""What reading did with files besides making rows of them, counted: nothing is left out or changed without a word."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

SHOWN = 20  # names that one line lists at most


@dataclass
class Account:
    """The counts of one split, or of one reading.

    `left_out`: entries of files that became no row, by reason. `unused`: fields of records that hold something and that
    nothing reads, by name, each with the times it did. `changed`: texts that are not what the file holds, by what
    changed. `dropped`: ids of records that cannot be used, by reason. `blank_lines`: lines between
    records that hold nothing.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    blank_lines: int = 0

    def drop(self, why: str, name: str) -> None:
        """Note that the record with this id is dropped."""
        self.dropped.setdefault(why, []).append(name)

    @property
    def dropped_records(self) -> int:
        return sum(map(len, self.dropped.values()))

    def lines(self) -> list[str]:
        """What to tell the user, a line for each kind of count that is not zero."""
        blank = Counter({"blank lines": self.blank_lines} if self.blank_lines else {})
        kinds = [("left out", self.left_out + blank), ("fields that are not used", self.unused)]
        kinds += [("changed", self.changed)]
        return [f"{kind}: {listed(counts)}" for kind, counts in kinds if counts.total()]


def listed(counts: Mapping[str, int]) -> str:
    """`fuzzy entries (3), plural entries (1)`, sorted by name, at most `SHOWN` of them."""
    held = sorted((name, count) for name, count in counts.items() if count)
    shown = [f"{name} ({count:,})" for name, count in held[:SHOWN]]
    return ", ".join(shown + ["..."] * (len(held) > SHOWN))
