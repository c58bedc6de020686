"""A sealed test split: the experiment that was chosen on the validation split is scored on the test split, once.

While `evaluate.split` is validation, no model answers the test split. This command runs the same experiment with the
test split as a DVC experiment beside the working directory. The training is not repeated: DVC has its result.
"""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.commands import compare
from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.record import current, identity, looks, store
from pipeline.record.runs import NOTE, RULE, Stored, of_digest
from pipeline.search import grid


def score(given: params.Params, dry_run: bool = False) -> None:
    """Score the experiment in the working directory on the test split, and print its verdict.

    With `dry_run`, only say what would be done. UserError if `evaluate.split` is not validation, if the experiment is
    not recorded as it is, if its answers to the test split were scored before, and if DVC fails.
    """
    if given.evaluate.split != "validation":
        raise UserError(
            "evaluate.split is test, so `dvc repro` scores the test split itself: set it to validation before you "
            "choose among experiments, and the test split stays sealed until this command"
        )
    grid.require_git()
    current.require_current("nothing is unsealed:")
    stages = identity.here(given.seeds)
    runs = store.stored(given.tracking)
    recorded = of_digest(identity.digest(stages), runs)
    if not recorded:
        raise UserError(
            "this experiment has no finished run in the MLflow store, which would show that its rule of the decision "
            "came before the test: `dvc repro --force --single-item track` records it"
        )
    _require_sealed(looks.tested(runs, identity.answers(stages)), identity.rule(stages))
    name = f"unsealed-{identity.digest(stages)[:8]}"
    say(f"rule      {identity.rule(stages)[:12]}, recorded with {recorded[0]}")
    say(f"test      {'would run' if dry_run else 'runs'} as the DVC experiment {name}")
    if not dry_run:
        run = _tested(name, given)
        say(f"verdict   {run.tags.get(NOTE, '').replace('**', '')}")
        say(f"looks     {looks.among(store.stored(given.tracking), looks.Look.of(run.tags)).told()}")
        say(f"record    {run}")
        say(f"take it   dvc exp apply {name}")


def _require_sealed(earlier: Stored | None, rule: str) -> None:
    """UserError if these answers were scored on the test split before."""
    if earlier is not None:
        other = "" if earlier.tags.get(RULE) == rule else " by another rule of the decision"
        raise UserError(
            f"this experiment was scored on the test split already{other}, and once is all: {earlier} says: "
            f"{earlier.tags.get(NOTE, '').replace('**', '')}"
        )


def _tested(name: str, given: params.Params) -> Stored:
    """Run the experiment on the test split under the name `name`, and return its run. UserError if that fails."""
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", name, "-S", "evaluate.split=test"]
    environment = os.environ | {
        "DVC_NO_ANALYTICS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    if failed := subprocess.run(command, env=environment, check=False).returncode:
        raise UserError(f"`dvc exp run` failed with exit code {failed}: see above")
    commit = compare.commit_of(name)
    digest = None if commit is None else identity.digest_of(compare.lock_at(commit), given.seeds)
    found = [] if digest is None else of_digest(digest, store.stored(given.tracking))
    if not found:
        raise UserError(f"{name} has no MLflow run: `dvc exp apply {name}`, then `dvc repro` records it")
    return found[0]
