"""`claims/training.yaml`: the training runs behind claims, and the number of rows that each uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from pipeline.core import params, yaml12
from pipeline.core.errors import UserError
from pipeline.core.records import Example

T = TypeVar("T")

FILE = Path("claims/training.yaml")

Count = Annotated[int, Field(ge=1)]


class Rows(params.Section):
    """The most rows of each split; None: all."""

    train: Count | None
    validation: Count | None
    test: Count | None


class Cut(params.Section):
    train: Count
    validation: Count
    batch_size: Count
    watch_every: Count
    general_tokens: Count


class Adapter(params.Section):
    r: Count
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]


class Arm(params.Section):
    """One way of tuning: an adapter, or every weight (`lora` None); with `learning_rate` None nothing is tuned."""

    base: Literal["none", "nf4"]
    lora: Adapter | None
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None
    watch: bool

    @model_validator(mode="after")
    def parts_agree(self) -> Self:
        if self.learning_rate is None and (self.lora is not None or self.watch):
            raise ValueError("learning_rate is null, so nothing is trained: lora must be null and watch must be false")
        if self.learning_rate is not None and self.lora is None and self.base != "none":
            raise ValueError(
                "lora is null, so every weight is trained: base must be none, since quantized weights cannot be trained"
            )
        return self


class Training(params.Section):
    training_seeds: Annotated[list[int], Field(min_length=3)]
    tasks: dict[str, Rows]
    cut: Cut
    arms: dict[str, Arm]


def load(path: Path = FILE) -> Training:
    """Read the file; UserError lists every mistake."""
    return params.checked(Training, yaml12.read(path), str(path))


def one(declared: Mapping[str, T], name: str, key: str) -> T:
    """The declaration with a name; UserError if there is none."""
    if name not in declared:
        raise UserError(f"{FILE}: {key} has no {name}, but {', '.join(declared)}")
    return declared[name]


def spread(rows: Sequence[Example], count: int | None) -> list[Example]:
    """About `count` rows: whole groups, evenly spread over `rows`, in their order. All rows if `count` is None."""
    if count is None or count >= len(rows):
        return list(rows)
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    members = list(groups.values())
    number = max(1, round(count / len(rows) * len(members)))
    return [row for at in range(number) for row in members[at * len(members) // number]]
