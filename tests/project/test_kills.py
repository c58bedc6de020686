"""kill -9 at any moment of any stage: running it again ends with the very files of an uninterrupted run.

A server process imports torch once and forks a process for each run of a stage script, so a kill costs seconds. What
`dvc` itself does when it is killed is tried once here, and as often as one likes by `python -m bench.kills`.
"""

import contextlib
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from bench import kills
from pipeline.core import paths, records
from tests.made.processes import SPAWNING

pytestmark = pytest.mark.slow

Identity = tuple[str, ...]
SCRIPTS: dict[str, Identity] = {
    "prepare": ("stages.prepare",),
    "fetch": ("stages.fetch",),
    "prompts": ("stages.prompts",),
    "quantize": ("stages.quantize",),
    "contamination": ("stages.contamination",),
    "infer@base": ("stages.infer",),
    "evaluate@base": ("stages.evaluate",),
    "infer-unquantized": ("stages.infer_unquantized",),
    "evaluate-unquantized": ("stages.evaluate_unquantized",),
    "infer-shots": ("stages.infer_shots",),
    "evaluate-shots": ("stages.evaluate_shots",),
    "train@17": ("stages.train", "--seed", "17"),
    "infer-tuned@17": ("stages.infer_tuned", "--seed", "17"),
    "forget@17": ("stages.forget", "--seed", "17"),
    "evaluate-tuned@17": ("stages.evaluate_tuned", "--seed", "17"),
    "compare": ("stages.compare",),
}
KILLS = (
    dict.fromkeys(SCRIPTS, 2)
    | {"train@17": 5}
    | dict.fromkeys(("infer-unquantized", "infer-shots", "evaluate-unquantized", "evaluate-shots"), 1)
    | dict.fromkeys(("prepare", "prompts", "contamination", "evaluate@base", "forget@17", "compare"), 1)
)


def run_script(project: Path, script: Identity) -> None:
    """The process of one stage: its output goes into a file, a checkpoint is written after each step."""
    os.chdir(project)
    printed = os.open(project / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    from pipeline.lora import train

    train.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    sys.argv = list(script)
    runpy.run_module(script[0], run_name="__main__")


class Project:
    """Runs stage scripts as DVC does: a stage's outputs are removed before it starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        definitions = YAML(typ="safe", pure=True).load((folder / "dvc.yaml").read_text())["stages"]
        self.outs = {}
        for name in SCRIPTS:
            stage, _, item = name.partition("@")
            outs = [*definitions[stage]["outs"], *definitions[stage].get("metrics", [])]
            named = [out if isinstance(out, str) else next(iter(out)) for out in outs]
            self.outs[name] = [out.replace("${item.seed}", item).replace("${item.variant}", item) for out in named]

    def start(self, name: str) -> ForkServerProcess:
        for out in self.outs[name]:
            shutil.rmtree(self.folder / out, ignore_errors=True)
            (self.folder / out).unlink(missing_ok=True)
        process = SPAWNING.Process(target=run_script, args=(self.folder, SCRIPTS[name]))
        process.start()
        return process

    def finish(self, name: str) -> tuple[float, str]:
        """Seconds that the stage took, and what it printed."""
        started = time.monotonic()
        process = self.start(name)
        process.join()
        printed = (self.folder / "printed").read_text()
        assert process.exitcode == 0, printed
        return time.monotonic() - started, printed

    def digests(self, name: str) -> dict[str, str]:
        return {out: records.sha256_path(self.folder / out) for out in self.outs[name]}

    def checkpointed(self) -> bool:
        return any((self.folder / paths.SCRATCH).glob("train-17-*/state.pt"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def clone(folder: Path) -> Path:
    """The tracked files of this repository with tiny parameters, in a git repository of their own."""
    kills.make_project(folder, folder / "clone")
    return folder / "clone"


@pytest.fixture(scope="module")
def project(folder: Path, clone: Path) -> Project:
    """A project in which all stages have run."""
    (folder / "project").mkdir()
    for name in (paths.PARAMS, paths.DVC_YAML):
        shutil.copy(clone / name, folder / "project" / name)
    return Project(folder / "project")


@pytest.fixture(scope="module")
def seconds(project: Project) -> dict[str, float]:
    return {name: project.finish(name)[0] for name in SCRIPTS}


def test_more_than_twenty_kills(
    project: Project, seconds: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    resumed: dict[str, int] = dict.fromkeys(SCRIPTS, 0)
    identical = 0
    for name, times in KILLS.items():
        expected = project.digests(name)
        for number in range(times):
            process = project.start(name)
            moment = draw.uniform(0, seconds[name])
            if name == "train@17" and number < 2:  # at least two in the middle of training, whatever the draw
                wait_for(project.checkpointed)
                moment = 0.0  # a share of the seconds may be over: they were taken while more, or less, ran beside
            process.join(moment)
            process.kill()
            process.join()
            _, printed = project.finish(name)
            resumed[name] += "going on" in printed
            identical += project.digests(name) == expected
    with capsys.disabled():
        print(f"\n{sum(KILLS.values())} kills, {identical} identical, resumed {resumed}")
    assert identical == sum(KILLS.values()) > 20
    assert resumed["train@17"] >= 2
    leftovers = [path.name for path in (project.folder / paths.SCRATCH).iterdir() if path.is_dir()]
    assert leftovers == []


def test_a_killed_dvc_and_an_orphaned_trainer(clone: Path, project: Project, seconds: dict[str, float]) -> None:
    """The group of a real `dvc repro` is killed in the middle of training; then `dvc` alone, which leaves a trainer."""
    assert seconds
    in_clone = Project(clone)
    # Training alone, on what the other project has made.
    definitions = YAML(typ="safe", pure=True).load((clone / paths.DVC_YAML).read_text())["stages"]
    YAML().dump({"stages": {"train": definitions["train"]}}, clone / paths.DVC_YAML)
    for made in (paths.DATA, paths.BASE, paths.QUANTIZED):
        shutil.copytree(project.folder / made, clone / made)
    for file in (paths.BASE_FACTS, paths.QUANTIZED_FACTS, paths.FITTING):
        shutil.copy(project.folder / file, clone / file)

    def states() -> list[int]:
        with contextlib.suppress(FileNotFoundError):  # removed between being listed and being looked at
            return [path.stat().st_mtime_ns for path in (clone / paths.SCRATCH).glob("train-17-*/state.pt")]
        return []

    def training() -> "subprocess.Popen[str]":
        before = states()
        process = kills.start(clone, "repro")
        wait_for(lambda: states() not in (before, []))
        return process

    group = training()
    os.killpg(group.pid, signal.SIGKILL)
    group.communicate()

    alone = training()
    trainer = int((clone / ".scratch/train@17.pid").read_text())
    os.kill(trainer, signal.SIGSTOP)  # it would be done before the next has started
    os.kill(alone.pid, signal.SIGKILL)
    alone.wait()
    refused = kills.run(clone, "repro")
    assert refused.returncode != 0
    assert f"train@17 is being computed by another process, pid {trainer}, " in refused.stdout
    assert f"`kill {trainer}`" in refused.stdout
    assert "Traceback" not in refused.stdout

    os.kill(trainer, signal.SIGKILL)
    alone.communicate()
    done = kills.run(clone, "repro")
    assert done.returncode == 0, done.stdout
    assert "train 17: going on from step" in done.stdout
    assert in_clone.digests("train@17") == project.digests("train@17")
