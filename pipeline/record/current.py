"""Whether what lies in the working directory is what `dvc.lock` has: outputs and inputs, by content."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import paths, records
from pipeline.core.errors import UserError, listing
from pipeline.record import lockfile, store


@dataclass(frozen=True, slots=True)
class Finding:
    """One disagreement: where, what is wrong there, and the command that mends it."""

    place: str
    wrong: str
    remedy: str


@dataclass(slots=True)
class Outcome:
    """Of one check: what was compared, and what disagrees."""

    name: str
    compared: str = ""
    findings: list[Finding] = field(default_factory=list)

    def find(self, place: object, wrong: str, remedy: str) -> None:
        self.findings.append(Finding(store.in_line(str(place)), wrong, remedy))


def require_current(headline: str) -> None:
    """UserError, begun by `headline`, where an output is not what `dvc.lock` has, or a stage would run again."""
    if not paths.DVC_LOCK.is_file():
        raise UserError(f"{paths.DVC_LOCK} is missing: run `dvc repro`, which makes it")
    project = lockfile.read()
    found = [*outputs(project).findings, *pipeline(project).findings]
    if found:
        raise listing([f"{one.place}: {one.wrong} (mend: {one.remedy})" for one in found], headline)


def outputs(project: lockfile.Project) -> Outcome:
    """Every output in the working directory against `dvc.lock`, by content."""
    outcome = Outcome("outputs")
    outs = project.outs()
    for out in outs:
        actual, path = project.md5(out.path), shlex.quote(str(out.path))
        if actual == out.md5:
            continue
        if not out.cached:
            remedy = f"dvc repro --force --single-item {out.stage}"
        elif actual is None:
            remedy = f"dvc checkout {path}"
        else:
            remedy = f"rm -rf {path} && dvc checkout {path}"
        wrong = "missing" if actual is None else f"not what stage {out.stage} wrote ({actual}, dvc.lock has {out.md5})"
        within = "" if actual is None else _inside(project, out)
        outcome.find(f"{out.path}{within}", wrong, remedy)
    outcome.compared = (
        f"{len(outs)} files and folders of {len(project.stages)} stages, {word(outcome, 'one is what dvc.lock has')}"
    )
    return outcome


def _inside(project: lockfile.Project, out: lockfile.Out) -> str:
    """Which files of a folder differ, as far as the cache still tells."""
    then = dict(lockfile.listing_of(project.cache / "files" / "md5", out.md5))
    now = records.dvc_files(out.path)
    content = {name: records.dvc_md5(file) for name, file in now.items()}
    differing = sorted(name for name in then.keys() | now.keys() if content.get(name) != then.get(name))
    return f" ({', '.join(differing)})" if then else ""


def pipeline(project: lockfile.Project) -> Outcome:
    """The inputs of every stage, command, parameters and code, against those that it was locked with."""
    outcome = Outcome("pipeline")
    given = project.params.model_dump(mode="json")
    made = {out.path: out.md5 for out in project.outs()}
    spoilt = project.spoilt()
    count = 0
    for stage in project.stages:
        if stage.locked is None:
            outcome.find(f"stage {stage.name}", "it has never run", "dvc repro")
            continue
        changes = [] if stage.locked["cmd"] == stage.command else ["its command"]
        outs = {Path(path) for path in lockfile.outs_of(stage.locked)}
        changes += [] if outs == {*stage.outs} else ["the names of its outputs"]
        locked = lockfile.params_of(stage.locked)
        count += len(stage.sections)
        changes += [name for name in sorted({*locked, *stage.sections}) if locked.get(name) != _under(given, name)]
        deps = {Path(path): md5 for path, md5 in lockfile.deps_of(stage.locked).items()}
        count += len(deps.keys() | set(stage.deps))
        for path in [*stage.deps, *(path for path in deps if path not in stage.deps)]:
            # What is wrong with an output is said once, where it is made.
            if path in made:
                differs = deps.get(path) != made[path]
            elif any(bad.is_relative_to(path) or path.is_relative_to(bad) for bad in spoilt):
                differs = False
            else:
                differs = path not in stage.deps or deps.get(path) != project.md5(path)
            changes += [str(path)] if differs else []
        if changes:
            wrong = f"changed since it ran: {', '.join(changes)}"
            outcome.find(f"stage {stage.name}", wrong, "dvc repro  # or undo the change with git")
    outcome.compared = (
        f"{count} inputs of {len(project.stages)} stages, {word(outcome, 'one is what the stage ran with')}"
    )
    return outcome


def _under(given: Any, name: str) -> Any:
    """The value at a dotted name, as `dvc.yaml` declares parameters; None where there is none."""
    for key in name.split("."):
        given = given.get(key) if isinstance(given, dict) else None
    return given


def word(outcome: Outcome, agreed: str) -> str:
    return f"{len(outcome.findings)} wrong" if outcome.findings else f"every {agreed}"
