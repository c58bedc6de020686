"""All checks, in the order of the stages that would find the same."""

from collections.abc import Callable
from typing import Any

from pipeline.check import base, place, rows
from pipeline.check.report import Report
from pipeline.core import params, paths, yaml12
from pipeline.core.errors import UserError
from pipeline.core.params import (
    Contamination,
    Data,
    Draft,
    Evaluate,
    Forget,
    Generation,
    Lora,
    Model,
    Prompt,
    Quantize,
    Runtime,
    Section,
    Tracking,
)
from pipeline.record import lockfile

PARTS: dict[Callable[[Draft, Report], None], tuple[type[Section], ...]] = {
    rows.examine: (Data, Prompt, Evaluate, Forget),
    base.examine: (Model, Quantize, Prompt, Lora, Forget, Contamination),
    place.examine: (Generation, Runtime, Evaluate, Tracking),
}
"""Each check that looks beyond the file, with the sections that decide its outcome."""


def require_sound() -> None:
    """Check `params.yaml`, and `dvc.lock` if there is one, and print what was checked.

    UserError with every mistake: in the file itself, and against data, model and machine as far as they are at hand.
    """
    report = Report()
    draft = params.draft(yaml12.read(paths.PARAMS), str(paths.PARAMS))
    report.problems += [f"{paths.PARAMS}: {problem}" for problem in draft.problems]
    report.seen.append(str(paths.PARAMS))
    if paths.DVC_LOCK.exists():
        with report.part():
            lockfile.stages_of(lockfile.text(paths.DVC_LOCK), str(paths.DVC_LOCK))
            report.seen.append(str(paths.DVC_LOCK))
    for examine in PARTS:
        examine(draft, report)
    report.close()


class Examiner:
    """Checks many experiments that differ in some parameters. What they share is looked at once."""

    def __init__(self) -> None:
        self.known: dict[Any, list[str]] = {}

    def problems(self, content: Any, name: str) -> list[str]:
        """Every mistake of the experiment that a params file's `content` describes; `name` as of `params.draft`."""
        try:
            draft = params.draft(content, name)
        except UserError as error:
            return error.problems
        found = list(draft.problems)
        for examine, sections in PARTS.items():
            given = [draft.get(section) for section in sections]
            key = (examine, *(one and one.model_dump_json() for one in given))
            if key not in self.known:
                report = Report()
                examine(draft, report)
                self.known[key] = report.problems
            found += self.known[key]
        return found
