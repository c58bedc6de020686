"""The toy project with training whose losses follow from its parameters, for searches and comparisons of methods."""

import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from bench.kills import environment
from tests import ROOT
from tests.made.toy import DVC_YAML, STAGE

TRAINING = """\
    elif stage == "train":
        import os, time
        from pipeline.core.progress import publish_validation
        r, rate = p["lora"]["r"], p["train"]["learning_rate"]
        assert r != 5, "rank 5 is planted to fail"
        goal = round(2 + abs(r - 8) / 10 + rate, 6)
        curve = [dict(step=0, loss=3.0), dict(step=2, loss=(3 + goal) / 2), dict(step=4, loss=goal)]
        with open(os.environ["LOG"], "a") as log:
            log.write(f"train {r} {rate}\\n")
        for entry in curve[:-1]:
            publish_validation(int(seed), **entry)
        while os.environ.get("HOLD") == str(r) and not os.path.exists(os.environ["LOG"] + ".go"):
            time.sleep(0.05)
        write(f"out/adapters/{seed}/adapter_config.json", {"r": r})
        write(f"out/adapters/{seed}/adapter_model.safetensors", f"weights {seed} {r} {rate}")
        own = dict(seed=int(seed), trainable_parameters=100 * r, validation=curve, kept_loss=goal)
        write(f"out/training/{seed}.json", RECORDS["training"] | own)
        steps = ["step,epoch,loss,learning_rate,grad_norm,rows,tokens", "1,0.0,3.5,0.1,1.0,4,10", ""]
        write(f"out/training/{seed}.csv", "\\n".join(steps))
"""
INFERENCE = """\
    elif stage == "infer":
        import os
        with open(os.environ["LOG"], "a") as log:
            log.write(f"infer {seed}\\n")
"""


PLAN = """\
parameters:
  lora.r: {choices: [4, 6, 8, 10]}
  train.learning_rate: {choices: [1e-2, 1e-3]}
seeds: [17]
sampler: grid
seed: 17
trials: null
at_once: 2
startup: null
pruner: null
cluster: null
"""


def script() -> str:
    """The toy's, with what this module adds to training and inference."""
    begin = STAGE.index('    elif stage == "train":\n')
    end = STAGE.index("    elif ", begin + 1)
    return (STAGE[:begin] + TRAINING + STAGE[end:]).replace(INFERENCE.splitlines(keepends=True)[0], INFERENCE)


def make_project(folder: Path) -> Path:
    """The toy with this repository's parameters and the search `grid`, committed."""
    project = folder / "project"
    project.mkdir()
    (project / "toy.py").write_text(script())
    (project / "dvc.yaml").write_text(DVC_YAML)
    (project / "grid.yaml").write_text(PLAN)
    (project / ".gitignore").write_text("/out/\n/reports/index.html\n/.mlflow/\n/.scratch/\n/.sweeps/\n__pycache__/\n")
    content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    content["train"]["epochs"] = 2
    YAML().dump(content, project / "params.yaml")
    for command in ("git init -q", "dvc init -q", "git add -A", "git commit -qm start"):
        subprocess.run(command.split(), cwd=project, check=True, env=environment(project))
    return project


def start(project: Path, *arguments: str, hold: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", "from pipeline.commands.cli import app; app()", *arguments], cwd=project,
        env=environment(project) | {"PYTHONPATH": str(ROOT), "LOG": str(log(project)), "HOLD": hold},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def log(project: Path) -> Path:
    return project.parent / "log"


def done(project: Path) -> list[str]:
    """What was computed, in order."""
    return log(project).read_text().splitlines() if log(project).exists() else []
