"""Two queue workers on a fresh MLflow store: does every experiment end as one finished, complete run?

    python -m bench.parallel [--experiments 20] [--jobs 2]

The project is the toy of tests/made/toy.py (all stages of the pipeline, without the computing), run by
`lora-repro sweep`; the store does not exist when the workers start, so its creation is raced for as well.
"""

import argparse
import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.kills import environment
from tests import ROOT
from tests.made.toy import DVC_YAML, STAGE

FAILING_RANK = 5
SWEEP = "import sys; from pipeline.search.grid import sweep; sys.exit(sweep(sys.argv[2:], int(sys.argv[1])))"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parallel-") as folder:
        project = Path(folder) / "project"
        make_project(project)
        ranks = range(10, 10 + given.experiments)
        started = time.monotonic()
        done = sweep(project, given.jobs, f"lora.r={','.join(map(str, ranks))}")
        print(done.stdout)
        found = runs(project)
        complete = [rank for rank in ranks if found.get(str(rank)) == ["FINISHED"]]
        print(f"{time.monotonic() - started:.0f} s with {given.jobs} workers")
        print(
            f"{given.experiments} experiments, {len(complete)} finished and complete runs, exit code {done.returncode}"
        )
        return 0 if len(complete) == given.experiments and len(found) == given.experiments else 1


def make_project(project: Path) -> None:
    """The toy with this repository's parameters, committed; an experiment with `FAILING_RANK` fails in training."""
    project.mkdir(parents=True)
    (project / "toy.py").write_text(
        STAGE.replace(
            '    elif stage == "train":\n',
            '    elif stage == "train":\n'
            f'        assert p["lora"]["r"] != {FAILING_RANK}, "rank {FAILING_RANK} is planted to fail"\n',
        ),
        encoding="utf-8",
    )
    (project / "dvc.yaml").write_text(DVC_YAML, encoding="utf-8")
    (project / ".gitignore").write_text(
        "/out/\n/reports/index.html\n/.mlflow/\n/.scratch/\n__pycache__/\n", encoding="utf-8"
    )
    shutil.copy(ROOT / "params.yaml", project / "params.yaml")
    for command in ("git init -q", "dvc init -q", "git add -A", "git commit -qm start"):
        subprocess.run(command.split(), cwd=project, check=True, env=environment(project))


def sweep(project: Path, jobs: int, *overrides: str) -> "subprocess.CompletedProcess[str]":
    """`lora-repro sweep` in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-c", SWEEP, str(jobs), *overrides], cwd=project,
        env=environment(project) | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
    )  # fmt: skip


def runs(project: Path) -> dict[str, list[str]]:
    """The states of the MLflow runs by `lora.r`; a run that lacks metrics, adapter or predictions is "incomplete"."""
    found: dict[str, list[str]] = {}
    with contextlib.closing(sqlite3.connect(project / ".mlflow/mlflow.db")) as database:
        query = "select run_uuid, status, artifact_uri from runs where lifecycle_stage = 'active'"
        for run, status, artifacts in database.execute(query).fetchall():
            (rank,) = database.execute(
                "select value from params where run_uuid = ? and key = 'lora.r'", [run]
            ).fetchone()
            metrics = {key for (key,) in database.execute("select key from latest_metrics where run_uuid = ?", [run])}
            folder = Path(artifacts.removeprefix("file://"))
            adapter = folder / "adapter/17/adapter_config.json"
            whole = {"rouge1.tuned", "training/final_loss", "train/loss"} <= metrics and adapter.is_file()
            whole = whole and json.loads(adapter.read_text(encoding="utf-8")) == {"r": int(rank)}
            whole = whole and (folder / "tables/predictions.json").is_file() and (folder / "dvc.lock").is_file()
            found.setdefault(rank, []).append(status if whole else f"{status}, incomplete")
    return found


if __name__ == "__main__":
    sys.exit(main())
