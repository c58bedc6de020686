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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline.core import contracts, params, paths, records, yaml12
from pipeline.core.contracts import AdapterOrigin, BaseFacts, Forgetting, QuantizedFacts, Receipt, Scores
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.core.records import Decoding
from pipeline.lora.adapter import ORIGIN
from pipeline.record import current, identity, lockfile, store, track
from pipeline.record.current import Outcome, word
from pipeline.report import files
from pipeline.report.page import faults
from pipeline.score import compare
from pipeline.sources import source

ABOVE = "# what is said above"


def check_all() -> bool:
    """Run every check, print what each compared and what it found; whether all agreed.

    UserError when there is nothing to check: no readable `params.yaml`, `dvc.yaml` or `dvc.lock`.
    """
    project = lockfile.read()
    found = 0
    for check in (objects, current.outputs, current.pipeline, chain, reports, record, page, wheels):
        outcome = check(project)
        say(f"{outcome.name}: {outcome.compared}")
        for one in outcome.findings:
            say(f"  {one.place}: {one.wrong}\n    mend: {one.remedy}")
        found += len(outcome.findings)
    say(f"{found} error{'s' if found > 1 else ''}: mend them from the top" if found else "all agreed")
    return not found


# Checks


def objects(project: lockfile.Project) -> Outcome:
    """Every object's content against its name, and that all objects that `dvc.lock` needs are there."""
    outcome = Outcome("cache")
    folder = project.cache / "files" / "md5"
    owners: dict[str, tuple[lockfile.Out, str]] = {}
    for out in project.outs():
        if out.cached:
            owners.setdefault(out.md5, (out, str(out.path)))
            for name, content in lockfile.listing_of(folder, out.md5):
                owners.setdefault(content, (out, f"{out.path}/{name}"))
    inside = project.cache.is_relative_to(Path.cwd())
    # In a cache that is shared with other projects, their objects are theirs to check.
    kept = {path.parent.name + path.name for path in folder.glob("??/*") if path.is_file()} if inside else set()
    size = 0
    for name in [*owners, *sorted(kept - owners.keys())]:
        path = folder / name[:2] / name[2:]
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
        f"{word(outcome, 'content matches its name')}"
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
        content = yaml12.read(path)
    except UserError:
        return None
    return hashlib.sha256(json.dumps(bare(content), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Link:
    """A field of an output that names the content of another: written by `stage`, it must say what `actual` finds."""

    stage: str
    path: Path
    contract: type[Any]
    field: str
    what: str
    actual: Callable[[], object]


def chain(project: lockfile.Project) -> Outcome:
    """From digest to digest: base, quantized model, adapters, predictions, forgetting, scores, receipt."""
    outcome = Outcome("chain")
    spoilt = project.spoilt()
    links = list(_links(project.params.seeds))
    for link in links:
        remedy = ABOVE if spoilt else f"dvc repro --force --single-item {link.stage} && dvc repro"
        try:
            if getattr(contracts.read(link.path, link.contract), link.field) != link.actual():
                outcome.find(link.path, f"it names another {link.what} than the one here", remedy)
        except (UserError, OSError) as error:
            outcome.find(link.path, f"cannot be read for its {link.what}: {error}", remedy)
    outcome.compared = (
        f"{len(links)} digests of models, adapters and results, {word(outcome, 'one is of what is here')}"
    )
    return outcome


def _links(seeds: Sequence[int]) -> Iterator[Link]:
    tree = cache(records.sha256_tree)
    quantized = partial(tree, paths.QUANTIZED)
    yield Link("fetch", paths.BASE_FACTS, BaseFacts, "sha256", "base", partial(tree, paths.BASE))
    yield Link("quantize", paths.QUANTIZED_FACTS, QuantizedFacts, "sha256", "quantized model", quantized)
    yield from _links_of_variant(None, "infer@base", "evaluate@base", quantized, lambda: None)
    for seed in seeds:
        adapter = partial(tree, paths.adapter(seed))
        origin, forgetting, forget = paths.adapter(seed) / ORIGIN, paths.forgetting(seed), f"forget@{seed}"
        yield Link(f"train@{seed}", origin, AdapterOrigin, "model_sha256", "quantized model", quantized)
        yield Link(forget, forgetting, Forgetting, "model_sha256", "quantized model", quantized)
        yield Link(forget, forgetting, Forgetting, "adapter_sha256", "adapter", adapter)
        yield from _links_of_variant(seed, f"infer-tuned@{seed}", f"evaluate-tuned@{seed}", quantized, adapter)
    yield Link("track", paths.RECEIPT, Receipt, "digest", "experiment", lambda: identity.digest(identity.here(seeds)))


def _links_of_variant(
    seed: int | None, infer: str, evaluate: str, quantized: Callable[[], str], adapter: Callable[[], str | None]
) -> Iterator[Link]:
    variant = paths.variant(seed)
    decoding = paths.decoding(variant)
    yield Link(infer, decoding, Decoding, "model_sha256", "quantized model", quantized)
    yield Link(infer, decoding, Decoding, "adapter_sha256", "adapter", adapter)
    conditions = partial(contracts.read, decoding, Decoding)
    yield Link(evaluate, paths.scores(variant), Scores, "decoding", "decoding", conditions)


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
    outcome.compared = f"{count} computed again, {word(outcome, 'one is equal byte for byte')}"
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
    for run in (run for run in runs if not run.finished):
        own = run.tags[store.DIGEST] == now.digest
        outcome.find(
            f"run {run.name} ({run.run_id})", f"half-written, its status is {run.status}",
            track.COMMAND if own else _deleting(run),
        )  # fmt: skip
    others = [run for run in runs if run.tags[store.DIGEST] != now.digest and run.finished]
    for run in others:
        for fault in _faults(tracking, run)[1]:
            remedy = f"{_deleting(run)}  # `dvc exp apply` and `dvc repro` record it anew"
            outcome.find(f"run {run.name} ({run.run_id})", fault, remedy)
    finished = store.of_digest(now.digest, runs)
    if not finished:
        outcome.find(store.address(tracking), "no finished run of this experiment", track.COMMAND)
        return outcome
    for run in finished[1:]:
        wrong = f"a second record of the experiment that {finished[0].run_id} holds"
        delete = _deleting(run)
        outcome.find(f"run {run.name} ({run.run_id})", wrong, delete)
    count = 0
    for run in finished:
        place = f"run {run.name} ({run.run_id})"
        remedy = f"{_deleting(run)} && {track.COMMAND}"
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
        f"{word(outcome, 'one is as written and, of this experiment, as here')}"
    )
    return outcome


def _deleting(run: store.Stored) -> str:
    """The command that deletes a run from the store, for a shell."""
    return f"{store.COMMAND} runs delete --run-id {shlex.quote(run.run_id)}"


def page(project: lockfile.Project) -> Outcome:
    """The page against its own seal, and the experiment that it shows against the one here.

    After the run, since the stage that writes the page anew needs a store that is sound.
    """
    outcome = Outcome("page")
    digest = identity.digest(identity.here(project.params.seeds))
    for fault in faults(paths.REPORT_HTML, digest):
        outcome.find(paths.REPORT_HTML, fault, track.COMMAND)
    outcome.compared = f"seal and experiment of {paths.REPORT_HTML}, {word(outcome, 'one is right')}"
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
