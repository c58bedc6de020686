"""From an MLflow run back to its commit and outputs, with the commands that restore them."""

import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import git, params, paths, records
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.record import address, identity, lockfile, provenance, seal, store, track
from pipeline.record.runs import COMMIT, COMMITS, DIGEST, NOTE, SWEEP, TRIAL, Stored

STAGED = ("exec", "stash", "apply", "celery")
"""Folders under refs/exps for DVC's own use, without experiments of a user."""


def print_run(name: str, tracking: params.Tracking) -> None:
    """Print what a run is, the sha256 of its adapters, and how to restore it.

    `name` is an id, the beginning of one, or a run's name. UserError if it names no run or several, and if the run is
    not as it was written.
    """
    run = named(name, tracking)
    tags = run.tags
    say(f"run      {run.name} ({run.run_id}), {run.status}")
    say(f"commit   {tags.get(COMMIT, 'none')}{', with changes' if tags.get('git.dirty') == 'true' else ''}")
    say(f"digest   {tags[DIGEST]}")
    say(f"verdict  {tags.get(NOTE, '').replace('**', '')}")
    with store.copied(run, tracking) as (folder, held):
        faults = seal.faults(run, held, folder) if run.finished else ["it is half-written"]
        faults += _adapters(folder, run.seeds)
    if faults:
        remedy = f"Do not trust it; apply its experiment and record that anew with `{track.COMMAND}`"
        raise listing(faults, f"run {run.run_id} is not what was written. {remedy}:")
    say("restore")
    for command in restoring(run):
        say(f"  {command}")


def named(name: str, tracking: params.Tracking) -> Stored:
    """The run of a complete experiment that `name` means; UserError as of `find`, and for a trial of a sweep."""
    runs = store.stored(tracking)
    try:
        return find(name, runs)
    except UserError:
        trials = [run for run in store.stored(tracking, TRIAL) if name in (run.name, run.run_id)]
        if not trials:
            raise
    trial = trials[0]
    state = trial.tags["trial.state"]
    remedy = f"; `dvc exp apply {shlex.quote(trial.name)}` and `dvc repro` test it" if state == "complete" else ""
    raise UserError(
        f"{name} is a trial of the sweep {trial.tags[SWEEP]} ({state}): it was validated but not tested, so it has no "
        f"result to show or compare{remedy}"
    )


def find(name: str, runs: list[Stored]) -> Stored:
    """The run that `name` means: its id, its name or the beginning of its id; UserError for none and for several."""
    fitting = [run for run in runs if run.run_id == name]
    fitting = fitting or [run for run in runs if run.name == name]
    fitting = fitting or [run for run in runs if run.run_id.startswith(name)]
    if not fitting:
        known = [f"{run.name} ({run.run_id})" for run in runs[-10:]] or ["there are no runs"]
        raise listing(known, f"no run has the name or id {name}; the latest are:")
    if len(fitting) > 1:
        raise listing([f"{run.run_id} {run.name}" for run in fitting], f"{name} may be any of these runs, give its id:")
    return fitting[0]


def _adapters(folder: Path, seeds: list[int]) -> list[str]:
    """Print the sha256 of each adapter in the artifacts of a run; the faults of those that are not as in its lock."""
    lock = folder / paths.DVC_LOCK
    try:
        stages = lockfile.stages_of(lockfile.text(lock), str(lock))
        outs = {path: md5 for stage in stages.values() for path, md5 in lockfile.outs_of(stage).items()}
    except UserError:
        return [f"artifacts/{paths.DVC_LOCK} cannot be read"]
    faults = []
    for seed in seeds:
        logged = folder / "adapter" / str(seed)
        if records.dvc_md5(logged) != outs.get(str(paths.adapter(seed))):
            faults.append(f"artifacts/adapter/{seed} is not the adapter that the run's dvc.lock has")
        else:
            say(f"adapter  {seed}: sha256 {records.sha256_tree(logged)}, the one in dvc.lock")
    return faults


def restoring(run: Stored) -> list[str]:
    """The commands that bring the outputs of a run back to the working directory.

    They use its commit, else its DVC experiment, else the files in the run.
    """
    seen = [sha for sha in run.tags.get(COMMITS, "").split(", ") if provenance.is_commit(sha)]
    # A run starts from a commit that rarely has its result, which is committed afterwards.
    later = git.ask("log", "--format=%H", "--exclude=refs/exps/*", "--all", "--", paths.DVC_LOCK.as_posix()) or ""
    for sha in dict.fromkeys([*seen, *later.split()]):
        if _holds(sha, run):
            return [f"git checkout {sha}", _outputs(f"{sha}:./{paths.DVC_LOCK}")]
    for sha, name in experiments():
        if _holds(sha, run):
            return [f"dvc exp apply {shlex.quote(name)}"]
    fetch = f"{address.COMMAND} artifacts download --run-id {shlex.quote(run.run_id)} --dst-path . --artifact-path"
    base = run.tags.get(COMMIT, "")
    # `dvc repro` computes what the cache has lost, and else finds nothing to do.
    return [
        *([f"git checkout {base}"] if provenance.is_commit(base) else []),
        *(f"{fetch} {path}" for path in (paths.PARAMS, paths.DVC_LOCK)),
        "dvc checkout",
        "dvc repro",
    ]


def experiments() -> Iterator[tuple[str, str]]:
    """The commit and the name of each DVC experiment in this repository."""
    for line in (git.ask("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps") or "").splitlines():
        sha, _, ref = line.partition(" ")
        parts = ref.split("/")
        if parts[2] not in STAGED:
            yield sha, parts[-1]


def _holds(commit: str, run: Stored) -> bool:
    """Whether the `dvc.lock` of a commit has the experiment of a run."""
    lock = git.ask("show", f"{commit}:./{paths.DVC_LOCK}")
    try:
        return lock is not None and identity.digest_of(lock, run.seeds) == run.tags[DIGEST]
    except UserError:  # another pipeline, or other seeds
        return False


def _outputs(lock: str) -> str:
    """`dvc checkout` if the cache has everything that a `dvc.lock` names, else `dvc pull`."""
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        path = Path(folder) / paths.DVC_LOCK
        path.write_text(git.run("show", lock), encoding="utf-8", errors="surrogateescape")
        missing = lockfile.missing(path)
    return "dvc checkout" if not missing else f"dvc pull   # {missing} objects are not in the cache; or: dvc repro"
