"""From an MLflow run back to the commit, the outputs and the commands that restore them."""

import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import git, params, paths, records
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.record import identity, lockfile, provenance, store, track

STAGED = ("exec", "stash", "apply", "celery")
"""Folders under refs/exps that hold no experiment of a user's."""


def print_run(name: str, tracking: params.Tracking) -> None:
    """Print what a run is, how to restore it, and that its adapter is the one that its `dvc.lock` names.

    `name`: an id, the beginning of one, or a run's name. UserError when it names no run or several, and when the run is
    not what was written.
    """
    run = named(name, tracking)
    tags = run.tags
    say(f"run      {run.name} ({run.run_id}), {run.status}")
    say(f"commit   {tags.get(store.COMMIT, 'none')}{', with changes' if tags.get('git.dirty') == 'true' else ''}")
    say(f"digest   {tags[store.DIGEST]}")
    say(f"verdict  {tags.get(store.NOTE, '').replace('**', '')}")
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        held = store.read_back(tracking, run.run_id, Path(folder))
        faults = store.spoilt(run, held, Path(folder)) if run.finished else ["it is half-written"]
        lock = Path(folder) / paths.DVC_LOCK
        seeds = run.seeds
        faults += _adapters(Path(folder), lock, seeds)
    if faults:
        remedy = "it cannot be trusted; apply its experiment, and record that anew:"
        raise listing(faults, f"run {run.run_id} is not what was written, {remedy} `{track.COMMAND}`")
    say("restore")
    for command in restoring(run, seeds):
        say(f"  {command}")


def named(name: str, tracking: params.Tracking) -> store.Stored:
    """The one run of a complete experiment that `name` means; UserError as of `find`, and for a trial of a sweep."""
    runs = store.stored(tracking)
    try:
        return find(name, runs)
    except UserError:
        trials = [run for run in store.stored(tracking, store.TRIAL) if name in (run.name, run.run_id)]
        if not trials:
            raise
    trial = trials[0]
    raise UserError(
        f"{name} is a trial of the sweep {trial.tags[store.SWEEP]} ({trial.tags['trial.state']}): it was validated and "
        "not tested, so it has no result to show or compare"
        + (
            f"; `dvc exp apply {shlex.quote(trial.name)}` and `dvc repro` test it"
            if trial.tags["trial.state"] == "complete"
            else ""
        )
    )


def find(name: str, runs: list[store.Stored]) -> store.Stored:
    """The one run that `name` means; UserError for none and for several."""
    fitting = [run for run in runs if run.run_id == name]
    fitting = fitting or [run for run in runs if run.name == name]
    fitting = fitting or [run for run in runs if run.run_id.startswith(name)]
    if not fitting:
        known = [f"{run.name} ({run.run_id})" for run in runs[-10:]] or ["there is none"]
        raise listing(known, f"no run has the name or id {name}; the latest are:")
    if len(fitting) > 1:
        raise listing([f"{run.run_id} {run.name}" for run in fitting], f"{name} may be any of these runs, say its id:")
    return fitting[0]


def _adapters(folder: Path, lock: Path, seeds: list[int]) -> list[str]:
    """Print the sha256 of each logged adapter; what is wrong with those that are not the run's `dvc.lock`'s."""
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


def restoring(run: store.Stored, seeds: list[int]) -> list[str]:
    """The commands that bring the outputs of a run back to the working directory: by its commit, else by its DVC
    experiment, else by the files in the run itself."""
    digest = run.tags[store.DIGEST]
    seen = [sha for sha in run.tags.get(store.COMMITS, "").split(", ") if provenance.is_commit(sha)]
    # The commit that a run started from rarely holds its result, which is committed afterwards.
    later = git.ask("log", "--format=%H", "--exclude=refs/exps/*", "--all", "--", paths.DVC_LOCK.as_posix()) or ""
    for sha in dict.fromkeys([*seen, *later.split()]):
        if _holds(sha, digest, seeds):
            return [f"git checkout {sha}", _outputs(f"{sha}:./{paths.DVC_LOCK}")]
    for sha, name in experiments():
        if _holds(sha, digest, seeds):
            return [f"dvc exp apply {shlex.quote(name)}"]
    fetch = f"{store.COMMAND} artifacts download --run-id {shlex.quote(run.run_id)} --dst-path . --artifact-path"
    base = run.tags.get(store.COMMIT, "")
    # `dvc repro` last: it fills what the cache has lost, and finds nothing to do otherwise.
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


def _holds(commit: str, digest: str, seeds: list[int]) -> bool:
    """Whether the `dvc.lock` of a commit is of the experiment with this digest."""
    lock = git.ask("show", f"{commit}:./{paths.DVC_LOCK}")
    try:
        return lock is not None and identity.digest_of(lock, seeds) == digest
    except UserError:  # of another pipeline, or of other seeds
        return False


def _outputs(lock: str) -> str:
    """`dvc checkout` where the cache has everything that is locked there, else `dvc pull`."""
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        path = Path(folder) / paths.DVC_LOCK
        path.write_text(git.run("show", lock), encoding="utf-8")
        missing = lockfile.missing(path)
    return "dvc checkout" if not missing else f"dvc pull   # {missing} objects are not in the cache; or: dvc repro"
