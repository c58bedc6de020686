"""What an MLflow run holds: as it is gathered before it is written (`Record`), and as the store lists it (`Stored`)."""

import json
import math
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError, listing
from pipeline.record import provenance

# Tags
DIGEST = "dvc.digest"
TRIAL = "trial.digest"
"""Instead of `DIGEST` in the run of a sweep's trial, which was trained and validated, never tested."""
CLAIM = "claim.digest"
"""Instead of `DIGEST` in the run of a checked claim."""
SWEEP, WINNER = "sweep", "sweep.winner"
"""The sweeps that a trial belongs to, and those that a complete experiment won."""
EXPERIMENTS = "dvc.experiments"
COMMITS = "dvc.commits"
TEST = "test_sha256"
"""The digest of the rows that an experiment was scored on (`contracts.Scores`)."""
SPLIT = "split"
"""The split that these rows are: test or validation."""
ANSWERS, RULE = "answers.digest", "rule.digest"
"""What answers the split, and by which rule that is judged (`identity.answers`, `identity.rule`)."""
NOTE = "mlflow.note.content"
COMMIT = "mlflow.source.git.commit"

FINISHED = "FINISHED"
"""The status of a run that is complete."""

# MLflow's stores refuse longer values.
MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 8000, 250


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a metric; `step` is 0 for a metric without a curve."""

    name: str
    value: float
    step: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that goes into a run; `files` are pairs of a path and the folder in the run (None: its root).

    UserError for a metric that MLflow cannot hold.
    """

    name: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: list[Point]
    predictions: dict[str, list[Any]]
    files: list[tuple[Path, str | None]]

    def __post_init__(self) -> None:
        _check(self.metrics)

    @property
    def key(self) -> str:
        """The tag that holds the digest: of a complete experiment, of a trial, or of a claim."""
        return next((key for key in (TRIAL, CLAIM) if key in self.tags), DIGEST)

    @property
    def digest(self) -> str:
        return self.tags[self.key]


@dataclass(frozen=True, slots=True)
class Stored:
    """A run as the store lists it, with the last value of each metric."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]

    @classmethod
    def of(cls, run: Any) -> "Stored":
        """An MLflow run, with texts that cannot begin a line; UserError for an id that MLflow would not make."""
        run_id, tags = run.info.run_id, {key: in_line(value) for key, value in run.data.tags.items()}
        if not is_run_id(run_id):
            raise UserError(f"the MLflow store lists a run with the id {run_id!r}, but MLflow makes no such ids")
        name, status = in_line(run.info.run_name), in_line(run.info.status)
        return cls(run_id, name, status, tags, dict(run.data.params), dict(run.data.metrics))

    def __str__(self) -> str:
        return f"run {self.name} ({self.run_id})"

    @property
    def finished(self) -> bool:
        """Whether everything is in it: a run that was interrupted is never finished."""
        return self.status == FINISHED

    @property
    def seeds(self) -> list[int]:
        """The training seeds, which name files in the run; UserError if they are not whole numbers."""
        try:
            seeds = json.loads(self.params.get("seeds", "[]"))
        except ValueError:
            seeds = None
        if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
            raise UserError(f"{self} cannot be read: its seeds are not a list of whole numbers")
        return seeds


def is_run_id(text: str) -> bool:
    """Whether a text has the form of MLflow's ids of runs."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def in_line(text: str) -> str:
    """A text of a store without line breaks, so that it cannot pass for a line of ours."""
    return " ".join(text.splitlines())


def surroundings() -> dict[str, str]:
    """Tags for the machine and the versions of packages with which a record was made."""
    machine = {f"machine.{name}": str(fact) for name, fact in provenance.platform_facts().items()}
    return machine | {f"version.{package}": version for package, version in provenance.versions().items()}


def cut(value: str, whole: str) -> str:
    """A parameter, shortened to MLflow's limit; `whole` names the artifact that holds all of it."""
    mark = f" ... (cut: see {whole})"
    return value if len(value) <= MAX_PARAM else value[: MAX_PARAM - len(mark)] + mark


def of_digest(digest: str, runs: Sequence[Stored]) -> list[Stored]:
    """The finished runs of the experiment with this digest, in the order of `runs`."""
    return [run for run in runs if run.finished and run.tags.get(DIGEST) == digest]


def _check(metrics: list[Point]) -> None:
    """UserError for names and values that MLflow refuses or changes: it stores infinity as 1.8e308."""
    problems = {
        f"{point.name!r} is not a metric's name: letters, digits, and _ - . / only"
        for point in metrics
        if not re.fullmatch(r"[\w\-./]+", point.name)
        or posixpath.normpath(point.name) != point.name
        or point.name.startswith(("/", ".."))
        or len(point.name) > MAX_KEY
    }
    problems |= {
        f"{point.name} = {point.value} at step {point.step}" for point in metrics if not math.isfinite(point.value)
    }
    if problems:
        raise listing(sorted(problems), "MLflow cannot hold these metrics:")
