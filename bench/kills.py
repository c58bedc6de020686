"""kill -9 at random moments: are the final artifacts those of an uninterrupted run, bit for bit?

    python -m bench.kills --kills 200 [--seed 0]

A tiny project (random Llama, synthetic data, dropout on) runs once, stage by stage; its outputs are the expected ones.
Then, for each kill: a moment is drawn uniformly over the time that run took; the project is put back to where that run
was at the start of the stage in progress; `dvc repro` starts in a process group of its own, the group gets SIGKILL at
the moment, what DVC left torn is removed (`lora-repro mend`), and `dvc repro` runs again to its end. Everything DVC
locked, every file in `out/` and `reports/` but the costs, and the MLflow runs must be equal.

The project's copy of `pipeline/lora/train.py` writes a checkpoint after each step instead of each minute: the whole
training takes seconds.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.core import paths, records
from tests.made import clone
from tests.made.clone import make_clone
from tests.made.models import tiny_llama

STAGES = [
    "prepare", "fetch", "prompts", "contamination", "quantize", "infer@base", "evaluate@base",
    "infer-unquantized", "evaluate-unquantized", "infer-shots", "evaluate-shots",
    "train@17", "infer-tuned@17", "forget@17", "evaluate-tuned@17", "compare", "track",
]  # fmt: skip
EVERY_MINUTE, EVERY_STEP = "SECONDS_BETWEEN_CHECKPOINTS = 60.0\n", "SECONDS_BETWEEN_CHECKPOINTS = 0.0\n"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one kill hit, and how the run after it ended: `difference` is empty where nothing differs."""

    hit: str
    resumed: bool = False
    mended: bool = False
    difference: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        trial = Trial(Path(folder))
        print(f"uninterrupted: {sum(trial.seconds.values()):.0f} s, {len(trial.expected)} artifacts", flush=True)
        outcomes = []
        for number in range(1, given.kills + 1):
            stage = draw.choices(STAGES, [trial.seconds[stage] for stage in STAGES])[0]
            moment = draw.uniform(0, trial.seconds[stage])
            outcome = trial.kill(stage, moment)
            outcomes.append(outcome)
            notes = [note for note, holds in (("resumed", outcome.resumed), ("mended", outcome.mended)) if holds]
            print(f"{number:4} {', '.join([outcome.hit, *notes])}: {outcome.difference or 'identical'}", flush=True)
    identical = sum(not outcome.difference for outcome in outcomes)
    resumed, mended = sum(outcome.resumed for outcome in outcomes), sum(outcome.mended for outcome in outcomes)
    hits = sorted({outcome.hit for outcome in outcomes})
    print(f"stages hit: {', '.join(f'{hit} {sum(one.hit == hit for one in outcomes)}' for hit in hits)}")
    print(f"resumed, from a checkpoint or a line: {resumed}; mended, a file of DVC's was torn: {mended}")
    print(f"{len(outcomes)} kills, {identical} identical")
    return 0 if identical == len(outcomes) else 1


class Trial:
    """A project, its state before each stage of an uninterrupted run, and the digests at the end of that run."""

    def __init__(self, folder: Path) -> None:
        self.project, self.states = folder / "project", folder / "states"
        make_project(folder, self.project)
        self.seconds: dict[str, float] = {}
        for stage in STAGES:
            shutil.copytree(self.project, self.states / stage, symlinks=True)
            started = time.monotonic()
            done = run(self.project, "repro", "--single-item", stage)
            self.seconds[stage] = time.monotonic() - started
            if done.returncode:
                raise SystemExit(f"{stage} failed without a kill:\n{done.stdout}")
        self.expected = artifacts(self.project)

    def kill(self, stage: str, moment: float) -> Outcome:
        """Go back to the start of `stage`, kill `dvc repro` after `moment` seconds, and run it to its end."""
        shutil.rmtree(self.project)
        shutil.copytree(self.states / stage, self.project, symlinks=True)
        killed = start(self.project, "repro")
        try:
            killed.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(killed.pid, signal.SIGKILL)
        printed = killed.communicate()[0]
        began = [line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")]
        hit = began[-1] if began else "dvc before a stage"
        torn = subprocess.run(
            [sys.executable, "-c", "from pipeline.commands.mend import mend; mend()"], cwd=self.project, check=True,
            env=environment(self.project), capture_output=True, text=True, encoding="utf-8",
        ).stdout  # fmt: skip
        done = run(self.project, "repro")
        resumed, mended = "going on" in done.stdout, bool(torn)
        if done.returncode:
            return Outcome(hit, resumed, mended, f"dvc repro failed:\n{done.stdout}")
        found = artifacts(self.project)
        names = sorted(found.keys() | self.expected.keys())
        differing = [name for name in names if found.get(name) != self.expected.get(name)]
        return Outcome(hit, resumed, mended, ", ".join(differing))


def make_project(folder: Path, project: Path) -> None:
    """A clone of this repository with a tiny model and data, dropout, and a checkpoint after each step; all in
    `folder`."""
    model = folder / "tiny"
    for one in (folder / "data", model):
        one.mkdir()
    make_clone(project, folder / "data", tiny_llama(model))
    code = (project / "pipeline/lora/train.py").read_text(encoding="utf-8")
    if code.count(EVERY_MINUTE) != 1:
        raise SystemExit(f"pipeline/lora/train.py has no line {EVERY_MINUTE!r} to change")
    (project / "pipeline/lora/train.py").write_text(code.replace(EVERY_MINUTE, EVERY_STEP), encoding="utf-8")
    content = YAML(typ="safe", pure=True).load((project / paths.PARAMS).read_text(encoding="utf-8"))
    content["lora"] |= {"dropout": 0.1}
    content["train"] |= {"epochs": 8}
    content["generation"] |= {"max_new_tokens": 32, "batch_size": 1}
    YAML().dump(content, project / paths.PARAMS)
    subprocess.run(["git", "commit", "-qam", "kills"], cwd=project, check=True, env=environment(project))


def environment(project: Path) -> dict[str, str]:
    """The environment of the tests, with a machine-wide cache of DVC for this project only, and unbuffered output, so
    that lines printed before a kill are seen."""
    own = {"DVC_SITE_CACHE_DIR": str(project.parent / "site"), "PYTHONUNBUFFERED": "1"}
    return clone.environment() | own


def start(project: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start `dvc` in a process group of its own."""
    return subprocess.Popen(
        ["dvc", *arguments], cwd=project, env=environment(project), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", start_new_session=True,
    )  # fmt: skip


def run(project: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    process = start(project, *arguments)
    printed = process.communicate()[0]
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def artifacts(project: Path) -> dict[str, str]:
    """Digests by name: every output except the costs, each stage of dvc.lock, and the states of the MLflow runs."""
    found = {}
    for folder in (paths.OUT, paths.REPORTS):
        for path in sorted((project / folder).rglob("*")):
            name = path.relative_to(project)
            if path.is_file() and not name.is_relative_to(paths.COSTS):
                found[name.as_posix()] = records.sha256_file(path)
    locked = YAML(typ="safe", pure=True).load((project / paths.DVC_LOCK).read_text(encoding="utf-8"))["stages"]
    found |= {f"dvc.lock: {stage}": repr(sorted(content.items())) for stage, content in locked.items()}
    return found | {"MLflow": recorded(project)}


def recorded(project: Path) -> str:
    """The states of the MLflow runs that are not deleted."""
    import contextlib
    import sqlite3

    with contextlib.closing(sqlite3.connect(project / ".mlflow/mlflow.db")) as database:
        rows = database.execute("select status from runs where lifecycle_stage = 'active'").fetchall()
    return ", ".join(sorted(row[0] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
