"""Reference lines: texts made without doing the task, scored on the same rows as base and tuned.

A score means little unless it is ahead of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from pipeline.core.records import Example
from pipeline.core.text import canonical, words

MOST_OTHERS = 20
"""References of other aspects that a row is compared with at most. A group of n rows would have n² of them."""


NEARLY_ALL = 0.95
"""From this share of sources that are one sentence, their lead is the whole source, and no line of its own."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one reference line: for each row none, one or several."""

    key: str
    label: str
    about: str
    texts: list[list[str]]


def texts(test: Sequence[Example], base: Sequence[str], metrics: Sequence[str]) -> list[Texts]:
    """The texts of each reference line, for the test split and base's outputs.

    - lead: the first sentence of the source. In translation (if `metrics` has chrF or BLEU) it is copy instead: the
      whole source. There is no lead where `lead_is_source` is `NEARLY_ALL` or more.
    - wrong_aspect: the references of the group's other aspects, whose scores are averaged. They are on topic and well
      written, but answer another question. In a group with more than `MOST_OTHERS` of them, the first ones count.
    - base_cut: base's output, cut to the number of words of its reference. No real system knows that length, so a gain
      over this line is more than a better length.
    """
    n_cut = sum(len(words(text)) > len(words(row.target)) for text, row in zip(base, test, strict=True))
    if is_translation(metrics):
        first = [Texts("copy", "Copy", "the source as it is", [[row.source] for row in test])]
    elif lead_is_source(test) >= NEARLY_ALL:
        first = []
    else:
        first = [Texts("lead", "Lead", "the first sentence of the source", [[row.lead] for row in test])]
    return [
        *first,
        Texts(
            "wrong_aspect",
            "Wrong aspect",
            "the references of the same source's other aspects, averaged",
            _of_other_aspects(test),
        ),
        Texts(
            "base_cut",
            "Base, cut",
            "base's outputs, each cut to the word count of its own reference "
            f"({100 * n_cut / len(test):.0f} % of them were longer)",
            [[cut(text, row.target)] for text, row in zip(base, test, strict=True)],
        ),
    ]


def is_translation(metrics: Sequence[str]) -> bool:
    """Whether the task counts as translation, by its metrics."""
    return bool({"chrf", "bleu"} & set(metrics))


def lead_is_source(test: Sequence[Example]) -> float:
    """The share of rows whose source has no second sentence."""
    whole = sum(canonical(row.lead).split() == canonical(row.source).split() for row in test)
    return whole / max(1, len(test))


def _of_other_aspects(test: Sequence[Example]) -> list[list[str]]:
    """For each row, the targets of the first `MOST_OTHERS` rows of its group with another aspect."""
    members: dict[str, list[Example]] = {}
    for row in test:
        members.setdefault(row.group, []).append(row)

    @cache
    def others(group: str, aspect: str) -> list[str]:
        return list(islice((row.target for row in members[group] if row.aspect != aspect), MOST_OTHERS))

    return [others(row.group, row.aspect) for row in test]


def cut(text: str, reference: str) -> str:
    """The first words of `text`, as many as `reference` has."""
    return " ".join(words(text)[: len(words(reference))])
