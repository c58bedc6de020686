"""Several processes: nothing is computed twice or by nobody, the results are those of one, none outlives another."""

import contextlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core import params, paths, records, stage
from pipeline.core.errors import UserError
from pipeline.infer import backend_transformers
from pipeline.lora import adapter, train
from pipeline.model import devices, memory, processes
from tests import ROOT
from tests.made.clone import environment
from tests.made.parameters import edit, runtime
from tests.made.processes import inferred, members


def test_a_division_holds_every_item_once_and_is_even() -> None:
    draw = random.Random(1)
    for count in range(1, 6):
        items = [(number, draw.randint(1, 100)) for number in range(draw.randint(0, 30))]
        shares = processes.divide(items, lambda item: item[1], count)
        assert len(shares) == count
        assert sorted(item for one in shares for item in one) == items
        loads = [sum(weight for _, weight in one) for one in shares]
        assert max(loads) - min(loads) <= max([weight for _, weight in items], default=0)
    assert processes.divide([1, 3, 2], int, 1) == [[1, 3, 2]]


# Members that compute


@pytest.fixture
def quantized(quantized: params.Params) -> params.Params:
    """The same, with a round of inference for each group of its test split."""
    return quantized.model_copy(
        update={
            "train": quantized.train.model_copy(update={"epochs": 2}),
            "generation": quantized.generation.model_copy(update={"batch_size": 1}),
        }
    )


def talked() -> None:
    """Put earlier turns before every training row."""
    earlier = [{"role": "user", "content": "red cat?"}, {"role": "assistant", "content": "blue dog runs"}]
    examples = records.read_rows(paths.split("train"), records.Example)
    records.write_rows(paths.split("train"), [replace(one, history=earlier) for one in examples])


def trained(project: params.Params) -> None:
    train.fit(17, project.prompt, project.lora, project.train, project.runtime)


def trained_with_checkpoints(project: params.Params) -> None:
    train.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    trained(project)


def dying(project: params.Params) -> None:
    """Process 1 is gone before the fourth step."""
    step = train.Trainer.step

    def stepping(self: train.Trainer, batch: Any, epoch: float) -> None:
        if len(self.log) == 3 and processes.rank() == 1:
            os._exit(9)
        step(self, batch, epoch)

    train.Trainer.step = stepping  # type: ignore[method-assign]
    trained_with_checkpoints(project)


def differing(project: params.Params) -> None:
    """The processes' adapters drift apart."""
    step = train.Trainer.step

    def stepping(self: train.Trainer, batch: Any, epoch: float) -> None:
        step(self, batch, epoch)
        next(iter(self.masters.values())).add_(processes.rank() * 1e-6)

    train.Trainer.step = stepping  # type: ignore[method-assign]
    trained(project)


# Values of which a member holds one each: none of their bits may change, and their lengths differ.
HELD: list[Any] = [
    {"": None, "a\ud800ä": [True, -0.0, 5e-324, 0.1 + 0.2, float("nan"), float("-inf"), 2**70], "b": {"1": []}},
    ["x" * 10_000],
]


def gathering(_: params.Params) -> None:
    """`HELD` comes to every member as it was, and nothing is unpickled."""
    processes.join(cpu_only=True)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle is read")

    torch.distributed.distributed_c10d._unpickler = fail  # type: ignore[assignment]
    for held in (HELD, [None, None], [1, 2]):
        assert repr(processes.gather(held[processes.rank()])) == repr(held)


class Runs:
    """A pickle of this leaves a file of the process that reads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import os, pathlib; pathlib.Path(f'ran-{os.environ[\"RANK\"]}').touch()",)


def attacked(_: params.Params) -> None:
    """Process 1 is another program, which sends a pickle where a value is due."""
    processes.join(cpu_only=True)
    if processes.rank() == 0:
        processes.gather({"a": 1})
    else:
        with contextlib.suppress(Exception):  # what process 0 sends is no pickle
            torch.distributed.all_gather_object([None, None], Runs())


def curve() -> list[float]:
    lines = paths.training_log(17).read_text().splitlines()
    return [float(line.split(",")[2]) for line in lines[1:]]


def outputs() -> dict[str, str]:
    files = [*paths.adapter(17).iterdir(), paths.training_summary(17), paths.training_log(17)]
    return {path.name: records.sha256_file(path) for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    "counted",
    [{}, {"prompt_loss_weight": 0.3, "label_smoothing": 0.1, "neftune_alpha": 5.0, "turns": "all"}],
    ids=["answers", "everything"],
)
def test_two_processes_train_the_adapter_of_one(quantized: params.Params, counted: dict[str, Any]) -> None:
    """With the same noise: a group's does not depend on the process that computes it."""
    quantized = quantized.model_copy(update={"train": quantized.train.model_copy(update=counted)})
    if counted:
        talked()
    trained(quantized)
    losses, summary = curve(), records.read_json(paths.training_summary(17))
    weights = load_file(paths.adapter(17) / adapter.WEIGHTS)
    shutil.rmtree(paths.OUT / "adapters")
    assert members(quantized, trained) == [0, 0]
    assert curve() == pytest.approx(losses, rel=1e-4)
    again = records.read_json(paths.training_summary(17))
    for name in ("best_loss", "training_loss", "largest_grad_norm"):
        assert again[name] == pytest.approx(summary[name], rel=1e-4)
    for name in ("rows", "steps", "tokens", "supervised_tokens", "validation_rows"):
        assert again[name] == summary[name]
    for name, tensor in load_file(paths.adapter(17) / adapter.WEIGHTS).items():
        assert torch.allclose(tensor, weights[name], atol=1e-3), name


@pytest.mark.slow
def test_processes_of_which_one_died_go_on_and_end_as_if_it_had_not(quantized: params.Params) -> None:
    assert members(quantized, trained) == [0, 0]
    expected = outputs()
    codes = members(quantized, dying)
    assert codes[1] == 9
    assert codes[0] not in (0, None)
    assert members(quantized, trained_with_checkpoints) == [0, 0]
    assert "going on from step 3" in Path("printed-0").read_text()
    assert outputs() == expected
    assert not list(paths.SCRATCH.glob("train-17-*"))


@pytest.mark.slow
def test_processes_that_drift_apart_fail(quantized: params.Params) -> None:
    assert members(quantized, differing) == [1, 1]
    assert "process 1 of 2 (counted from 0) has another adapter than process 0" in Path("printed-0").read_text()


@pytest.mark.slow
def test_two_processes_write_what_one_writes(quantized: params.Params) -> None:
    inferred(quantized)
    expected = [path.read_bytes() for path in (paths.predictions("base"), paths.decoding("base"))]
    shutil.rmtree(paths.PREDICTIONS)
    assert members(quantized, inferred) == [0, 0]
    assert [path.read_bytes() for path in (paths.predictions("base"), paths.decoding("base"))] == expected
    assert "4/4 examples" in Path("printed-0").read_text()
    assert not list(paths.SCRATCH.glob("infer-base-*"))


@pytest.mark.slow
def test_values_are_gathered_as_they_are_and_without_a_pickle(quantized: params.Params) -> None:
    assert members(quantized, gathering) == [0, 0]


@pytest.mark.slow
def test_nothing_runs_of_what_another_program_sends_in_place_of_a_member(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "planted")
    pickle.loads(pickle.dumps(Runs()))
    assert Path("ran-planted").is_file()
    codes = members(quantized, attacked)
    assert not Path("ran-0").exists()
    assert codes == [1, 0]
    assert "process 1 of 2 (counted from 0) sent text that is not JSON" in Path("printed-0").read_text()


@pytest.mark.parametrize("value", [{1: 2}, (1, 2), [{"a"}], {"a": torch.ones(1)}, {"a": numpy.float64(0.1)}])
def test_what_json_would_change_is_not_sent(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TypeError, match="JSON"):
        processes.gather(value)


def test_more_processes_than_a_batch_has_groups_are_refused(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    with pytest.raises(UserError, match=r"runtime.processes = 3, but a step's batch has 2 groups of rows at most"):
        trained(quantized)


def test_none_loads_its_base_before_all_have_asked_what_memory_is_left(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def load(*_: Any) -> None:
        called.append("loaded")
        raise InterruptedError

    monkeypatch.setattr(memory, "require_inference", lambda *_: called.append("asked"))
    monkeypatch.setattr(processes, "gather", lambda _: called.append("met"))
    monkeypatch.setattr(backend_transformers, "load_base", load)
    with pytest.raises(InterruptedError):
        inferred(quantized)
    assert called == ["asked", "met", "loaded"]


# What a machine offers


@pytest.mark.parametrize(
    ("gpus", "mps", "told"),
    [
        (1, False, "asks for 2 processes on this machine, each with a GPU of its own, and it has 1: lower"),
        (0, True, "runtime.processes = 4, but MPS computes in one process: set runtime.processes to 1"),
    ],
)
def test_processes_that_the_devices_cannot_serve_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, told: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    with pytest.raises(UserError, match=told):
        processes.join(cpu_only=False)


def test_the_cores_are_divided_and_a_number_of_threads_is_each_processes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(processes, "join", lambda *_, **__: torch.device("cpu"))
    try:
        for given, threads in ((0, 3), (2, 2)):
            devices.choose(runtime(threads=given, processes=4))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# A stage and its members

HEAD = "import os, sys, time\nfrom pipeline.model import processes as d\nfrom pipeline.core.errors import UserError\n"
HEAD += "d._leave_with_the_starter()\n"


def program(body: str) -> list[str]:
    """A member whose call is `body`."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return [sys.executable, "-c", f"{HEAD}def call():\n{lines}\nd.member(call)\n"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "members"


WAIT = "if d.rank() == 0: time.sleep(60)\n"
"""Whoever is ended last must not be waited for."""


def test_members_know_their_number_and_the_first_gives_the_result(folder: Path) -> None:
    body = "print('second') if d.rank() else 0\nreturn {'rank': d.rank(), 'processes': d.count()}"
    assert processes.launch(program(body), 2, folder) == {"rank": 0, "processes": 2}
    assert not folder.exists()


def test_members_of_one_machine_listen_to_it_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a cluster's settings in the environment are."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "another")
    monkeypatch.setenv("MASTER_ADDR", "0.0.0.0")
    body = "import psutil\nd.join(cpu_only=True)\nd.gather(None)\n"
    body += "found = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == 'LISTEN']\n"
    body += "told = d.gather(found)\nd._state().destroy_process_group()\nreturn {'found': told}"
    given: Any = processes.launch(program(body), 2, folder)
    assert [set(addresses) for addresses in given["found"]] == [{"127.0.0.1"}] * 2


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise UserError('the third row is bad')", "^the third row is bad$"),
        (
            "os.kill(os.getpid(), 9)",
            r"^process 1 of 2 \(counted from 0\) was killed \(SIGKILL\), and the others were ended; if the "
            "system ended it for lack of memory, lower runtime.processes: `dvc repro` continues from the last "
            "checkpoint$",
        ),
        ("1 / 0", r"^process 1 of 2 \(counted from 0\) failed with exit code 1, and the others were ended: `dvc"),
    ],
)
def test_one_that_fails_takes_the_others_along(
    folder: Path, capfd: pytest.CaptureFixture[str], body: str, told: str
) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=told):
        processes.launch(program(WAIT + body), 2, folder)
    assert time.monotonic() - started < 30
    assert ("ZeroDivisionError" in capfd.readouterr().err) == (body == "1 / 0")
    assert not folder.exists()


def test_what_one_said_is_told_although_another_was_gone_sooner(folder: Path) -> None:
    body = "import atexit, pathlib\nif d.rank() == 1:\n    atexit.register(time.sleep, 60)\n"
    body += "    raise UserError('the third row is bad')\n"
    body += "while not pathlib.Path('members/1.error').is_file():\n    pass\n1 / 0"
    with pytest.raises(UserError, match="^the third row is bad$"):
        processes.launch(program(body), 2, folder)


STARTER = """
import signal, sys
from pathlib import Path
from pipeline.model import processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may ignore it
processes.launch([sys.executable, "-c", sys.argv[1]], 2, Path("members"))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_members_end_with_the_process_that_started_them(folder: Path, how: signal.Signals) -> None:
    assert not folder.exists()
    os.mkfifo("alive")
    member = program("held = open('alive', 'w')\nheld.write('x')\nheld.flush()\ntime.sleep(60)")
    with (
        subprocess.Popen([sys.executable, "-c", STARTER, member[2]], stderr=subprocess.DEVNULL) as starter,
        Path("alive").open("rb", buffering=0) as alive,
    ):
        assert len(alive.read(1) + alive.read(1)) == 2  # both members have opened this pipe
        starter.send_signal(how)
        assert alive.read() == b""  # it ends once nobody holds its other end
    assert starter.returncode != 0


def test_a_launcher_that_started_another_number_is_refused(
    project: params.Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    called: list[params.Declared] = []
    with pytest.raises(SystemExit, match="1"):
        processes.run("train", called.append, paths.training_summary(17), 17)
    assert "runtime.processes = 1, but WORLD_SIZE = 2 in the environment says how many" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        stage.run("quantize", called.append)
    assert "quantize computes in one process, but WORLD_SIZE = 2" in capsys.readouterr().err
    assert called == []


@pytest.mark.slow
def test_the_stage_starts_its_members_and_notes_what_they_cost(quantized: params.Params) -> None:
    edit(runtime={"processes": 2}, train={"epochs": 2})
    assert members(quantized, trained) == [0, 0]
    expected = outputs()
    shutil.rmtree(paths.OUT / "adapters")
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", "--seed", "17"],
        env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trainable parameters") == 1
    assert outputs() == expected
    cost = records.read_json(paths.costs(paths.training_summary(17)))
    assert (cost["processes"], cost["threads"]) == (2, 1)
    assert cost["peak_memory_mb"] > 2 * 100
    assert cost["result_sha256"] == records.sha256_file(paths.training_summary(17))


@pytest.mark.usefixtures("project")
def test_a_member_prints_in_any_locale() -> None:
    """Member 0 prints for all: as one process, it replaces what the terminal lacks."""
    code = (
        "from pathlib import Path; from pipeline.core.progress import say; from pipeline.model import processes;"
        "processes.run('train', lambda _: say('a \\u2192 \\u4e16'), Path('x'), 17)"
    )
    launch = (
        "import sys; from pathlib import Path; from pipeline.model import processes;"
        f"processes.launch([sys.executable, '-c', {code!r}], 1, Path('members'))"
    )
    terminal = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", launch], env=environment() | terminal, capture_output=True)
    assert b"UnicodeEncodeError" not in done.stderr
    assert (done.returncode, done.stdout) == (0, b"a -> ?\n"), done.stderr
