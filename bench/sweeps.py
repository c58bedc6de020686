"""Does a search that is killed end as one that is not, without inference of the base?

    python -m bench.sweeps [--default] [--kills 1] [--seed 0]

A project (a tiny random Llama; with `--default` the default experiment on a few rows) runs `dvc repro` once. Then a
search of 8 trials, two at once, is killed (`kill -9`) `--kills` times, each after a number of trials drawn from
`--seed`, and at last runs to its end. Every stage that computes adds a line to a log, from which runs are counted.
"""

import argparse
import contextlib
import csv
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench import kills
from pipeline.core import paths
from tests import ROOT
from tests.made.clone import make_clone

TRIALS = 8
PLAN: dict[str, Any] = {
    "parameters": {
        "lora.r": {"choices": [2, 4, 8, 16]},
        "train.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    },
    "seeds": [17],
    "sampler": "tpe",
    "seed": 17,
    "trials": TRIALS,
    "at_once": 2,
    "startup": 4,
    "pruner": None,
    "cluster": None,
}
LEFTOVERS = "            remove_leftovers()\n"
LINE = """\
            if "BENCH_LOG" in os.environ:
                with open(os.environ["BENCH_LOG"], "a") as log:
                    log.write(name + "\\n")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default", action="store_true", help="the default experiment, on a few rows")
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="sweeps-") as name:
        project = make_project(Path(name), given.default)
        began = time.monotonic()
        for _ in range(given.kills):
            after = draw.randrange(1, TRIALS - 1)
            killed = start(project, "sweep", "rates.yaml", "-j", "2")
            while len(recorded(project)) < after and killed.poll() is None:
                time.sleep(0.1)
            time.sleep(draw.uniform(0, 3))
            killed.kill()
            print(killed.communicate()[0], flush=True)
            print(f"killed with {len(recorded(project))} trials recorded\n", flush=True)
        last = start(project, "sweep", "rates.yaml", "-j", "2")
        print(last.communicate()[0], flush=True)
        print(f"{time.monotonic() - began:.0f} s", flush=True)
        return verdict(project, last.returncode)


def verdict(project: Path, code: int) -> int:
    """Print the result of the search by its table, the log, git and MLflow; 0 if all is as it should be."""
    rows, ran = table(project), stages(project)
    refs = subprocess.run(
        ["git", "for-each-ref", "refs/exps"], cwd=project, capture_output=True, text=True, encoding="utf-8"
    ).stdout
    names = {line.rpartition("/")[2] for line in refs.splitlines()}
    experiments = [row["experiment"] for row in rows if row["experiment"] in names]
    losses = {row["experiment"]: float(row["validation_loss"]) for row in rows}
    best = min(losses, key=lambda name: losses[name])
    winners = [name.removesuffix("-tested") for name in names if name.endswith("-tested")]
    base, tuned = ran.count("infer"), sum(line.startswith("infer-tuned") for line in ran)
    print(
        f"{len(rows)} trials, {len(experiments)} DVC experiments, {len(recorded(project))} recorded, "
        f"{sum(line.startswith('train@') for line in ran)} trainings begun, base inference {base} times, "
        f"tuned inference {tuned} times, winner on validation {', '.join(winners)} (lowest loss: {best})"
    )
    fine = len(rows) == len(experiments) == len(recorded(project)) == TRIALS and base == 0 and tuned == 1
    return 0 if fine and winners == [best] and code == 0 else 1


def make_project(folder: Path, default: bool) -> Path:
    """A project that has run, committed, with the search `rates.yaml`; its stages log that they compute."""
    project = folder / "project"
    if default:
        (folder / "unused").mkdir()
        make_clone(project, folder / "unused", folder)
        content = YAML(typ="safe", pure=True).load((ROOT / "params.default.yaml").read_text(encoding="utf-8"))
        content["data"]["limits"] = {"train": 48, "validation": 12, "test": 12}
        content["train"]["batch_size"] = 6
        content["quantize"]["perplexity_tokens"] = 512
        content["compare"] |= {"bootstrap_samples": 1000, "examples": 1}
        YAML().dump(content, project / paths.PARAMS)
    else:
        kills.make_project(folder, project)
    stage = project / "pipeline/core/stage.py"
    code = stage.read_text(encoding="utf-8")
    if code.count(LEFTOVERS) != 1:
        raise SystemExit(f"pipeline/core/stage.py has no line {LEFTOVERS!r} to change")
    stage.write_text(code.replace(LEFTOVERS, LEFTOVERS + LINE), encoding="utf-8")
    YAML().dump(PLAN, project / "rates.yaml")
    for command in ("git add -A", "git commit -qm search", "dvc repro", "git add -A", "git commit -qm base"):
        done = subprocess.run(
            command.split(), cwd=project, env=kills.environment(project), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stdout}")
    shutil.rmtree(project / ".mlflow")
    return project


def start(project: Path, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    """`lora-repro` in a process of its own."""
    own = kills.environment(project) | {"PYTHONPATH": str(ROOT), "BENCH_LOG": str(log(project))} | variables
    return subprocess.Popen(
        [sys.executable, "-c", "from pipeline.commands.cli import app; app()", *arguments], cwd=project, env=own,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
    )  # fmt: skip


def log(project: Path) -> Path:
    return project.parent / "log"


def stages(project: Path) -> list[str]:
    """The stages that were computed after the base, in order."""
    return log(project).read_text(encoding="utf-8").splitlines() if log(project).exists() else []


def table(project: Path) -> list[dict[str, str]]:
    with (project / ".sweeps/rates/rates.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def recorded(project: Path) -> list[str]:
    """The digests of the finished trials in the project's own store, one a run."""
    if not (project / ".mlflow/mlflow.db").exists():
        return []
    query = (
        "select value from tags join runs using (run_uuid) where key = 'trial.digest' and status = 'FINISHED' "
        "and lifecycle_stage = 'active'"
    )
    with contextlib.closing(sqlite3.connect(project / ".mlflow/mlflow.db")) as database:
        return [value for (value,) in database.execute(query)]


if __name__ == "__main__":
    sys.exit(main())
