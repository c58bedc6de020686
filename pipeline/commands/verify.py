"""Do the cache, `dvc.lock`, the outputs, the reports, the MLflow run and the wheels still agree?

DVC trusts the mode of a cached file, and the time and size of any other file: a flipped bit passes `dvc status`,
`checkout`, `repro` and `push`. Here every file is read. Nothing is changed, and torch is not needed.
"""

import contextlib
import hashlib
import json
import shlex
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline.core import contracts, params, paths, records, yaml12
from pipeline.core.contracts import AdapterOrigin, BaseFacts, Contamination, Forgetting, QuantizedFacts, Receipt, Scores
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.core.records import Decoding
from pipeline.lora.adapter import ORIGIN
from pipeline.record import address, current, identity, lockfile, provenance, seal, store, track
from pipeline.record.current import Finding, Outcome
from pipeline.record.runs import DIGEST, NOTE, Record, Stored, in_line, of_digest
from pipeline.report import files
from pipeline.report.page import faults
from pipeline.score import baselines, compare
from pipeline.sources import source

ABOVE = "# as for the errors above"


def check_all() -> bool:
    """Run every check, and print what each compared and what it found. Returns whether there were no errors.

    UserError if `params.yaml`, `dvc.yaml`, `dvc.lock` or the git repository cannot be read.
    """
    project = lockfile.read()
    provenance.commit(Path())  # a repository that git refuses is not one without a commit
    found = 0
    for check in (objects, current.outputs, current.pipeline, chain, reports, record, page, wheels):
        outcome = check(project)
        say(f"{outcome.name}: {outcome.compared}; {_errors(len(outcome.findings))}")
        for one in outcome.findings:
            say(f"  {one.place}: {one.wrong}\n    mend: {one.remedy}")
        found += len(outcome.findings)
    say(f"{_errors(found)}: mend {'it' if found == 1 else 'them from the top'}" if found else "all agreed")
    return not found


def _errors(count: int) -> str:
    return "no errors" if not count else f"{count} error{'s' if count > 1 else ''}"


# Checks


def objects(project: lockfile.Project) -> Outcome:
    """Compare every object in the cache with its name, and look for all objects that `dvc.lock` needs."""
    outcome = Outcome("cache")
    # 1. The objects of this experiment.
    owners = _owners(project)
    mismatch = "its content does not match its name"
    size = 0
    for name, (out, owner) in owners.items():
        path = lockfile.object_path(project.cache, name)
        if not path.is_file():
            outcome.find(_shown(path), f"missing; it is {owner}", _recache(project, out))
            continue
        size += path.stat().st_size
        if not _is_sound(path, name):
            outcome.find(_shown(path), f"{mismatch}; it should be {owner}", f"{_rm(path)} && {_recache(project, out)}")
    # 2. All others, unless the cache is outside of this project: then they are for other projects to check.
    inside = project.cache.is_relative_to(Path.cwd())
    kept = [path for path in (project.cache / "files" / "md5").glob("??/*") if path.is_file()] if inside else []
    others = {path.parent.name + path.name: path for path in kept}
    for name in sorted(others.keys() - owners.keys()):
        path = others[name]
        size += path.stat().st_size
        if not _is_sound(path, name):
            outcome.find(_shown(path), f"{mismatch}; no current stage needs it", _rm(path))
    # 3. The run cache.
    runs = [path for path in (project.cache / "runs").glob("??/*/*") if path.is_file()] if inside else []
    for path in runs:
        if _run_digest(path) != path.name:
            outcome.find(_shown(path), f"a record of an earlier run; {mismatch}", _rm(path))
    outcome.compared = (
        f"{len(owners.keys() | others.keys())} objects, {size / 1e6:.0f} MB, and {len(runs)} records of earlier runs"
        f"{'' if inside else ' (shared: only what this experiment needs)'}"
    )
    return outcome


def _owners(project: lockfile.Project) -> dict[str, tuple[lockfile.Out, str]]:
    """The objects that `dvc.lock` needs by name, each with its output, and with the file's path and stage in words."""
    owners: dict[str, tuple[lockfile.Out, str]] = {}
    for out in project.outs():
        if out.cached:
            owners.setdefault(out.md5, (out, f"{out.path} of stage {out.stage}"))
            for name, md5 in lockfile.listing_of(project.cache, out.md5):
                owners.setdefault(md5, (out, f"{out.path}/{name} of stage {out.stage}"))
    return owners


def _is_sound(path: Path, name: str) -> bool:
    return records.dvc_md5(path) == name.removesuffix(".dir")


def _rm(path: Path) -> str:
    return f"rm -f {shlex.quote(_shown(path))}"


def _recache(project: lockfile.Project, out: lockfile.Out) -> str:
    """The command that caches an output again: from the intact copy in the working directory, else by its stage.

    Without --force, `dvc commit` refuses if an input has changed since: it never accepts a wrong output.
    """
    if project.md5(out.path) == out.md5:
        return f"dvc commit {out.stage}"
    return f"rm -rf {shlex.quote(str(out.path))} && dvc repro"


def _run_digest(path: Path) -> str | None:
    """DVC's name for an entry of its run cache, over all but sizes and counts; None if the entry is not YAML."""

    def bare(value: Any) -> Any:
        if isinstance(value, list):
            return [bare(inner) for inner in value]
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if key not in ("size", "nfiles")}
        return value

    try:
        content = yaml12.read(path)
    except UserError:
        return None
    return hashlib.sha256(json.dumps(bare(content), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Link:
    """A field of an output, written by `stage`, that names the content of another output: it must equal `actual()`."""

    stage: str
    path: Path
    contract: type[Any]
    field: str
    what: str
    actual: Callable[[], object]


def chain(project: lockfile.Project) -> Outcome:
    """Follow the digests: base, quantized model, adapters, predictions, forgetting, scores, receipt."""
    spoilt = project.spoilt()
    links = list(_links(project.params.seeds))
    outcome = Outcome("chain", f"{len(links)} digests of models, adapters and results, with what is here")
    for link in links:
        remedy = ABOVE if spoilt else f"dvc repro --force --single-item {link.stage} && dvc repro"
        try:
            if getattr(contracts.read(link.path, link.contract), link.field) != link.actual():
                outcome.find(link.path, f"it names another {link.what} than the one here", remedy)
        except (UserError, OSError) as error:
            outcome.find(link.path, f"cannot be read for its {link.what}: {error}", remedy)
    return outcome


def _links(seeds: Sequence[int]) -> Iterator[Link]:
    tree = cache(records.sha256_tree)
    quantized = partial(tree, paths.QUANTIZED)
    yield Link("fetch", paths.BASE_FACTS, BaseFacts, "sha256", "base", partial(tree, paths.BASE))
    yield Link("quantize", paths.QUANTIZED_FACTS, QuantizedFacts, "sha256", "quantized model", quantized)
    yield from _links_of_variant(paths.variant(None), "infer@base", "evaluate@base", quantized, lambda: None)
    for variant, model in ((paths.UNQUANTIZED, partial(tree, paths.BASE)), (paths.SHOTS, quantized)):
        if _is_on(variant):
            kind = variant.removeprefix("base-")
            yield from _links_of_variant(variant, f"infer-{kind}", f"evaluate-{kind}", model, lambda: None)
    yield Link("contamination", paths.CONTAMINATION, Contamination, "model_sha256", "base", partial(tree, paths.BASE))
    for seed in seeds:
        adapter = partial(tree, paths.adapter(seed))
        origin, forgetting, forget = paths.adapter(seed) / ORIGIN, paths.forgetting(seed), f"forget@{seed}"
        yield Link(f"train@{seed}", origin, AdapterOrigin, "model_sha256", "quantized model", quantized)
        yield Link(forget, forgetting, Forgetting, "model_sha256", "quantized model", quantized)
        yield Link(forget, forgetting, Forgetting, "adapter_sha256", "adapter", adapter)
        yield from _links_of_variant(
            paths.variant(seed), f"infer-tuned@{seed}", f"evaluate-tuned@{seed}", quantized, adapter
        )
    yield Link("track", paths.RECEIPT, Receipt, "digest", "experiment", partial(identity.digest_here, seeds))


def _is_on(variant: str) -> bool:
    """Whether a variant of the base is computed. Where its scores cannot be read, its links say so."""
    try:
        return baselines.why_off(variant) is None
    except UserError:
        return True


def _links_of_variant(
    variant: str, infer: str, evaluate: str, model: Callable[[], str], adapter: Callable[[], str | None]
) -> Iterator[Link]:
    decoding = paths.decoding(variant)
    yield Link(infer, decoding, Decoding, "model_sha256", "model", model)
    yield Link(infer, decoding, Decoding, "adapter_sha256", "adapter", adapter)
    conditions = partial(contracts.read, decoding, Decoding)
    yield Link(evaluate, paths.scores(variant), Scores, "decoding", "decoding", conditions)


def reports(_: lockfile.Project) -> Outcome:
    """Compute the comparison again from predictions and scores, and compare it and the reports byte by byte."""
    outcome = Outcome("reports")
    again = "dvc repro --force --single-item compare && dvc repro"
    count = 0
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        (Path(folder) / paths.OUT).mkdir()
        for name in (*paths.OUT.glob("*"), paths.PARAMS, paths.DVC_YAML):
            if name != paths.COMPARISON:
                (Path(folder) / name).symlink_to(name.resolve())
        try:
            with contextlib.chdir(folder):
                declared = params.read("compare")
                compare.write(declared.seeds, declared[params.Evaluate], declared[params.Compare])
                files.write(declared.seeds)
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            outcome.find(f"{paths.PREDICTIONS}, {paths.SCORES}", f"they cannot be compared: {error}", ABOVE)
            outcome.compared = "not computed"
            return outcome
        made = [file for file in Path(folder).rglob("*") if file.is_file() and not file.is_symlink()]
        for file in sorted(made):
            path = file.relative_to(folder)
            copy = [(paths.published(path), track.COMMAND)] if paths.is_published(path) else []
            for place, remedy in [(path, again), *copy]:
                count += 1
                if not place.is_file():
                    outcome.find(place, "missing", remedy)
                elif place.read_bytes() != file.read_bytes():
                    outcome.find(place, "not what the predictions and scores give", remedy)
    outcome.compared = f"{count} files computed again, byte for byte"
    return outcome


def record(project: lockfile.Project) -> Outcome:
    """Check the MLflow store: its database, that all runs are as written, and this experiment's run with what is here.

    The other runs of the store are checked against their own seals alone.
    """
    outcome = Outcome("mlflow", "no run could be compared")
    tracking = project.params.tracking
    if fault := _damage(address.database(tracking)):
        outcome.findings.append(fault)
        return outcome
    try:
        now = track.gather(project.params.seeds)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        # If no error was found above, the page is what is missing.
        remedy = ABOVE if project.spoilt() else track.COMMAND
        outcome.find("outputs", f"no run can be made of them: {error}", remedy)
        return outcome
    runs = store.stored(tracking)
    for run in runs:
        if not run.finished:
            remedy = track.COMMAND if run.tags[DIGEST] == now.digest else _deleting(run)
            outcome.find(run, f"half-written, its status is {run.status}", remedy)
    others = [run for run in runs if run.tags[DIGEST] != now.digest and run.finished]
    for run in others:
        _find_faults(outcome, tracking, run, f"{_deleting(run)}  # `dvc exp apply` and `dvc repro` record it anew")
    own = of_digest(now.digest, runs)
    if not own:
        outcome.find(address.shown(tracking), "no finished run of this experiment", track.COMMAND)
        return outcome
    for run in own[1:]:
        outcome.find(run, f"a second record of the experiment that {own[0].run_id} holds", _deleting(run))
    count = sum(_compare_run(outcome, project, run, now) for run in own)
    outcome.compared = (
        f"{count} parameters, metrics with their curves, tags and artifacts of {own[0]}, "
        f"and {len(others)} runs of other experiments"
    )
    return outcome


def _damage(database: Path | None) -> Finding | None:
    """What SQLite finds wrong with the file of a store; None if it finds nothing, or there is no file."""
    if database is None or not database.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            said = str(connection.execute("pragma integrity_check").fetchone()[0])
    except sqlite3.DatabaseError as error:
        said = str(error)
    if said == "ok":
        return None
    remedy = f"mv {shlex.quote(str(database))} {shlex.quote(f'{database}.broken')} && {track.COMMAND}"
    remedy += "  # brings back this experiment; the others when they are applied"
    return Finding(in_line(str(database)), f"the database is damaged ({said.splitlines()[0]})", remedy)


def _compare_run(outcome: Outcome, project: lockfile.Project, run: Stored, now: Record) -> int:
    """Compare a finished run with its seal and, if that is intact, with the record of what is here.

    Returns the number of places in the run.
    """
    remedy = f"{_deleting(run)} && {track.COMMAND}"
    held, intact = _find_faults(outcome, project.params.tracking, run, remedy)
    if intact:
        for place, digest in seal.manifest(now).items():
            if _is_lasting(place) and held.get(place) != digest:
                outcome.find(run, f"{place} is not as it is here", ABOVE if project.spoilt() else remedy)
    return len(held)


def _find_faults(outcome: Outcome, tracking: params.Tracking, run: Stored, remedy: str) -> tuple[dict[str, str], bool]:
    """Add the faults of a finished run to `outcome`. Returns its manifest as it is now, and whether it is intact."""
    with store.copied(run, tracking) as (folder, held):
        faults = seal.faults(run, held, folder)
    for fault in faults:
        outcome.find(run, fault, remedy)
    return held, not faults


def _is_lasting(place: str) -> bool:
    """Whether a part is the same in every run of the experiment. Cost, code and machine may differ."""
    if place.startswith("tags/"):
        return place in ("tags/device", f"tags/{NOTE}", f"tags/{DIGEST}")
    other = (paths.DVC_LOCK, paths.PARAMS, paths.REPORT_HTML)
    return not place.startswith(("metrics/cost/", *(f"artifacts/{path.as_posix()}" for path in other)))


def _deleting(run: Stored) -> str:
    """The shell command that deletes a run from the store."""
    return f"{address.COMMAND} runs delete --run-id {shlex.quote(run.run_id)}"


def page(project: lockfile.Project) -> Outcome:
    """Check the page's own seal, and that it shows the experiment that is here.

    After the run: the stage that writes the page needs a sound store.
    """
    outcome = Outcome("page", f"seal and experiment of {paths.REPORT_HTML}")
    for fault in faults(paths.REPORT_HTML, identity.digest_here(project.params.seeds)):
        outcome.find(paths.REPORT_HTML, fault, track.COMMAND)
    return outcome


def wheels(project: lockfile.Project) -> Outcome:
    """Compare the downloaded wheels that the experiment names with their pins."""
    outcome = Outcome("wheels")
    counts = {"verified": 0, "not downloaded here": 0}
    for name, sha256 in project.params.sources:
        if name.startswith("pip:") and sha256:
            found = sorted((source.cache() / "wheels" / sha256).glob("*.whl"))
            counts["verified" if found else "not downloaded here"] += 1
            for wheel in found:
                if records.sha256_file(wheel) != sha256:
                    remedy = f"rm -f {shlex.quote(str(wheel))}  # it is downloaded again when needed"
                    outcome.find(wheel, f"its content is not the one pinned by params.yaml ({name})", remedy)
    outcome.compared = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none is named"
    return outcome


def _shown(path: Path) -> str:
    """A path as it is typed in the project folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
