"""Reference lines: texts made without doing the task, scored on the same rows as base and tuned.

A score means little unless it is ahead of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TypeVar

import numpy as np

from pipeline.core import params
from pipeline.core.records import Example
from pipeline.core.text import canonical, words
from pipeline.score import metrics

Item = TypeVar("Item")

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


CANDIDATES, AGAINST = 200, 5000
"""Of an aspect's training targets, so many are tried as the constant text at most, and all aspects together are held
against so many rows."""


def texts(
    test: Sequence[Example], base: Sequence[Sequence[str]], training: Sequence[Example], evaluate: params.Evaluate
) -> list[Texts]:
    """The texts of each reference line, for the test split, base's outputs, and the training split.

    - constant: for each aspect, the one training target that shares most words with the others (`constants`): what a
      model can write that has read no source.
    - lead: the first sentence of the source. In translation (if `evaluate.metrics` has chrF or BLEU) it is copy
      instead: the whole source. There is no lead where `lead_is_source` is `NEARLY_ALL` or more.
    - wrong_aspect: the references of the group's other aspects, whose scores are averaged. They are on topic and well
      written, but answer another question. In a group with more than `MOST_OTHERS` of them, the first ones count.
    - base_cut: base's output, cut to the number of words of its reference. No real system knows that length, so a gain
      over this line is more than a better length.
    """
    longer = [len(words(text)) > len(words(row.target)) for some, row in zip(base, test, strict=True) for text in some]
    if is_translation(evaluate.metrics):
        first = [Texts("copy", "Copy", "the source as it is", [[row.source] for row in test])]
    elif lead_is_source(test) >= NEARLY_ALL:
        first = []
    else:
        first = [Texts("lead", "Lead", "the first sentence of the source", [[row.lead] for row in test])]
    constant = constants(training, evaluate)
    return [
        Texts(
            "constant",
            "Constant",
            "one training target for all sources" + (" of an aspect" if len(constant) > 1 else ""),
            [[constant[row.aspect]] if row.aspect in constant else [] for row in test],
        ),
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
            f"({100 * sum(longer) / len(longer):.0f} % of them were longer)",
            [[cut(text, row.target) for text in some] for some, row in zip(base, test, strict=True)],
        ),
    ]


def constants(training: Sequence[Example], evaluate: params.Evaluate) -> dict[str, str]:
    """For each aspect, the training target with the highest mean F1 of shared words with the aspect's targets.

    Words are those of the first of `evaluate.metrics`. At most `CANDIDATES` targets are tried, and held against the
    aspect's share of `AGAINST` rows; of more, evenly spread ones are.
    """
    of_aspect: dict[str, list[str]] = {}
    for row in training:
        of_aspect.setdefault(row.aspect, []).append(row.target)
    tokenize = metrics.tokenizers(evaluate.metrics[0], evaluate)[1]
    return {
        aspect: _most_shared(
            [Counter(tokenize(text)) for text in spread(targets, CANDIDATES)],
            [Counter(tokenize(text)) for text in spread(targets, max(20, AGAINST // len(of_aspect)))],
            spread(targets, CANDIDATES),
        )
        for aspect, targets in of_aspect.items()
    }


def _most_shared(candidates: Sequence[Counter[str]], rows: Sequence[Counter[str]], texts: Sequence[str]) -> str:
    """The text of the candidate with the highest mean F1 of shared words with the rows; the first one of equals."""
    number = {word: i for i, word in enumerate(dict.fromkeys(word for counts in rows for word in counts))}
    counts_rxw = np.zeros((len(rows), len(number)), np.int32)
    for i, counts in enumerate(rows):
        counts_rxw[i, [number[word] for word in counts]] = list(counts.values())
    lengths_r = counts_rxw.sum(axis=1)
    f1 = []
    for counts in candidates:
        known = [word for word in counts if word in number]
        shared_r = np.minimum(counts_rxw[:, [number[word] for word in known]], [counts[word] for word in known])
        f1.append(np.mean(2 * shared_r.sum(axis=1) / np.maximum(lengths_r + counts.total(), 1)))
    return texts[int(np.argmax(f1))]


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """All items, or `most` of them, evenly spread."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


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
