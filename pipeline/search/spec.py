"""The file that declares a search: its schema, and the checks before anything runs.

sweeps/example.yaml explains each key.
"""

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.core import params, paths, yaml12
from pipeline.core.errors import UserError, listing

SECTIONS = ("lora", "train")
"""The sections that a search may change. Others change the base or the text that validation losses are taken on, so
that losses could not be compared."""

Scalar = bool | int | float | str | None
Value = Scalar | list[str]


class Parameter(params.Section):
    """The values of one parameter: one of `choices`, or a number from `low` to `high`.

    With `log`, numbers are drawn evenly in their logarithm. If both ends are whole numbers, all drawn ones are.
    """

    choices: Annotated[list[Value], Field(min_length=1)] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool | None = None

    @model_validator(mode="after")
    def one_kind(self) -> Self:
        ends = (self.low, self.high, self.log)
        if (self.choices is None) == (ends == (None, None, None)) or (self.choices is None and None in ends):
            raise ValueError("give either choices: [<value>, <value>, ...], or low:, high: and log: true or false")
        if self.choices is not None and len({json.dumps(value) for value in self.choices}) < len(self.choices):
            raise ValueError("choices must differ")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low = {self.low} must be below high = {self.high}")
            if self.log and self.low <= 0:
                raise ValueError(f"low = {self.low} must be above 0 with log: true")
        return self

    @property
    def ends(self) -> list[Value]:
        """The values that are checked before anything runs."""
        return self.choices if self.choices is not None else [self.low, self.high]

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest number of a parameter without choices."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def count(self) -> float:
        """How many values there are; infinite for a range of fractions."""
        if self.choices is not None:
            return len(self.choices)
        low, high = self.range
        return high - low + 1 if self.whole else math.inf


class Pruner(params.Section):
    """A trial ends early if its best loss so far is not among the best `keep` % that complete trials had by then.

    No trial ends before validation number `after`; number 0 is the one before training.
    """

    keep: Annotated[int | float, Field(gt=0, lt=100)]
    after: Annotated[int, Field(ge=1)]


class Cluster(params.Section):
    """What one trial takes of a Ray node, and the node's folder for clones and the DVC cache."""

    cpus: Annotated[int | float, Field(gt=0)]
    gpus: Annotated[int | float, Field(ge=0)]
    folder: Annotated[str, Field(pattern=r"^[/~]")]


class Search(params.Section):
    """The whole file; sweeps/example.yaml explains it key by key."""

    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    sampler: Literal["grid", "random", "tpe"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    trials: Annotated[int, Field(ge=1, le=100_000)] | None
    at_once: Annotated[int, Field(ge=1, le=10_000)]
    startup: Annotated[int, Field(ge=1)] | None
    pruner: Pruner | None
    cluster: Cluster | None

    @model_validator(mode="after")
    def parts_agree(self) -> Self:
        ranges = [name for name, parameter in self.parameters.items() if parameter.choices is None]
        count = math.prod(parameter.count for parameter in self.parameters.values())
        problems = []
        if self.sampler == "grid" and ranges:
            problems.append(f"a grid needs choices for {', '.join(ranges)}: it cannot try every value of a range")
        if self.trials is None and self.sampler != "grid":
            problems.append(f"trials must be a number with sampler {self.sampler}; null means the whole grid")
        if self.trials is not None and self.trials > count:
            problems.append(f"trials = {self.trials} is more than there are combinations, {count:.0f}")
        if (self.startup is None) == (self.sampler == "tpe" or self.pruner is not None):
            problems.append(
                "startup is read by sampler tpe and by a pruner: give a number with either of them, else null"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def total(self) -> int:
        """How many trials there are."""
        return self.trials or math.prod(int(parameter.count) for parameter in self.parameters.values())


def load(path: Path) -> Search:
    """Read and check the file of a search; UserError lists every mistake."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: name the file of a search, such as sweeps/example.yaml")
    require_name(path)
    return params.checked(Search, yaml12.read(path), str(path))


def check(plan: Search, path: Path) -> params.Params:
    """Check every choice and both ends of every range against the schema of `params.yaml`.

    Returns the project's parameters with the search's seeds. UserError lists every mistake; `path` heads it.
    """
    content = params.load().model_dump(mode="json") | {"seeds": plan.seeds}
    problems: dict[str, None] = {}
    for name, parameter in plan.parameters.items():
        section, _, key = name.partition(".")
        if section not in SECTIONS:
            ours = " and ".join(f"{one}.*" for one in SECTIONS)
            problems[f"{name}: a search changes {ours} only, so that all losses are of one base on one text"] = None
        elif key not in content[section]:
            problems[f"{name}: there is no such parameter; known here: {', '.join(content[section])}"] = None
        else:
            for value in parameter.ends:
                try:
                    params.check(replaced(content, {name: value}), str(path))
                except UserError as error:
                    problems |= dict.fromkeys(error.problems)
    often = content["train"]["epochs"] > 1 or content["train"]["validate_every"]
    if plan.pruner and not often and not {"train.epochs", "train.validate_every"} & plan.parameters.keys():
        problems["pruner: training validates at its beginning and its end only, so there is nothing to prune by: set "
                 "train.validate_every, or pruner to null"] = None  # fmt: skip
    if problems:
        raise listing(problems, f"{path}: nothing was run:")
    return params.check(content, str(paths.PARAMS))


def replaced(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the parameters `content` with `values`, by dotted name, in place of its own."""
    changed = copy.deepcopy(dict(content))
    for name, value in values.items():
        *sections, key = name.split(".")
        inner = changed
        for section in sections:
            inner = inner[section]
        inner[key] = value
    return changed


def require_name(path: Path) -> None:
    """UserError unless experiments can be named after the file `path`."""
    if not is_name(path.stem):
        raise UserError(f"{path}: experiments are named after the file, so use letters, digits, - and _ only")


def is_name(text: str) -> bool:
    """Whether a text can be a part of an experiment's name."""
    return re.fullmatch(r"[A-Za-z0-9][\w\-]*", text) is not None
