"""Looks at a split: the experiments in the store that were scored on it, in the order in which they came.

Whoever keeps the best of many experiments has chosen by the split, and its score is too high. So the looks are counted
and told, and the j-th look may spend no more than `level` of the significance: the levels of all looks add up to that
of one test, whichever of them is chosen (alpha spending; Lan and DeMets 1983; Foster and Stine 2008).

The same answers under the same rule of the decision are one look, however often their report was made anew. The same
answers under another rule are another look: whoever saw them may have chosen the rule by them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.record import store
from pipeline.record.runs import ANSWERS, DIGEST, RULE, SPLIT, TEST, Stored


@dataclass(frozen=True, slots=True)
class Look:
    """An experiment that was scored: its digest, `test_sha256` of its scores, its split, and what it stands for.

    `answers` and `rule` are digests as of `identity`; they and the others are None in runs of an older version.
    """

    digest: str
    test_sha256: str | None
    split: str
    answers: str | None
    rule: str | None

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> "Look":
        """The look that a run with these tags is."""
        return cls(tags[DIGEST], tags.get(TEST), tags.get(SPLIT, "test"), tags.get(ANSWERS), tags.get(RULE))

    @property
    def key(self) -> tuple[str | None, ...]:
        """Equal for looks that count once."""
        return (self.digest,) if self.answers is None or self.rule is None else (self.answers, self.rule)


@dataclass(frozen=True, slots=True)
class Looks:
    """The place of an experiment among the `total` experiments that were scored on a split, from 1 on.

    `unknown` of them were recorded by a version that did not write down what they were scored on. They count.
    `rules` is the number of other rules under which the same answers were scored earlier. `fixed` says whether the rule
    was recorded with the same adapters on the validation split, and no model had answered this split then.
    """

    place: int
    total: int
    unknown: int
    split: str = "test"
    rules: int = 0
    fixed: bool = False

    def told(self) -> str:
        """One to four sentences for people."""
        split = f"The {self.split} split has been looked at"
        if self.total == 1:
            text = f"{split} once, by this experiment."
        else:
            text = f"{split} {self.total:,} times: so many experiments here were scored on it."
        if self.unknown:
            text += f" For {self.unknown:,} of them, which are older, that is assumed."
        if self.rules:
            text += (
                f" The same answers were scored before under {self.rules:,} other rule{'s' if self.rules > 1 else ''} "
                "of decision (metrics, confidence, margin): that rule may have been chosen by the result."
            )
        if self.fixed:
            text += " The rule of the decision was recorded before this experiment answered the split."
        return text


def among(runs: Sequence[Stored], own: Look) -> Looks:
    """The looks at the split of `own` among stored runs (the oldest first), and the place of `own` among them.

    One that is not recorded yet comes last.
    """
    found = _scored(runs, own.test_sha256)
    first = found.setdefault(own.key, own)
    unknown = sum(one.test_sha256 is None for key, one in found.items() if key != own.key)
    place = list(found).index(own.key) + 1
    earlier = list(found.values())[: place - 1]
    rules = {one.rule for one in earlier if one.answers == own.answers is not None}
    fixed = own.split == "test" and not rules and _chosen_before(runs, first)
    return Looks(place, len(found), unknown, own.split, len(rules), fixed)


def tested(runs: Sequence[Stored], answers: str) -> Stored | None:
    """The first finished run in which these answers were scored on the test split; None if there is none."""
    return next((run for run in runs if _is(run, "test", answers)), None)


def total(test_sha256: str, tracking: params.Tracking) -> int:
    """The number of experiments in the store that were scored on a split; 0 if the store cannot be used."""
    try:
        return len(_scored(store.stored(tracking), test_sha256))
    except UserError:
        return 0


def read(own: Look, tracking: params.Tracking) -> Looks | None:
    """As `among`, from the store; None if the store cannot be used, which is told elsewhere."""
    try:
        return among(store.stored(tracking), own)
    except UserError:
        return None


def level(place: int, confidence: float) -> float:
    """The confidence that the look at this place needs: 1 - alpha / (j (j + 1)), whose alphas add up to alpha."""
    return 1 - (1 - confidence) / (place * (place + 1))


def _scored(runs: Sequence[Stored], test_sha256: str | None) -> dict[tuple[str | None, ...], Look]:
    """The experiments that were scored on this split, the oldest first; where that is not written down it is assumed.

    An experiment of an older version that was recorded again is found by its digest.
    """
    looks: dict[tuple[str | None, ...], Look] = {}
    digests: set[str] = set()
    for run in runs:
        if run.finished:
            one = Look.of(run.tags)
            if one.test_sha256 in (None, test_sha256) and one.digest not in digests:
                digests.add(one.digest)
                looks.setdefault(one.key, one)
    return looks


def _chosen_before(runs: Sequence[Stored], own: Look) -> bool:
    """Whether the same answers came on the validation split first, under the same rule, and then on the test split."""
    for run in runs:
        if own.answers is None or _is(run, "test", own.answers):
            return False
        if _is(run, "validation", own.answers) and run.tags.get(RULE) == own.rule:
            return True
    return False


def _is(run: Stored, split: str, answers: str) -> bool:
    return run.finished and run.tags.get(SPLIT) == split and run.tags.get(ANSWERS) == answers
