"""A split on its way from the read rows to the written ones: filtered, held out, grouped, merged, limited, cleaned."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile

from pipeline.core import params
from pipeline.core.contracts import SharedGroups
from pipeline.core.errors import UserError
from pipeline.core.records import Example
from pipeline.core.text import alike, canonical, is_visible, words
from pipeline.sources.account import Account


@dataclass
class Split:
    """The rows that are still in a split, and the ids of those that left it, by reason.

    `filtered`: rows that the parameters exclude. `dropped`: rows that cannot be used. `read`: how many rows came
    through filters and limits. `held_out`: how many of the split's rows are from the training files. `merged`: how
    many rows became references of another row. `declared`: the ids of the rows whose group the data names.
    `beyond_limit`: how many rows `data.limits` cut off. `account`: what reading the split's own files left out and
    changed.
    """

    name: str
    files: list[str]
    rows: list[Example]
    read: int = 0
    held_out: int = 0
    merged: int = 0
    declared: set[str] = field(default_factory=set)
    filtered: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    beyond_limit: int = 0
    account: Account = field(default_factory=Account)

    def remove(self, reason: Callable[[Example], str | None], gone: dict[str, list[str]]) -> None:
        """Take out the rows for which `reason` returns one, and note their ids in `gone`: `filtered` or `dropped`."""
        kept = []
        for row in self.rows:
            if why := reason(row):
                gone.setdefault(why, []).append(row.id)
            else:
                kept.append(row)
        self.rows = kept

    @property
    def dropped_rows(self) -> int:
        return sum(map(len, self.dropped.values()))

    def summary(self) -> str:
        """The split in one line, for people."""
        groups = len({row.group for row in self.rows})
        parts = [f"{self.name}: {len(self.rows)} rows in {groups} groups"]
        parts += [f"{self.dropped_rows} dropped" + (f" ({reasons(self.dropped)})" if self.dropped else "")]
        parts += [f"filtered {reasons(self.filtered)}"] if self.filtered else []
        parts += [f"{self.merged} merged as references"] if self.merged else []
        parts += [f"{self.held_out} held out of the training files"] if self.held_out else []
        return ", ".join(parts)


def reasons(gone: Mapping[str, Sequence[str]]) -> str:
    """How many rows left a split for each reason."""
    return ", ".join(f"{len(ids)} {why}" for why, ids in sorted(gone.items()))


def context(row: Example) -> str:
    """What the answer rests on: the source, after what user and assistant said before it.

    System messages do not count: conversations that share one are not alike for that.
    """
    return "\n".join([*(turn["content"] for turn in row.history if turn["role"] != "system"), row.source])


def plain(text: str) -> str:
    """A text without case, with single spaces, in the one form of all that read alike."""
    return " ".join(alike(text).split())


def filter_unwanted(split: Split, data: params.Data) -> None:
    """Take out the rows that `data.words` and `data.drop_copies` exclude."""
    split.remove(partial(_unwanted, data=data), split.filtered)


def _unwanted(row: Example, data: params.Data) -> str | None:
    lengths = len(words(row.source)), len(words(row.target))
    if not all(lengths):  # `clean` drops rows with an empty source or target
        return None
    if min(lengths) < data.words.min:
        return "too few words"
    if data.words.max is not None and max(lengths) > data.words.max:
        return "too many words"
    if data.drop_copies and canonical(row.source).split() == canonical(row.target).split():
        return "target equals source"
    return None


def hold_out(splits: Mapping[str, Split], holdout: params.Holdout) -> None:
    """Move the training rows with the lowest places in [0, 1) to test, and those with the highest to validation."""
    train = splits["train"]
    sides: dict[str, list[Example]] = {name: [] for name in splits}
    for row, place in zip(train.rows, places(train.rows), strict=True):
        side = "test" if place < holdout.test else "validation" if place >= 1 - holdout.validation else "train"
        sides[side].append(row)
    train.rows = sides["train"]
    for name in ("validation", "test"):
        splits[name].rows = [*splits[name].rows, *sides[name]]
        splits[name].held_out = len(sides[name])


def places(rows: Sequence[Example]) -> list[float]:
    """A number in [0, 1) for each row. Rows of one group, or with one source (as in `plain`), share theirs.

    It depends on the sources of the rows that share it alone, and not on other rows or on any order.
    """
    from scipy.cluster.hierarchy import DisjointSet

    together = DisjointSet()
    nodes, digests = [], []
    for row in rows:
        text = plain(context(row))
        node = ("group", canonical(row.group)) if row.group else ("text", text)
        together.add(node)
        if text:  # empty sources have nothing in common
            together.add(("text", text))
            together.merge(node, ("text", text))
        nodes.append(node)
        # Of the composed text: a row keeps its place though likeness also folds ligatures and full-width letters.
        composed = " ".join(canonical(context(row)).casefold().split())
        digests.append(hashlib.blake2b(composed.encode(), digest_size=16).digest())
    least: dict[tuple[str, str], bytes] = {}
    for node, digest in zip(nodes, digests, strict=True):
        least[together[node]] = min(digest, least.get(together[node], digest))
    # Comparing digests looks at their first halves. So the second half of the least is not biased towards low numbers.
    return [(int.from_bytes(least[together[node]][8:]) >> 11) / 2**53 for node in nodes]


def grouped(rows: Iterable[Example]) -> list[Example]:
    """Give each row without a group the group of its context, named after the first row that has it.

    A group whose name is written in several normal forms is one group, with the first row's form of the name.
    """
    first_with: dict[tuple[str, str], str] = {}

    def group(row: Example) -> str:
        if row.group:
            return first_with.setdefault(("group", canonical(row.group)), row.group)
        return first_with.setdefault(("context", canonical(context(row))), row.id)

    return [replace(row, group=group(row)) for row in rows]


def shared_groups(splits: Mapping[str, Split], shown: int) -> list[SharedGroups]:
    """The declared groups that lie in two splits, for each pair that has some, with the names of the first `shown`.

    Groups that were made here of equal sources are left out: `pipeline.prepare.leaks` compares the sources.
    """
    named: dict[str, dict[str, str]] = {}
    for name, split in splits.items():
        named[name] = {canonical(row.group): row.group for row in split.rows if row.id in split.declared}
    found = []
    for one, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        if both := [group for key, group in named[one].items() if key in named[other]]:
            groups = len({row.group for row in splits[one].rows})
            found.append(SharedGroups(one, other, len(both), groups, both[:shown]))
    return found


def merge(split: Split) -> None:
    """Make one example of all rows with one source and aspect: the first, with the targets of all as references."""
    alike: dict[tuple[str, ...], list[Example]] = {}
    for row in split.rows:
        usable = is_visible(row.source) and is_visible(row.target)
        key = (canonical(row.source), row.aspect, _said_before(row)) if usable else (row.id,)
        alike.setdefault(key, []).append(row)
    split.merged = len(split.rows) - len(alike)
    split.rows = [
        replace(rows[0], references=_different(text for row in rows for text in row.references))
        for rows in alike.values()
    ]


def _said_before(row: Example) -> str:
    """Who said what before the source, in a form that all histories have which read alike."""
    return canonical(repr([{name: message[name] for name in ("role", "content")} for message in row.history]))


def _different(texts: Iterable[str]) -> list[str]:
    """The texts, each once: the first of those with one canonical form."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(canonical(text), text)
    return list(first.values())


def limit(split: Split, most: int | None) -> None:
    """Keep the first groups, whole, whose rows together number at most `most`; UserError if the first has more."""
    if most is None or not split.rows:
        return
    sizes = Counter(row.group for row in split.rows)  # in the order of first appearance
    total = 0

    def fits(group: str) -> bool:
        nonlocal total
        total += sizes[group]
        return total <= most

    kept = set(takewhile(fits, sizes))
    if not kept:
        first = split.rows[0].group
        raise UserError(
            f"data.limits.{split.name} = {most}: the first group, {first}, has {sizes[first]} rows; allow as many"
        )
    split.rows = [row for row in split.rows if row.group in kept]


def clean(split: Split) -> None:
    """Drop rows with an empty source or target, and rows that repeat another."""
    seen: set[tuple[str, ...]] = set()

    def fault(row: Example) -> str | None:
        if not is_visible(row.source):
            return "empty source"
        if not is_visible(row.target):
            return "empty target"
        content = (canonical(row.source), row.aspect, canonical(row.target), _said_before(row))
        if content in seen:
            return "duplicate"
        seen.add(content)
        return None

    split.remove(fault, split.dropped)
