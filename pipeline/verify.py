"""Do the cache, `dvc.lock`, the outputs, the reports, the MLflow run and the wheels still say the same?

DVC trusts the mode of a cached file, and its notes on time and size of every other: a flipped bit passes its `status`,
`checkout`, `repro` and `push`. Here everything is read. Nothing is changed, and torch is not needed.
"""

import contextlib
import hashlib
import json
import shlex
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import lockfile, params, paths, records, source, store, track
from pipeline import page as pages
from pipeline.errors import UserError, listing
from stages import compare

ABOVE = "# what is said above"


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
        self.findings.append(Finding(" ".join(str(place).splitlines()), wrong, remedy))


def verify() -> bool:
    """Run every check, print what each compared and what it found; whether all agreed.

    UserError when there is nothing to check: no readable `params.yaml`, `dvc.yaml` or `dvc.lock`.
    """
    project = lockfile.read()
    found = 0
    for check in (cache, outputs, pipeline, chain, reports, record, page, wheels):
        outcome = check(project)
        print(f"{outcome.name}: {outcome.compared}", flush=True)
        for one in outcome.findings:
            print(f"  {one.place}: {one.wrong}\n    mend: {one.remedy}", flush=True)
        found += len(outcome.findings)
    print(f"{found} to mend, from the top" if found else "all agreed", flush=True)
    return not found


# Checks


def cache(project: lockfile.Project) -> Outcome:
    """Every object's content against its name, and that all objects that `dvc.lock` needs are there."""
    outcome = Outcome("cache")
    objects = project.cache / "files" / "md5"
    owners: dict[str, tuple[lockfile.Out, str]] = {}
    for out in project.outs():
        if out.cached:
            owners.setdefault(out.md5, (out, str(out.path)))
            for name, content in lockfile.listing_of(objects, out.md5):
                owners.setdefault(content, (out, f"{out.path}/{name}"))
    inside = project.cache.is_relative_to(Path.cwd())
    # In a cache that is shared with other projects, their objects are theirs to check.
    kept = {path.parent.name + path.name for path in objects.glob("??/*") if path.is_file()} if inside else set()
    size = 0
    for name in [*owners, *sorted(kept - owners.keys())]:
        path = objects / name[:2] / name[2:]
        if not path.is_file():
            out, place = owners[name]
            outcome.find(_shown(path), f"missing; it is {place} of stage {out.stage}", _recache(project, out, ""))
            continue
        size += path.stat().st_size
        if records.dvc_md5(path) != name.removesuffix(".dir"):
            remove = f"rm -f {shlex.quote(_shown(path))}"
            if name in owners:
                out, place = owners[name]
                wrong = f"its content does not match its name; it should be {place} of stage {out.stage}"
                outcome.find(_shown(path), wrong, _recache(project, out, f"{remove} && "))
            else:
                outcome.find(_shown(path), "its content does not match its name; no stage of now needs it", remove)
    runs = [path for path in (project.cache / "runs").glob("??/*/*") if path.is_file()] if inside else []
    for path in runs:
        if _run_digest(path) != path.name:
            wrong = "a record of an earlier run, its content does not match its name"
            outcome.find(_shown(path), wrong, f"rm -f {shlex.quote(_shown(path))}")
    outcome.compared = (
        f"{len(owners.keys() | kept)} objects, {size / 1e6:.0f} MB, and {len(runs)} records of earlier runs"
        f"{'' if inside else ' (shared: only what this experiment needs)'}, "
        f"{_word(outcome, 'content matches its name')}"
    )
    return outcome


def _recache(project: lockfile.Project, out: lockfile.Out, before: str) -> str:
    """From the intact copy in the working directory; where there is none, the stage runs again.

    Without --force, `dvc commit` refuses where an input has changed since: it blesses nothing.
    """
    if project.md5(out.path) == out.md5:
        return f"{before}dvc commit {out.stage}"
    return f"{before}rm -rf {shlex.quote(str(out.path))} && dvc repro"


def _run_digest(path: Path) -> str | None:
    """DVC's name for an entry of its run cache: over all but sizes and counts; None where it is no YAML."""

    def bare(value: Any) -> Any:
        if isinstance(value, list):
            return [bare(inner) for inner in value]
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if key not in ("size", "nfiles")}
        return value

    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError):
        return None
    return hashlib.sha256(json.dumps(bare(content), sort_keys=True).encode()).hexdigest()


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
        f"{len(outs)} files and folders of {len(project.stages)} stages, {_word(outcome, 'one is what dvc.lock has')}"
    )
    return outcome


def _inside(project: lockfile.Project, out: lockfile.Out) -> str:
    """Which files of a folder differ, as far as the cache still tells."""
    then = dict(lockfile.listing_of(project.cache / "files" / "md5", out.md5))
    now = {file.relative_to(out.path).as_posix(): file for file in out.path.rglob("*") if file.is_file()}
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
        outs = {Path(out["path"]) for out in stage.locked.get("outs", [])}
        changes += [] if outs == {*stage.outs} else ["the names of its outputs"]
        locked = {name: value for file in stage.locked.get("params", {}).values() for name, value in file.items()}
        count += len(stage.sections)
        changes += [name for name in sorted({*locked, *stage.sections}) if locked.get(name) != _under(given, name)]
        deps = {Path(dep["path"]): dep["md5"] for dep in stage.locked.get("deps", [])}
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
        f"{count} inputs of {len(project.stages)} stages, {_word(outcome, 'one is what the stage ran with')}"
    )
    return outcome


def _under(given: Any, name: str) -> Any:
    """The value at a dotted name, as `dvc.yaml` declares parameters; None where there is none."""
    for key in name.split("."):
        given = given.get(key) if isinstance(given, dict) else None
    return given


def chain(project: lockfile.Project) -> Outcome:
    """From digest to digest: base, quantized model, adapters, predictions, forgetting, scores, receipt."""
    outcome = Outcome("chain")
    count = 0
    spoilt = project.spoilt()

    def agree(path: Path, said: Callable[[Any], Any], what: str, wanted: Callable[[], Any], stage: str) -> None:
        nonlocal count
        count += 1
        remedy = ABOVE if spoilt else f"dvc repro --force --single-item {stage} && dvc repro"
        try:
            if said(records.read_json(path)) != wanted():
                outcome.find(path, f"it names another {what} than the one here", remedy)
        except (UserError, KeyError, TypeError, OSError) as error:
            outcome.find(path, f"cannot be read for its {what}: {error}", remedy)

    trees: dict[Path, str] = {}

    def tree(folder: Path) -> Callable[[], str]:
        return lambda: trees.setdefault(folder, records.sha256_tree(folder)) if folder not in trees else trees[folder]

    agree(paths.BASE_FACTS, lambda facts: facts["sha256"], "base", tree(paths.BASE), "fetch")
    agree(paths.QUANTIZED_FACTS, lambda facts: facts["sha256"], "quantized model", tree(paths.QUANTIZED), "quantize")
    for seed in (None, *project.params.seeds):
        variant = paths.variant(seed)
        infer, evaluate, train = (f"{stage}@base" for stage in ("infer", "evaluate", "train"))
        if seed is not None:
            infer, evaluate, train = f"infer-tuned@{seed}", f"evaluate-tuned@{seed}", f"train@{seed}"
            origin, forgetting, forget = paths.adapter(seed) / "origin.json", paths.forgetting(seed), f"forget@{seed}"
            agree(origin, lambda one: one["model_sha256"], "quantized model", tree(paths.QUANTIZED), train)
            agree(forgetting, lambda one: one["model_sha256"], "quantized model", tree(paths.QUANTIZED), forget)
            agree(forgetting, lambda one: one["adapter_sha256"], "adapter", tree(paths.adapter(seed)), forget)
        decoding = paths.decoding(variant)
        agree(decoding, lambda one: one["model_sha256"], "quantized model", tree(paths.QUANTIZED), infer)
        adapter = (lambda: None) if seed is None else tree(paths.adapter(seed))
        agree(decoding, lambda one: one["adapter_sha256"], "adapter", adapter, infer)
        conditions = lambda path=decoding: records.read_json(path)  # noqa: E731
        agree(paths.scores(variant), lambda one: one["decoding"], "decoding", conditions, evaluate)
    digest = lambda: track.digest_of(paths.DVC_LOCK.read_text(encoding="utf-8"), project.params.seeds)  # noqa: E731
    agree(paths.RECEIPT, lambda one: one["digest"], "experiment", digest, "track")
    outcome.compared = f"{count} digests of models, adapters and results, {_word(outcome, 'one is of what is here')}"
    return outcome


def reports(_: lockfile.Project) -> Outcome:
    """The comparison once more, from predictions and scores; it, and the reports that are its copy, byte by byte."""
    outcome = Outcome("reports")
    again = "dvc repro --force --single-item compare && dvc repro"
    count = 0
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        (Path(folder) / paths.OUT).mkdir()
        for name in (*paths.OUT.iterdir(), paths.PARAMS, paths.DVC_YAML):
            if name != paths.COMPARISON:
                (Path(folder) / name).symlink_to(name.resolve())
        try:
            with contextlib.chdir(folder):
                compare.main(params.read("compare"))
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            outcome.find(f"{paths.PREDICTIONS}, {paths.SCORES}", f"they cannot be compared: {error}", ABOVE)
            outcome.compared = "not computed"
            return outcome
        made = [file for file in Path(folder).rglob("*") if file.is_file() and not file.is_symlink()]
        for file in sorted(made):
            path = file.relative_to(folder)
            copy = [(paths.published(path), track.COMMAND)] if path.is_relative_to(paths.COMPARISON) else []
            for place, remedy in [(path, again), *copy]:
                count += 1
                if not place.is_file():
                    outcome.find(place, "missing", remedy)
                elif place.read_bytes() != file.read_bytes():
                    outcome.find(place, "not what the predictions and scores give", remedy)
    outcome.compared = f"{count} computed again, {_word(outcome, 'one is equal byte for byte')}"
    return outcome


def record(project: lockfile.Project) -> Outcome:
    """The MLflow store: its database sound, its runs as they were written, and that of this experiment as is here."""
    outcome = Outcome("mlflow")
    tracking, seeds = project.params.tracking, project.params.seeds
    outcome.compared = "no run that could be compared"
    database = store.database(tracking)
    if database is not None and database.exists() and (fault := _unsound(database)):
        renew = f"mv {shlex.quote(str(database))} {shlex.quote(f'{database}.broken')} && {track.COMMAND}"
        outcome.find(
            database,
            f"the database is damaged ({fault})",
            f"{renew}  # brings back this experiment; others as they are applied",
        )
        return outcome
    try:
        now = track.gather(seeds)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        # Where nothing above is wrong, it is the page that is missing.
        outcome.find("outputs", f"no run can be made of them: {error}", ABOVE if project.spoilt() else track.COMMAND)
        return outcome
    runs = store.stored(tracking)
    for run in (run for run in runs if run.status != "FINISHED"):
        own = run.tags[store.DIGEST] == now.digest
        outcome.find(
            f"run {run.name} ({run.run_id})", f"half-written, its status is {run.status}",
            track.COMMAND if own else f"{store.COMMAND} runs delete --run-id {run.run_id}",
        )  # fmt: skip
    others = [run for run in runs if run.tags[store.DIGEST] != now.digest and run.status == "FINISHED"]
    for run in others:
        for fault in _faults(tracking, run)[1]:
            remedy = (
                f"{store.COMMAND} runs delete --run-id {run.run_id}  # `dvc exp apply` and `dvc repro` record it anew"
            )
            outcome.find(f"run {run.name} ({run.run_id})", fault, remedy)
    finished = [run for run in runs if run.tags[store.DIGEST] == now.digest and run.status == "FINISHED"]
    if not finished:
        outcome.find(store.address(tracking), "no finished run of this experiment", track.COMMAND)
        return outcome
    for run in finished[1:]:
        wrong = f"a second record of the experiment that {finished[0].run_id} holds"
        delete = f"{store.COMMAND} runs delete --run-id {run.run_id}"
        outcome.find(f"run {run.name} ({run.run_id})", wrong, delete)
    count = 0
    for run in finished:
        place = f"run {run.name} ({run.run_id})"
        remedy = f"{store.COMMAND} runs delete --run-id {run.run_id} && {track.COMMAND}"
        held, faults = _faults(tracking, run)
        for fault in faults:
            outcome.find(place, fault, remedy)
        count += len(held)
        if not faults:
            for at, digest in store.manifest(now).items():
                if _lasting(at) and held.get(at) != digest:
                    outcome.find(place, f"{at} is not what is here", ABOVE if project.spoilt() else remedy)
    outcome.compared = (
        f"{count} parameters, metrics with their curves, tags and artifacts of run {finished[0].name} "
        f"({finished[0].run_id}) and {len(others)} runs of other experiments, "
        f"{_word(outcome, 'one is as written and, of this experiment, as here')}"
    )
    return outcome


def page(project: lockfile.Project) -> Outcome:
    """The page against its own seal, and the experiment that it shows against the one here.

    After the run, since the stage that writes the page anew needs a store that is sound.
    """
    outcome = Outcome("page")
    digest = track.digest_of(paths.DVC_LOCK.read_text(encoding="utf-8"), project.params.seeds)
    for fault in pages.faults(paths.REPORT_HTML, digest):
        outcome.find(paths.REPORT_HTML, fault, track.COMMAND)
    outcome.compared = f"seal and experiment of {paths.REPORT_HTML}, {_word(outcome, 'one is right')}"
    return outcome


def _faults(tracking: params.Tracking, run: store.Stored) -> tuple[dict[str, str], list[str]]:
    """What a run holds now, and the places in it that are not what was written."""
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        held = store.read_back(tracking, run.run_id, Path(folder))
        return held, store.spoilt(run, held, Path(folder))


def _unsound(database: Path) -> str | None:
    """What SQLite finds wrong with its file; None for nothing."""
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            said = str(connection.execute("pragma integrity_check").fetchone()[0])
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if said == "ok" else said.splitlines()[0]


def _lasting(place: str) -> bool:
    """Whether a part of a run is the same for every run of the experiment: cost, code and machine are not."""
    if place.startswith("tags/"):
        return place in ("tags/device", f"tags/{store.NOTE}", f"tags/{store.DIGEST}")
    other = (paths.DVC_LOCK, paths.PARAMS, paths.REPORT_HTML)
    return not place.startswith(("metrics/cost/", *(f"artifacts/{path.as_posix()}" for path in other)))


def wheels(project: lockfile.Project) -> Outcome:
    """The downloaded wheels that the experiment names, against their pins."""
    outcome = Outcome("wheels")
    counts = {"verified": 0, "not downloaded here": 0}
    for name, sha256 in project.params.sources:
        if name.startswith("pip:") and sha256:
            found = sorted((source.cache() / "wheels" / sha256).glob("*.whl"))
            counts["verified" if found else "not downloaded here"] += 1
            for wheel in found:
                if records.sha256_file(wheel) != sha256:
                    remedy = f"rm -f {shlex.quote(str(wheel))}  # it is downloaded again when it is needed"
                    outcome.find(wheel, f"its content is not the one pinned by params.yaml ({name})", remedy)
    outcome.compared = ", ".join(f"{number} {word}" for word, number in counts.items() if number) or "none is named"
    return outcome


def _shown(path: Path) -> str:
    """A path as short as it can be typed in the project folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _word(outcome: Outcome, agreed: str) -> str:
    return f"{len(outcome.findings)} wrong" if outcome.findings else f"every {agreed}"
