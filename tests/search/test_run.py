"""A search: what it may change, what it tries, what it prunes, what a kill costs; that only the winner is tested; and
what travels to other machines.

The project is the toy of tests/made/toy.py, whose training here gives losses that follow from its parameters.
"""

import contextlib
import csv
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bench.kills import environment
from pipeline.commands import compare, show
from pipeline.core import params, paths
from pipeline.core.errors import UserError
from pipeline.record import address, identity, provenance, store
from pipeline.record.runs import DIGEST, TRIAL, WINNER
from pipeline.search import cluster, spec, study, trial
from pipeline.search import run as search
from pipeline.search.study import Study
from tests import ROOT
from tests.made.clone import SECRET
from tests.made.search import done, log, make_project, start

RANDOM: dict[str, Any] = {
    "parameters": {"lora.r": {"low": 4, "high": 64, "log": True}, "train.epochs": {"low": 1, "high": 9, "log": False}},
    "seeds": [17],
    "sampler": "random",
    "seed": 17,
    "trials": 6,
    "at_once": 2,
    "startup": None,
    "pruner": None,
    "cluster": None,
}


def until(process: "subprocess.Popen[str]", holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def runs(project: Path) -> list[dict[str, str]]:
    """The tags of the MLflow runs."""
    if not (project / ".mlflow/mlflow.db").exists():
        return []
    with contextlib.closing(sqlite3.connect(project / ".mlflow/mlflow.db")) as database:
        ids = [row[0] for row in database.execute("select run_uuid from runs where lifecycle_stage = 'active'")]
        return [
            dict(database.execute("select key, value from tags where run_uuid = ?", [run]).fetchall())
            | {"status": database.execute("select status from runs where run_uuid = ?", [run]).fetchone()[0], "id": run}
            for run in ids
        ]


@pytest.mark.slow
def test_a_killed_search_goes_on_and_tests_its_winner_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trial ends, the second is killed in training. Then: that one ends, one fails, and one, which would
    train for ever, is pruned on the way."""
    content = YAML(typ="safe", pure=True).load((project / "grid.yaml").read_text())
    content |= {"startup": 2, "pruner": {"keep": 50, "after": 1}, "at_once": 1}
    content["parameters"] = {"lora.r": {"choices": [8, 6, 5, 30]}, "train.learning_rate": {"choices": [1e-3]}}
    YAML().dump(content, project / "grid.yaml")
    killed = start(project, "sweep", "grid.yaml", hold="6")
    until(killed, lambda: "train 6 0.001" in done(project))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()  # what it started had its output: all of it has ended
    (project / ".sweeps/optuna.db").unlink()  # git and MLflow have what is done
    again = start(project, "sweep", "grid.yaml", hold="30")
    printed = again.communicate()[0]
    assert again.returncode == 1, printed
    assert "rank 5 is planted to fail" in printed
    assert printed.strip().splitlines()[-1].startswith("1 of 4 trials failed: grid-")
    assert sorted(done(project)) == sorted(
        ["train 8 0.001", "train 6 0.001", "train 6 0.001", "train 30 0.001", "infer 17"]
    ), "a trial was repeated, or the base computed"
    table = list(csv.DictReader((project / ".sweeps/grid/grid.csv").read_text().splitlines()))
    assert [(row["lora.r"], row["state"], row["validation_loss"]) for row in table] == [
        ("8", "complete", "2.001000"), ("6", "complete", "2.201000"), ("5", "failed", ""), ("30", "pruned", ""),
    ]  # fmt: skip
    best = table[0]["experiment"]
    assert f"winner on validation: {best} " in printed
    assert f"dvc exp apply {best}-tested" in printed
    # git has the complete trials and the winner, and no trial has its commit's test scores.
    refs = subprocess.run(["git", "for-each-ref", "refs/exps"], cwd=project, capture_output=True, text=True).stdout
    commits = {line.rpartition("/")[2]: line.split()[0] for line in refs.splitlines()}
    assert commits.keys() == {best, table[1]["experiment"], f"{best}-tested"}
    listed = {
        name: subprocess.run(["git", "ls-tree", commit, "reports/"], cwd=project, capture_output=True, text=True).stdout
        for name, commit in commits.items()
    }
    assert "reports/metrics.json" in listed[f"{best}-tested"]
    assert listed[best] == ""
    # MLflow has those, and the pruned one with its curve until then; no cache has its adapter.
    found = runs(project)
    assert {tags["status"] for tags in found} == {"FINISHED"}
    assert [tags.get(WINNER) for tags in found if DIGEST in tags] == ["grid"]
    assert sorted(tags["trial.state"] for tags in found if TRIAL in tags) == ["complete", "complete", "pruned"]
    [pruned] = [tags for tags in found if tags.get("trial.state") == "pruned"]
    with contextlib.closing(sqlite3.connect(project / ".mlflow/mlflow.db")) as database:
        query = "select key, step, value from metrics where run_uuid = ? order by step"
        assert database.execute(query, [pruned["id"]]).fetchall() == [
            ("validation/loss", 0, 3.0), ("validation/loss", 2, pytest.approx((3 + 4.201) / 2)),
        ]  # fmt: skip
    files = [path for path in (project / ".dvc/cache/files").rglob("*") if path.is_file()]
    assert not [path for path in files if b"weights 17 30" in path.read_bytes()]
    assert not [path for path in (project / ".sweeps/grid").iterdir() if path.is_dir()]
    # A trial is no complete experiment.
    monkeypatch.chdir(project)
    for find in (show.named, compare.find):
        with pytest.raises(UserError, match="trial of (the|a) sweep"):
            find(best, params.load().tracking)


# Without DVC: what the trials are


class Fake:
    """A runner that computes a loss from the parameters, and ends the trials in the order of `key`."""

    then = ""

    def __init__(self, at_once: int, key: Any) -> None:
        self.at_once, self.key = at_once, key
        self.begun: list[trial.Job] = []
        self.tested: list[trial.Job] = []
        self.outcomes: dict[int, trial.Outcome] = {}

    def start(self, job: trial.Job, judge: study.Judge) -> Any:
        self.begun.append(job)
        goal = 2 + abs(job.given["lora"]["r"] - 20) / 50 + job.given["train"]["epochs"] / 100
        curve = [(0, 3.0), (2, (3 + goal) / 2), (4, goal)]
        rejected = next((curve[:end] for end in (1, 2) if judge(curve[:end])), None)
        complete = trial.Outcome(trial.COMPLETE, curve, goal, job.given["lora"]["r"])
        self.outcomes[job.number] = trial.Outcome(trial.PRUNED, rejected) if rejected else complete
        return job.number

    def wait(self, handles: Any) -> list[Any]:
        number = min(handles, key=self.key)
        return [(number, self.outcomes[number])]

    def test(self, job: trial.Job) -> trial.Outcome:
        self.tested.append(job)
        return trial.Outcome(trial.FAILED)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def planned(**content: Any) -> spec.Search:
    return spec.Search.model_validate(RANDOM | content)


def ran(plan: spec.Search, runner: Fake, name: str) -> dict[int, Any]:
    study = Study(plan, name, spec.check(plan, Path("file.yaml")), "commit")
    search._run(plan, study, runner, params.load().tracking, paths.SWEEPS)
    return {number: (study.values[number], study.ended[number].state) for number in study.values}


PRUNING = {"sampler": "tpe", "startup": 3, "trials": 14, "at_once": 3, "pruner": {"keep": 50, "after": 1}}


@pytest.mark.usefixtures("here")
def test_what_is_tried_and_pruned_does_not_depend_on_who_is_first() -> None:
    plan = planned(**PRUNING)
    first = ran(plan, Fake(3, lambda number: number), "a")
    assert ran(plan, Fake(3, lambda number: -number), "b") == first
    assert ran(plan, Fake(1, lambda number: number), "c") == first
    assert {state for _, state in first.values()} == {trial.COMPLETE, trial.PRUNED}
    assert len({json.dumps(values) for values, _ in first.values()}) == 14
    for values, _ in first.values():
        assert isinstance(values["lora.r"], int)
        assert 4 <= values["lora.r"] <= 64
        assert 1 <= values["train.epochs"] <= 9
    assert ran(planned(**PRUNING | {"seed": 18}), Fake(3, lambda number: number), "d") != first


@pytest.mark.usefixtures("here")
def test_a_search_that_is_loaded_again_goes_on_as_if_it_had_never_stopped() -> None:
    whole = ran(planned(**PRUNING), Fake(3, lambda number: number), "whole")
    ran(planned(**PRUNING | {"trials": 5}), Fake(3, lambda number: -number), "parts")
    runner = Fake(3, lambda number: number)
    assert ran(planned(**PRUNING), runner, "parts") == whole
    assert [job.number for job in runner.begun] == list(range(5, 14))
    # Other seeds, another search.
    runner = Fake(3, lambda number: number)
    ran(planned(**PRUNING | {"seeds": [17, 18]}), runner, "parts")
    assert len(runner.begun) == 14


@pytest.mark.usefixtures("here")
def test_the_winner_has_the_lowest_validation_loss_and_of_two_the_fewer_parameters() -> None:
    grid = {"lora.r": {"choices": [30, 10, 40]}, "train.epochs": {"choices": [2, 3]}}
    runner = Fake(2, lambda number: number)
    ran(planned(parameters=grid, sampler="grid", trials=None), runner, "ties")
    assert [job.overrides for job in runner.tested] == [("lora.r=10", "train.epochs=2", "seeds=[17]")]


def test_values_reach_params_yaml_as_they_are(here: Path) -> None:
    from dvc.utils.hydra import apply_overrides

    values: dict[str, Any] = {
        "lora.rslora": True, "lora.r": 8, "lora.target_modules": ["q_proj", "v_proj"], "train.learning_rate": 1e-05,
        "train.schedule": "cosine", "prompt.template": "{source}, it's = 'this'", "data.sha256": None,
    }  # fmt: skip
    apply_overrides(here / "params.yaml", [f"{key}={study.hydra(value)}" for key, value in values.items()])
    content = YAML(typ="safe", pure=True).load((here / "params.yaml").read_text())
    for key, value in values.items():
        section, _, name = key.partition(".")
        assert content[section][name] == value
        assert type(content[section][name]) is type(value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"parameters": {"lora.r": {"choices": []}}}, "at least 1 item"),
        ({"parameters": {"lora.r": {"choices": [4, 4]}}}, "choices must differ"),
        ({"parameters": {"lora.r": {"low": 4, "high": 4, "log": False}}}, "low = 4 must be below high = 4"),
        ({"parameters": {"lora.r": {"low": 0, "high": 4, "log": True}}}, "low = 0 must be above 0"),
        ({"parameters": {"lora.r": {"low": 4}}}, "give either choices"),
        ({"parameters": {"lora.r": {"lo": 4}}}, "did you mean low?"),
        ({"trials": None}, "trials must be a number"),
        ({"sampler": "grid"}, "a grid needs choices for lora.r"),
        ({"parameters": {"lora.r": {"low": 4, "high": 7, "log": False}}}, "trials = 6 is more than there are"),
        ({"sampler": "tpe"}, "startup is read"),
        ({"startup": 3}, "startup is read"),
        ({"sampler": "bayes"}, "sampler = 'bayes'"),
        (
            {"parameters": {"lora.r": RANDOM["parameters"]["lora.r"]}, "startup": 2, "pruner": {"keep": 9, "after": 1}},
            "nothing to prune by",
        ),
        ({"direction": "maximize"}, "direction = 'maximize': unknown key"),
        (
            {"parameters": {"generation.num_beams": {"low": 1, "high": 9, "log": False}}},
            "a search changes lora.* and train.*",
        ),
        ({"parameters": {"lora.rank": {"low": 1, "high": 9, "log": False}}}, "no such parameter; known here: r, alpha"),
        ({"parameters": {"lora.r": {"low": 1, "high": 5000, "log": True}}}, "lora.r = 5000"),
    ],
)
def test_mistakes_are_found_before_anything_runs(here: Path, content: dict[str, Any], said: str) -> None:
    YAML().dump(RANDOM | content, here / "file.yaml")
    with pytest.raises(UserError) as caught:
        spec.check(spec.load(here / "file.yaml"), here / "file.yaml")
    assert said in str(caught.value)


def test_the_example_is_a_search(here: Path) -> None:
    path = ROOT / "sweeps" / "example.yaml"
    assert spec.check(spec.load(path), path).seeds == [17]
    assert (here / paths.PARAMS).exists()


@pytest.mark.slow
def test_a_lock_of_a_trial_is_no_experiment(project: Path) -> None:
    lock = (project / paths.DVC_LOCK).read_text()
    assert identity.digest_of(lock, [17])
    stages = YAML(typ="safe", pure=True).load(lock)
    [adapter] = [out for out in stages["stages"]["train@17"]["outs"] if out["path"] == "out/adapters/17"]
    other = lock.replace("x", "x")  # the text as it is, with another adapter that training made
    head, found, rest = other.partition("train@17:")
    with pytest.raises(UserError, match=r"infer-tuned@17 was run with another out/adapters/17"):
        identity.digest_of(head + found + rest.replace(adapter["md5"], "a" * 32, 1), [17])


def test_what_a_leash_holds_ends_with_its_holder(tmp_path: Path) -> None:
    child = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    code = (
        "import subprocess, sys\n"
        "from pipeline.search import leash\n"
        "command = [sys.executable, '-I', leash.__file__, sys.executable, '-c', *sys.argv[1:]]\n"
        "subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True).wait()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, child, str(tmp_path / "on")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    until(holder, (tmp_path / "on").exists)
    holder.kill()
    # The pipe is inherited: it closes when the last of them has ended.
    assert holder.communicate()[0] == ""


# On other machines. Two nodes, a server and a worker that is killed are for `python -m bench.cluster`.


@pytest.fixture
def source(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trial.Source:
    """A project with its remotes, everything pushed, as the working directory."""
    for command in (
        f"git init -q --bare {tmp_path}/origin.git", f"git remote add origin {tmp_path}/origin.git",
        f"dvc remote add -q --default shared {tmp_path}/remote", "git commit -qam remotes", "git push -q origin HEAD",
        "dvc push -q --run-cache",
    ):  # fmt: skip
        subprocess.run(command.split(), cwd=project, check=True, env=environment(project))
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LOG", str(log(project)))
    commit, _ = provenance.commit(project)
    assert commit is not None
    # As of a server, which is no part of the project.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/server/mlflow.db")
    tracking = params.Tracking(uri=f"sqlite:///{tmp_path}/server/mlflow.db", experiment="toy")
    return trial.Source(f"{tmp_path}/origin.git", commit, "", "", True, tracking, "rates", ("a", "a@example.org"))


@pytest.mark.slow
def test_what_a_dead_worker_left_is_found_by_the_next_node(source: trial.Source, tmp_path: Path) -> None:
    given = params.load().model_dump(mode="json")
    given["lora"]["r"] = 6
    job = trial.Job(0, "rates-1", ("lora.r=6", "seeds=[17]"), given)
    first = trial.run(replace(source, cache=f"{tmp_path}/one/cache"), job, tmp_path / "one/rates-1", lambda _: False)
    assert (first.state, first.parameters) == (trial.COMPLETE, 600)
    assert first.loss == pytest.approx(2.201)
    assert done(Path.cwd()) == ["train 6 0.001"]
    # Killed before its commit was pushed: another node, with nothing but the remotes, finds outputs and record.
    subprocess.run(["git", "push", "-q", source.url, f":{trial.reference(source.commit, job.name)}"], check=True)
    again = trial.run(replace(source, cache=f"{tmp_path}/two/cache"), job, tmp_path / "two/rates-1", lambda _: False)
    assert (again.state, again.loss, again.run) == (first.state, first.loss, first.run)
    assert done(Path.cwd()) == ["train 6 0.001"]
    [recorded] = store.stored(source.tracking, TRIAL)
    assert recorded.run_id == first.run
    assert store.stored(source.tracking) == []


def test_all_that_nodes_could_not_share_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path)
    monkeypatch.chdir(project)
    commit, _ = provenance.commit(project)
    assert commit is not None
    tracking = params.Tracking(uri=f"sqlite:///{project}/.mlflow/mlflow.db", experiment="toy")
    here = trial.Source(str(project), commit, "", "", False, tracking, "rates", ("a", "a@example.org"))
    with pytest.raises(UserError) as caught:
        cluster.shared(here)
    problems = str(caught.value).splitlines()[1:]
    assert [problem.split(":")[0] for problem in problems] == [
        "  - git has no remote origin", "  - DVC has no default remote", "  - the MLflow store sqlite",
    ]  # fmt: skip
    for command in (f"git init -q --bare {tmp_path}/origin.git", f"git remote add origin {tmp_path}/origin.git"):
        subprocess.run(command.split(), check=True)
    with pytest.raises(UserError, match="the commit is not at the git remote origin"):
        cluster.shared(here)
    with (
        pytest.raises(UserError, match="--ray needs `cluster"),
        cluster.connected(spec.Search.model_validate(RANDOM), here, "local"),
    ):
        pass


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit as the working directory, from which SSH leads nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_SSH_COMMAND", "false")
    for command in ("git init -q", "git commit -q --allow-empty -m start", "dvc init -q"):
        subprocess.run(command.split(), cwd=tmp_path, check=True, env=environment(tmp_path))
    return tmp_path


def shared_by(uri: str, origin: str) -> str:
    """What stands in the way of sharing a store and an origin with the nodes of a cluster."""
    subprocess.run(["git", "remote", "add", "origin", origin], check=True)
    tracking = params.Tracking.model_construct(uri=uri, experiment="toy")
    here = trial.Source(str(Path.cwd()), "HEAD", "", "", False, tracking, "rates", ("a", "a@example.org"))
    with pytest.raises(UserError) as caught:
        cluster.shared(here)
    return str(caught.value)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    "origin",
    [f"https://me:{SECRET}@127.0.0.1:9/a.git", f"https://{SECRET}@127.0.0.1:9/a.git", f"ssh://me:{SECRET}@host/a.git",
     f"HTTP://{SECRET}:x-oauth-basic@127.0.0.1:9/a.git"],
)  # fmt: skip
def test_a_password_in_the_address_of_the_origin_does_not_travel_to_the_nodes(origin: str) -> None:
    problems = shared_by("http://127.0.0.1:9", origin)
    assert "the git remote origin" in problems
    assert "holds a password or a token" in problems
    assert SECRET not in problems


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    "uri",
    [f"http://me:{SECRET}@127.0.0.1:9", f"https://{SECRET}@127.0.0.1:9/x", f"postgresql://me:{SECRET}@127.0.0.1/db",
     f"postgresql://127.0.0.1/db?user=me&password={SECRET}"],
)  # fmt: skip
def test_a_password_in_the_address_of_the_store_does_not_travel_to_the_nodes(uri: str) -> None:
    problems = shared_by(uri, "/nowhere")
    assert "the MLflow store" in problems
    assert "holds a password or a token" in problems
    assert SECRET not in problems


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    "origin", ["git@host:me/a.git", "ssh://git@host/a.git", "https://127.0.0.1:9/a@b/c.git", "file:///nowhere/a.git"]
)
def test_a_user_name_alone_is_no_password(origin: str) -> None:
    problems = shared_by("http://127.0.0.1:9", origin)
    assert "the commit is not at the git remote origin" in problems
    assert "password" not in problems


def test_a_nodes_own_passwords_are_not_sent_where_the_node_does_not_name(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that began the sweep told the address, and can have it out of a stranger's params.yaml."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/mine")
    tracking = params.Tracking(uri="http://127.0.0.1:9/theirs", experiment="toy")
    here = trial.Source("/nowhere", "0" * 40, "", "", True, tracking, "rates", ("a", "a@example.org"))
    job = trial.Job(0, "rates-1", (), {})
    told: list[str] = []

    def note(*_: object) -> trial.Outcome:
        told.append(address.tracking_uri(params.Tracking(uri=None, experiment="toy")))
        return trial.Outcome(trial.COMPLETE)

    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    outcome = cluster._on_node(here, str(bare / "node"), note, job)
    assert (outcome.state, told) == (trial.FAILED, [])
    assert "set MLFLOW_TRACKING_URI=http://127.0.0.1:9/theirs if you trust it" in outcome.log
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/theirs")
    assert cluster._on_node(here, str(bare / "node"), note, job).state == trial.COMPLETE
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert cluster._on_node(here, str(bare / "node"), note, job).state == trial.COMPLETE
    assert told == ["http://127.0.0.1:9/theirs"] * 2


@pytest.mark.slow
def test_ray_gives_back_how_a_task_ended(tmp_path: Path) -> None:
    """In a process of its own: Ray's warnings are not ours."""
    code = f"""
import json, sys
from dataclasses import asdict
from pathlib import Path
from pipeline.core import params
from pipeline.search import cluster, spec, study, trial
from pipeline.core.errors import UserError
plan = spec.Search.model_validate({{**json.loads(sys.argv[1]),
    "cluster": {{"cpus": 1, "gpus": 0, "folder": {str(tmp_path / "node")!r}}}}})
here = trial.Source({str(tmp_path / "nowhere.git")!r}, "0" * 40, "", "", True,
    params.Tracking(uri="http://127.0.0.1:9", experiment="e"), "s", ("a", "a@example.org"))
cluster.shared = lambda source: source
job = trial.Job(0, "s-1", ("lora.r=4",), {{"seeds": [17]}})
with cluster.connected(plan, here, "local") as nodes:
    [(handle, outcome)] = nodes.wait([nodes.start(job, study.Judge(None, None, []))])
    print("outcome", json.dumps(asdict(outcome)))
big = plan.model_copy(update={{"cluster": spec.Cluster(cpus=1, gpus=99, folder="/tmp")}})
try:
    with cluster.connected(big, here, "local"):
        pass
except UserError as error:
    print("refused", error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(RANDOM)], cwd=ROOT, env=environment(tmp_path / "p"),
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    printed = dict(line.split(" ", 1) for line in ran.stdout.splitlines() if line.startswith(("outcome", "refused")))
    outcome = json.loads(printed["outcome"])
    assert outcome["state"] == trial.FAILED
    assert "git clone" in outcome["log"]
    assert "99 GPUs: it would wait for ever" in printed["refused"]
