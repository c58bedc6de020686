"""Looks at the test split: the experiments in the store that were scored on it, in the order in which they came.

Whoever keeps the best of many experiments has chosen by the test split, and its score is too high. So the looks are
counted and told, and the j-th look may spend no more than `level` of the significance: the levels of all looks add up
to that of one test, whichever of them is chosen (alpha spending; Lan and DeMets 1983; Foster and Stine 2008).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.record import store
from pipeline.record.runs import DIGEST, TEST, Stored


@dataclass(frozen=True, slots=True)
class Looks:
    """The place of an experiment among the `total` experiments that were scored on a test split, from 1 on.

    `unknown` of them were recorded by a version that did not write down what they were scored on. They count.
    """

    place: int
    total: int
    unknown: int

    def told(self) -> str:
        """One or two sentences for people."""
        if self.total == 1:
            return "The test split has been looked at once, by this experiment."
        text = f"The test split has been looked at {self.total:,} times: so many experiments here were scored on it."
        if self.unknown:
            text += f" For {self.unknown:,} of them, which are older, that is assumed."
        return text


def among(runs: Sequence[Stored], digest: str, test_sha256: str) -> Looks:
    """The looks at a test split among stored runs (the oldest first), and the place of one experiment.

    An experiment that was recorded twice counts once. One that is not recorded yet comes last.
    """
    tests = _scored(runs, test_sha256)
    tests.setdefault(digest, test_sha256)
    unknown = sum(test is None for one, test in tests.items() if one != digest)
    return Looks(list(tests).index(digest) + 1, len(tests), unknown)


def total(test_sha256: str, tracking: params.Tracking) -> int:
    """The number of experiments in the store that were scored on a test split; 0 if the store cannot be used."""
    try:
        return len(_scored(store.stored(tracking), test_sha256))
    except UserError:
        return 0


def _scored(runs: Sequence[Stored], test_sha256: str) -> dict[str, str | None]:
    """The experiments that were scored on this test split, by digest, the oldest first; None where it is assumed."""
    tests: dict[str, str | None] = {}
    for run in runs:
        if run.finished:
            tests.setdefault(run.tags[DIGEST], run.tags.get(TEST))
    return {one: test for one, test in tests.items() if test in (None, test_sha256)}


def read(digest: str, test_sha256: str, tracking: params.Tracking) -> Looks | None:
    """As `among`, from the store; None if the store cannot be used, which is told elsewhere."""
    try:
        return among(store.stored(tracking), digest, test_sha256)
    except UserError:
        return None


def level(place: int, confidence: float) -> float:
    """The confidence that the look at this place needs: 1 - alpha / (j (j + 1)), whose alphas add up to alpha."""
    return 1 - (1 - confidence) / (place * (place + 1))
