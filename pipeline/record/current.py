"""Whether the outputs and inputs in the working directory have the content that `dvc.lock` says."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import records
from pipeline.core.errors import listing
from pipeline.record import lockfile
from pipeline.record.runs import in_line


@dataclass(frozen=True, slots=True)
class Finding:
    """One error: where it is, what is wrong there, and the command that mends it."""

    place: str
    wrong: str
    remedy: str


@dataclass(slots=True)
class Outcome:
    """The result of one check: what was compared, and the errors."""

    name: str
    compared: str = ""
    findings: list[Finding] = field(default_factory=list)

    def find(self, place: object, wrong: str, remedy: str) -> None:
        self.findings.append(Finding(in_line(str(place)), wrong, remedy))


def require_current(headline: str) -> None:
    """UserError, which begins with `headline`, if an output is not as in `dvc.lock`, or a stage would run again."""
    project = lockfile.read()
    found = [*outputs(project).findings, *pipeline(project).findings]
    if found:
        raise listing([f"{one.place}: {one.wrong} (mend: {one.remedy})" for one in found], headline)


def outputs(project: lockfile.Project) -> Outcome:
    """Compare every output in the working directory with `dvc.lock`, by content."""
    outs = project.outs()
    outcome = Outcome("outputs", f"{len(outs)} files and folders of {len(project.stages)} stages, with dvc.lock")
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
        if actual is None:
            outcome.find(out.path, "missing", remedy)
        else:
            wrong = f"not what stage {out.stage} wrote ({actual}, dvc.lock has {out.md5})"
            outcome.find(f"{out.path}{_inside(project, out)}", wrong, remedy)
    return outcome


def _inside(project: lockfile.Project, out: lockfile.Out) -> str:
    """The files of a folder that differ, if the cache still has its listing."""
    then = dict(lockfile.listing_of(project.cache, out.md5))
    now = {name: records.dvc_md5(file) for name, file in records.dvc_files(out.path).items()}
    differing = sorted(name for name in then.keys() | now.keys() if now.get(name) != then.get(name))
    return f" ({', '.join(differing)})" if then else ""


def pipeline(project: lockfile.Project) -> Outcome:
    """Compare the inputs of every stage (command, parameters, data and code) with those that it was locked with."""
    outcome = Outcome("pipeline")
    given = project.params.model_dump(mode="json")
    made = {out.path: out.md5 for out in project.outs()}
    spoilt = project.spoilt()
    count = 0
    for stage in project.stages:
        if stage.locked is None:
            outcome.find(f"stage {stage.name}", "it has never run", "dvc repro")
            continue
        deps = {Path(path): md5 for path, md5 in lockfile.deps_of(stage.locked).items()}
        count += len(stage.sections) + len(deps.keys() | set(stage.deps))
        changes = _changed_definition(stage, stage.locked, given)
        for path in [*stage.deps, *(path for path in deps if path not in stage.deps)]:
            # An output that is wrong is reported once, where it is made.
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
    outcome.compared = f"{count} inputs of {len(project.stages)} stages, with dvc.lock"
    return outcome


def _changed_definition(stage: lockfile.Stage, locked: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What differs in the command, the outputs' names and the parameters of a stage."""
    changes = [] if locked["cmd"] == stage.command else ["its command"]
    if {Path(path) for path in lockfile.outs_of(locked)} != {*stage.outs}:
        changes.append("the names of its outputs")
    values = lockfile.params_of(locked)
    names = sorted({*values, *stage.sections})
    return changes + [name for name in names if values.get(name) != _under(given, name)]


def _under(given: Any, name: str) -> Any:
    """The value at a dotted name, as `dvc.yaml` declares parameters; None if there is none."""
    for key in name.split("."):
        given = given.get(key) if isinstance(given, dict) else None
    return given
