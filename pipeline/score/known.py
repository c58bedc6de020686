"""What training knows of the test split, although no test source stands in training (`pipeline.prepare.leaks`).

Neither is an error, since data may be so by its nature. The report counts them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core.records import Example
from pipeline.core.text import alike, runs, words

LONG = 8
"""An answer of so many words is no label that many rows share; a source of fewer has no shingle for the leak guard."""


@dataclass(frozen=True, slots=True)
class Known:
    """Test rows with a long answer that is a training answer too, and with a short source that is one but for numbers.

    Long are `LONG` words or more, short are fewer.
    """

    answers: int
    sources: int


def counted(test: Sequence[Example], training: Sequence[Example]) -> Known:
    """Compare both splits. Texts are compared by their words, without case."""
    answers = {_words(row.target) for row in training}
    sources = {_masked(row.source) for row in training}
    return Known(
        sum(any(len(words(text)) >= LONG and _words(text) in answers for text in row.references) for row in test),
        sum(len(words(row.source)) < LONG and _masked(row.source) in sources for row in test),
    )


def _words(text: str) -> str:
    return " ".join(runs(alike(text)))


def _masked(text: str) -> str:
    return re.sub(r"\d+", "0", _words(text))
