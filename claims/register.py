"""`claims/claims.yaml`: what papers claim, how each claim is checked here, and how evidence leads to a verdict.

A claim is reproduced if all its conditions hold. Conditions stand in the register, not in code, and name measured
values. Thresholds are fixed before the measurement; `amended` says what was changed afterwards. A condition on a value
with an interval, or on one value for each training seed, can hold, fail, or be undecided.
"""

import argparse
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from claims.evidence import Evidence, Value, numbers
from pipeline.commands.use import Needs
from pipeline.core import params, yaml12
from pipeline.core.errors import UserError, listing
from pipeline.score.significance import Interval

FILE = Path("claims/claims.yaml")

Kind = Literal["EXACT", "SAME", "DIR", "PROXY", "FULL"]
Verdict = Literal["reproduced", "not reproduced", "inconclusive", "not run", "not comparable at this scale"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Text = Annotated[str, Field(min_length=1)]

COMPARISONS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
    "at_least": ("≥", operator.ge),
    "at_most": ("≤", operator.le),
}


class Condition(params.Section):
    """`value` is the name of a measured value. Exactly one of the other keys compares it with a number, with another
    measured value by name, or with a published figure (`published.<name>`).

    `within` goes with `equals`: the largest absolute difference. Without it, both must be equal to the last bit.
    """

    value: Text
    equals: float | str | None = None
    within: Annotated[float, Field(ge=0)] = 0.0
    above: float | str | None = None
    below: float | str | None = None
    at_least: float | str | None = None
    at_most: float | str | None = None

    @model_validator(mode="after")
    def says_one_thing(self) -> Self:
        said = [name for name in ("equals", *COMPARISONS) if getattr(self, name) is not None]
        if len(said) != 1:
            raise ValueError(f"must have exactly one of equals, {', '.join(COMPARISONS)}, and has {len(said)}")
        if self.within and self.equals is None:
            raise ValueError("within goes with equals")
        if self.value.startswith("published."):
            raise ValueError(f"{self.value} is not measured: a condition's value must be")
        if self.other == self.value:
            raise ValueError(f"{self.value} is compared with itself")
        return self

    @property
    def relation(self) -> str:
        return next(name for name in ("equals", *COMPARISONS) if getattr(self, name) is not None)

    @property
    def other(self) -> float | str:
        """The number, or the name of the value, that the value is compared with."""
        other: float | str = getattr(self, self.relation)
        return other


class Claim(params.Section):
    """`published`: the paper's figures by name. `distance`: how far the check is from the paper's setting. `amended`:
    what was changed in the claim and its conditions after the first measurement, if anything was."""

    kind: Kind
    claim: Text
    paper: Text
    place: Text
    published: dict[str, float]
    check: Text
    distance: Text | None
    amended: Text | None = None
    reproduced_when: Annotated[list[Condition], Field(min_length=1)]
    needs: Needs
    recipe: str | None

    @model_validator(mode="after")
    def scaled_down_checks_say_so(self) -> Self:
        if self.kind != "EXACT" and self.distance is None:
            raise ValueError(f"distance must say how far a check of kind {self.kind} is from the paper's setting")
        if self.recipe is not None and self.kind != "FULL":
            raise ValueError("a recipe belongs to kind FULL")
        return self

    @model_validator(mode="after")
    def published_figures_are_there(self) -> Self:
        names = [str(condition.other) for condition in self.reproduced_when]
        known = {f"published.{name}" for name in self.published}
        missing = [name for name in names if name.startswith("published.") and name not in known]
        if missing:
            raise ValueError(f"conditions name {', '.join(missing)}, which published does not hold")
        return self


class Register(params.Section):
    claims: Annotated[dict[str, Claim], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Finding:
    """One condition after the measurement: in words, and whether it holds (None: undecided)."""

    text: str
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Judgment:
    verdict: Verdict
    findings: list[Finding]


def load(path: Path = FILE) -> dict[str, Claim]:
    """All claims by id, in the register's order; UserError lists every mistake."""
    return params.checked(Register, yaml12.read(path), str(path)).claims


def one(name: str, path: Path = FILE) -> Claim:
    """The claim with the id `name`; UserError if there is none."""
    claims = load(path)
    if name not in claims:
        raise UserError(f"{path}: there is no claim {name}, but {', '.join(claims)}")
    return claims[name]


def judge(claim: Claim, evidence: Evidence) -> Judgment:
    """The verdict on a claim. UserError if a condition names a value that was not measured."""
    if evidence.not_run is not None:
        return Judgment("not run", [])
    values: dict[str, Value] = {**evidence.values, **{f"published.{k}": v for k, v in claim.published.items()}}
    named = [name for one in claim.reproduced_when for name in (one.value, one.other) if isinstance(name, str)]
    if unknown := sorted(set(named) - set(values)):
        raise listing([*unknown, f"there are {', '.join(values)}"], f"{FILE}: conditions name what was not measured:")
    findings = [_finding(condition, values) for condition in claim.reproduced_when]
    if evidence.not_comparable is not None:
        return Judgment("not comparable at this scale", findings)
    held = [finding.holds for finding in findings]
    if False in held:
        return Judgment("not reproduced", findings)
    return Judgment("inconclusive" if None in held else "reproduced", findings)


def _finding(condition: Condition, values: Mapping[str, Value]) -> Finding:
    here = values[condition.value]
    there: Value = values[condition.other] if isinstance(condition.other, str) else condition.other
    name = f"{condition.other} ({shown(there)})" if isinstance(condition.other, str) else shown(there)
    counts = [len(_ends(value)) for value in (here, there)]
    if min(counts) > 1:
        if isinstance(here, Interval) or isinstance(there, Interval):
            raise UserError(
                f"{FILE}: {condition.value} is compared with {condition.other}, but an interval can be compared with "
                "one number alone: measure their difference instead"
            )
        if counts[0] != counts[1]:
            raise UserError(f"{FILE}: {condition.value} has {counts[0]} values and {condition.other} {counts[1]}")
    if condition.relation == "equals":
        sign = "=" if not condition.within else f"within {condition.within:g} of"
        # Each side is compared by itself: an interval that crosses both bounds must not count as outside.
        sides = {
            _agreed(here, there, lambda one, other: one - other >= -condition.within),
            _agreed(here, there, lambda one, other: one - other <= condition.within),
        }
        holds = next((side for side in (False, None) if side in sides), True)
    else:
        sign, compare = COMPARISONS[condition.relation]
        holds = _agreed(here, there, compare)
    return Finding(f"{condition.value} ({shown(here)}) {sign} {name}", holds)


def _agreed(here: Value, there: Value, compare: Callable[[float, float], bool]) -> bool | None:
    """Whether a comparison holds at both ends of an interval, or for all seeds; None if it holds for some of them."""
    one, other = (_ends(value) for value in (here, there))
    count = max(len(one), len(other))
    held = {compare(*pair) for pair in zip(one * (count // len(one)), other * (count // len(other)), strict=True)}
    return held.pop() if len(held) == 1 else None


def _ends(value: Value) -> list[float]:
    """The numbers for which a comparison must hold."""
    return [value.low, value.high] if isinstance(value, Interval) else numbers(value)


def shown(value: Value) -> str:
    """A value for readers: at least four significant figures, and all digits of whole numbers."""
    if isinstance(value, Interval):
        return f"{_number(value.value)}, {_number(value.low)} to {_number(value.high)}"
    return ", ".join(map(_number, numbers(value)))


def _number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.1f}"


def main() -> None:
    """Print DVC's targets for the claims of one kind."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=get_args(Kind))
    kind = parser.parse_args().kind
    print(" ".join(f"claims/dvc.yaml:claim@{name}" for name, claim in load().items() if claim.kind == kind))


if __name__ == "__main__":
    main()
