"""A search over training parameters, declared in a file: chosen on validation loss, the winner tested once.

Optuna suggests and prunes; DVC runs; MLflow records. What trial number n is, and whether it is pruned, depends on the
file's seed and on trials 0 to n - at_once alone, however many run at once and wherever: so one machine, a cluster and a
search that was killed and started again try the same and choose the same. Optuna's own studies promise this for one
process only, and one that is loaded again draws its random numbers from the start.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from filelock import FileLock, Timeout
from pydantic import Field, model_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import lockfile, params, paths, provenance, records, store, sweep, track, trial
from pipeline.errors import UserError, listing, without_passwords
from pipeline.progress import say

SECTIONS = ("lora", "train")
"""What a search may change: anything else would change the base, or what the validation loss is a loss of."""

DIGITS = 4
"""Significant digits of a value drawn from a range: more say nothing, and names and tables become unreadable."""

ATTEMPTS = 100
"""How often a combination that was tried already is drawn again."""

Scalar = bool | int | float | str | None
Value = Scalar | list[str]


class Parameter(params.Section):
    """What a parameter may be: one of `choices`, or anything from `low` to `high`, evenly in its logarithm with `log`;
    whole numbers where both ends are."""

    choices: Annotated[list[Value], Field(min_length=1)] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool | None = None

    @model_validator(mode="after")
    def one_kind(self) -> Self:
        ends = (self.low, self.high, self.log)
        if (self.choices is None) == (ends == (None, None, None)) or (self.choices is None and None in ends):
            raise ValueError("give either choices: [<value>, <value>, ...], or low:, high: and log: true or false")
        if self.choices is not None and len({json.dumps(value) for value in self.choices}) < len(self.choices):
            raise ValueError("choices must differ")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low = {self.low} must be below high = {self.high}")
            if self.log and self.low <= 0:
                raise ValueError(f"low = {self.low} must be above 0 with log: true")
        return self

    @property
    def ends(self) -> list[Value]:
        """The values that are checked before anything runs."""
        return self.choices if self.choices is not None else [self.low, self.high]

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def count(self) -> float:
        """How many values there are."""
        if self.choices is not None:
            return len(self.choices)
        assert self.low is not None
        assert self.high is not None
        return self.high - self.low + 1 if self.whole else math.inf


class Pruner(params.Section):
    """At the same validation, a trial whose best loss so far is not among the best `keep` % of complete trials ends;
    not before validation number `after`, where 0 is the one before training."""

    keep: Annotated[int | float, Field(gt=0, lt=100)]
    after: Annotated[int, Field(ge=1)]


class Cluster(params.Section):
    """What one trial takes of a Ray node, and the folder there that clones and the DVC cache lie in."""

    cpus: Annotated[int | float, Field(gt=0)]
    gpus: Annotated[int | float, Field(ge=0)]
    folder: Annotated[str, Field(pattern=r"^[/~]")]


class Search(params.Section):
    """The whole file; sweeps/example.yaml explains it key by key."""

    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    sampler: Literal["grid", "random", "tpe"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    trials: Annotated[int, Field(ge=1, le=100_000)] | None
    at_once: Annotated[int, Field(ge=1, le=10_000)]
    startup: Annotated[int, Field(ge=1)] | None
    pruner: Pruner | None
    cluster: Cluster | None

    @model_validator(mode="after")
    def parts_agree(self) -> Self:
        ranges = [name for name, parameter in self.parameters.items() if parameter.choices is None]
        count = math.prod(parameter.count for parameter in self.parameters.values())
        problems = []
        if self.sampler == "grid" and ranges:
            problems.append(f"a grid needs choices for {', '.join(ranges)}: a range has no end of values")
        if self.trials is None and self.sampler != "grid":
            problems.append(f"trials must be a number with sampler {self.sampler}; null means the whole grid")
        if self.trials is not None and self.trials > count:
            problems.append(f"trials = {self.trials} is more than there are combinations, {count:.0f}")
        if (self.startup is None) == (self.sampler == "tpe" or self.pruner is not None):
            problems.append("startup is read with sampler tpe and by a pruner: a number with either, null without")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def total(self) -> int:
        return self.trials or math.prod(int(parameter.count) for parameter in self.parameters.values())


@dataclass(frozen=True, slots=True)
class Judge:
    """Optuna's pruner on the complete trials' curves that a trial may know of."""

    pruner: Pruner | None
    startup: int | None
    curves: list[trial.Curve]

    def __call__(self, curve: trial.Curve) -> bool:
        if self.pruner is None or self.startup is None:
            return False
        import optuna

        study = optuna.create_study()
        study.add_trials([_frozen({}, {}, trial.COMPLETE, other[-1][1], other) for other in self.curves])
        judging = optuna.pruners.PercentilePruner(
            float(self.pruner.keep), n_startup_trials=self.startup, n_warmup_steps=self.pruner.after
        )
        return judging.prune(study, _frozen({}, {}, "running", None, curve))


class Runner(Protocol):
    """Where trials run: `start` begins one, `wait` gives the next ones that ended of those begun, `then` is what brings
    outputs here after `dvc exp apply`."""

    at_once: int
    then: str

    def start(self, job: trial.Job, judge: Judge) -> Any: ...

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, trial.Outcome]]: ...

    def test(self, job: trial.Job) -> trial.Outcome: ...


class Local:
    """On this machine, each in a clone under `.sweeps/`."""

    then = ""

    def __init__(self, source: trial.Source, folder: Path, at_once: int) -> None:
        self.source, self.folder, self.at_once = source, folder, at_once
        self.pool = futures.ThreadPoolExecutor(at_once)

    def start(self, job: trial.Job, judge: Judge) -> "futures.Future[trial.Outcome]":
        return self.pool.submit(trial.run, self.source, job, self.folder / job.name, judge)

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, trial.Outcome]]:
        done, _ = futures.wait(handles, return_when=futures.FIRST_COMPLETED)
        return [(future, _outcome(future)) for future in done]

    def test(self, job: trial.Job) -> trial.Outcome:
        return trial.test(self.source, job, self.folder / job.name)


def _outcome(future: "futures.Future[trial.Outcome]") -> trial.Outcome:
    try:
        return future.result()
    except UserError as error:
        return trial.Outcome(trial.FAILED, log=str(error))


def search(path: Path, jobs: int | None, address: str | None) -> int:
    """Run the search that the file `path` declares, or go on with it; the exit code.

    `jobs` trials at once here, or on the Ray cluster at `address`. 0: all trials ended, the winner is tested; 1: some
    failed, and the end names each with the last lines of its output; 130: interrupted. UserError before anything runs
    for what cannot work.
    """
    plan = load(path)
    name = path.stem
    given = check(plan, path)
    if jobs is not None and jobs > plan.at_once:
        raise UserError(
            f"-j {jobs} is more than at_once = {plan.at_once} in {path}, the number that may run without knowing of "
            "each other: raise that, which makes it another search, or lower -j"
        )
    sweep.require_git()
    _require_optuna()
    commit, within = _committed(path)
    uri = store.tracking_uri(given.tracking)
    # The address of the environment is the user's own: the rules for one in params.yaml are not for it.
    tracking = params.Tracking.model_construct(uri=uri, experiment=given.tracking.experiment)
    folder = (paths.SWEEPS / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"the sweep {name} is being run by another process: wait for it, or end that one") from None
    with lock, contextlib.ExitStack() as stack:
        here = trial.Source(
            url=_git("rev-parse", "--show-toplevel"), commit=commit, within=within, cache=str(_cache()), remote=False,
            tracking=tracking, sweep=name, identity=(_who("name"), _who("email")),
        )  # fmt: skip
        runner: Runner
        if address is None:
            runner = Local(here, folder, jobs or 1)
        else:
            from pipeline import cluster

            runner = stack.enter_context(cluster.connected(plan, here, address))
        study = Study(plan, name, given, commit)
        try:
            return _run(plan, study, runner, tracking, folder)
        except KeyboardInterrupt:
            say(f"\ninterrupted: `lora-repro sweep {path}` goes on from here")
            sys.stdout.flush()
            os._exit(130)  # what runs here ends with this process


def load(path: Path) -> Search:
    """The file, checked; UserError lists every mistake."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give that of a search, such as sweeps/example.yaml")
    if not re.fullmatch(r"[A-Za-z0-9][\w\-]*", path.stem):
        raise UserError(f"{path}: experiments are named after the file: letters, digits, - and _ only")
    return params.checked(Search, params.parse(path), str(path))


def check(plan: Search, path: Path) -> params.Params:
    """The project's parameters with the search's seeds; UserError unless each end of each range and each choice is
    allowed."""
    content = params.load().model_dump(mode="json") | {"seeds": plan.seeds}
    problems: dict[str, None] = {}
    for name, parameter in plan.parameters.items():
        section, _, key = name.partition(".")
        if section not in SECTIONS:
            ours = " and ".join(f"{one}.*" for one in SECTIONS)
            problem = f"a search changes {ours}: with others, validation losses are not of one base on one text"
            problems[f"{name}: {problem}"] = None
        elif key not in content[section]:
            problems[f"{name}: there is no such parameter; known here: {', '.join(content[section])}"] = None
        else:
            for value in parameter.ends:
                try:
                    params.check(_with(content, {name: value}), str(path))
                except UserError as error:
                    problems |= dict.fromkeys(line.removeprefix("  - ") for line in str(error).splitlines()[1:])
    often = content["train"]["epochs"] > 1 or content["train"]["validate_every"]
    if plan.pruner and not often and not {"train.epochs", "train.validate_every"} & plan.parameters.keys():
        problems["pruner: training validates at its beginning and its end only, so there is nothing to prune by: set "
                 "train.validate_every, or give null"] = None  # fmt: skip
    if problems:
        raise listing(problems, f"{path}: nothing was run:")
    return params.check(content, str(paths.PARAMS))


def _run(plan: Search, study: "Study", runner: Runner, tracking: params.Tracking, folder: Path) -> int:
    total = plan.total
    running: dict[Any, trial.Job] = {}
    begun = 0
    say(f"sweep {study.name}: {total} trials, {len(study.ended)} done before")
    while True:
        while begun < total and len(running) < runner.at_once and study.knows(begun):
            if begun not in study.ended:
                job = study.job(begun)
                running[runner.start(job, study.judge(begun))] = job
                say(f"{len(study.ended)}/{total} {job.name}: running ({job})")
            begun += 1
        if not running:
            break
        for handle, outcome in runner.wait(list(running)):
            job = running.pop(handle)
            study.add(job, outcome)
            loss = "" if outcome.loss is None else f", validation loss {outcome.loss:.4f}"
            say(f"{len(study.ended)}/{total} {job.name}: {outcome.state}{loss} ({job})")
    _print_table(study, total)
    table = folder / f"{study.name}.csv"
    records.write_text(table, records.csv_text(_header(study), _rows(study, total)))
    failed = [number for number in range(total) if study.ended[number].state == trial.FAILED]
    for number in failed:
        log = "\n".join(f"  | {line}" for line in study.ended[number].log.splitlines())
        say(f"\n{study.jobs[number].name}: failed\n{log}")
    code = _test_winner(study, runner, tracking, table, total)
    if failed:
        names = ", ".join(study.jobs[number].name for number in failed)
        say(f"\n{len(failed)} of {total} trials failed: {names}; the same command tries them again")
    return 1 if failed else code


def _test_winner(study: "Study", runner: Runner, tracking: params.Tracking, table: Path, total: int) -> int:
    """Run the whole pipeline for the trial of the lowest validation loss, unless that was done; the exit code."""
    complete = [number for number in range(total) if study.ended[number].state == trial.COMPLETE]
    if not complete:
        say("no trial is complete: there is no winner")
        return 1
    job = study.jobs[min(complete, key=study.place)]
    tested = trial.Job(job.number, f"{job.name}-tested", job.overrides, job.given)
    say(f"\nwinner on validation: {job.name} ({job}); it alone is tested, as {tested.name}")
    outcome = runner.test(tested)
    if outcome.state == trial.FAILED:
        lines = "\n".join(f"  | {line}" for line in outcome.log.splitlines())
        say(f"{tested.name}: failed; the same command tries it again\n{lines}")
        return 1
    digest = track.digest_of(outcome.log, job.seeds)
    run = store.crown(tracking, digest, study.name, table)
    if run is None:
        say(f"{tested.name} has no MLflow run: `dvc exp apply {tested.name}`, then `dvc repro` records it")
        return 1
    runs = store.stored(tracking)
    verdict = next(one for one in runs if one.run_id == run).tags.get(store.NOTE, "").replace("**", "")
    say(f"{verdict}\n")
    earlier = [one for one in runs if study.name in one.tags.get(store.WINNER, "").split(", ") and one.run_id != run]
    if earlier:
        names = ", ".join(one.name for one in earlier)
        say(f"an earlier winner of this sweep was tested too, {names}: the test split was looked at more than once\n")
    say(f"  record  run {run} in {without_passwords(str(tracking.uri))}; it holds the table of the trials")
    say(f"  take it dvc exp apply {tested.name} && {runner.then}git add -u && git commit -m '{study.name}: {job.name}'")
    return 0


class Study:
    """The trials of one search: Optuna's records of them, and what the next ones are.

    `ended` has the outcome of each trial by number, `jobs` what it was. Those that failed earlier are to be run again.
    """

    def __init__(self, plan: Search, name: str, given: params.Params, commit: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.plan, self.name = plan, name
        self.content = given.model_dump(mode="json")
        self.space = {key: _distribution(parameter) for key, parameter in plan.parameters.items()}
        self.ended: dict[int, trial.Outcome] = {}
        self.jobs: dict[int, trial.Job] = {}
        self.values: dict[int, dict[str, Value]] = {}
        # More trials of the same are the same search; so is one on other machines.
        identity = plan.model_dump(mode="json", exclude={"trials", "cluster"}) | {
            "commit": commit,
            "given": self.content,
        }
        study_name = f"{name}-{_digest(identity)}"
        self.study = optuna.create_study(storage=_storage(), study_name=study_name, load_if_exists=True)
        for frozen in self.study.get_trials(deepcopy=False):
            number = frozen.user_attrs["number"]
            self.values[number] = json.loads(frozen.user_attrs["values"])
            outcome = trial.Outcome(**json.loads(frozen.user_attrs["outcome"]))
            if outcome.state == trial.FAILED or number >= plan.total:
                continue
            curve = [(int(step), float(loss)) for step, loss in outcome.curve]
            self.ended[number] = trial.Outcome(**{**json.loads(frozen.user_attrs["outcome"]), "curve": curve})
            self.jobs[number] = self.job(number)

    def knows(self, number: int) -> bool:
        """Whether all has ended that trial `number` depends on."""
        return all(earlier in self.ended for earlier in range(number - self.plan.at_once + 1))

    def judge(self, number: int) -> Judge:
        known = [self.ended[earlier] for earlier in range(max(0, number - self.plan.at_once + 1))]
        curves = [outcome.curve for outcome in known if outcome.state == trial.COMPLETE]
        return Judge(self.plan.pruner, self.plan.startup, curves)

    def job(self, number: int) -> trial.Job:
        """Trial `number`: what it was, or what it is to be."""
        if number not in self.jobs:
            if number not in self.values:
                self.values[number] = self._drawn(number)
            values = self.values[number]
            content = _with(self.content, values)
            name = f"{self.name}-{_digest(content)}"
            overrides = [f"{key}={_hydra(value)}" for key, value in values.items()]
            overrides += [f"seeds={_hydra(self.plan.seeds)}"]
            self.jobs[number] = trial.Job(number, name, tuple(overrides), content)
        return self.jobs[number]

    def place(self, number: int) -> tuple[float, int, int]:
        """What a complete trial is ranked by: lowest validation loss, fewest parameters, first."""
        outcome = self.ended[number]
        assert outcome.loss is not None
        assert outcome.parameters is not None
        return outcome.loss, outcome.parameters, number

    def add(self, job: trial.Job, outcome: trial.Outcome) -> None:
        self.ended[job.number] = outcome
        values = {key: _optuna(value) for key, value in self.values[job.number].items()}
        frozen = _frozen(values, self.space, outcome.state, outcome.loss, outcome.curve)
        frozen.set_user_attr("number", job.number)
        frozen.set_user_attr("experiment", job.name)
        frozen.set_user_attr("values", json.dumps(self.values[job.number]))
        content = {key: getattr(outcome, key) for key in trial.Outcome.__dataclass_fields__}
        frozen.set_user_attr("outcome", json.dumps(content | {"log": ""}))
        self.study.add_trial(frozen)

    def _drawn(self, number: int) -> dict[str, Value]:
        """What trial `number` is: of the grid, or drawn by Optuna, knowing what it may know; not what another was."""
        import optuna

        if self.plan.sampler == "grid":
            choices = [parameter.ends for parameter in self.plan.parameters.values()]
            combination = next(itertools.islice(itertools.product(*choices), number, None))
            return dict(zip(self.plan.parameters, combination, strict=True))
        taken = [_with(self.content, self.values[earlier]) for earlier in range(number)]
        known = []
        for earlier in range(number):
            values = {key: _optuna(value) for key, value in self.values[earlier].items()}
            if earlier <= number - self.plan.at_once:
                outcome = self.ended[earlier]
                known.append(_frozen(values, self.space, outcome.state, outcome.loss, outcome.curve))
        for attempt in range(ATTEMPTS):
            seed = int(hashlib.sha256(f"{self.plan.seed}/{number}/{attempt}".encode()).hexdigest()[:8], 16)
            sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
            if self.plan.sampler == "tpe" and self.plan.startup is not None and len(known) >= self.plan.startup:
                sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.plan.startup)
            study = optuna.create_study(sampler=sampler)
            study.add_trials(known)
            drawn = study.ask(self.space).params
            values = {key: self._value(key, drawn[key]) for key in self.plan.parameters}
            if _with(self.content, values) not in taken:
                return values
        raise UserError(f"{ATTEMPTS} draws gave nothing that was not tried before: trials = {number} is enough")

    def _value(self, key: str, drawn: Any) -> Value:
        """A value as it goes into params.yaml."""
        parameter = self.plan.parameters[key]
        if parameter.choices is not None:
            return next(choice for choice in parameter.choices if _optuna(choice) == drawn)
        if parameter.whole:
            return int(drawn)
        assert parameter.low is not None
        assert parameter.high is not None
        return float(min(max(float(f"{drawn:.{DIGITS}g}"), parameter.low), parameter.high))


def _frozen(
    values: Mapping[str, Any], space: Mapping[str, Any], state: str, loss: float | None, curve: trial.Curve
) -> Any:
    """A trial as Optuna has it; validations are counted, so that those of other batch sizes can be compared."""
    import optuna

    states = {
        trial.COMPLETE: optuna.trial.TrialState.COMPLETE,
        trial.PRUNED: optuna.trial.TrialState.PRUNED,
        trial.FAILED: optuna.trial.TrialState.FAIL,
        "running": optuna.trial.TrialState.RUNNING,
    }
    return optuna.trial.create_trial(
        state=states[state],
        value=curve[-1][1] if state == trial.PRUNED else loss,
        params=dict(values),
        distributions=dict(space),
        intermediate_values={at: loss for at, (_, loss) in enumerate(curve)},
    )


def _distribution(parameter: Parameter) -> Any:
    from optuna import distributions

    if parameter.choices is not None:
        return distributions.CategoricalDistribution([_optuna(choice) for choice in parameter.choices])
    low, high, log = parameter.low, parameter.high, bool(parameter.log)
    if isinstance(low, int) and isinstance(high, int):
        return distributions.IntDistribution(low, high, log=log)
    assert low is not None
    assert high is not None
    return distributions.FloatDistribution(low, high, log=log)


def _optuna(value: Value) -> Any:
    """A value as Optuna takes choices: a list as text."""
    return json.dumps(value) if isinstance(value, list) else value


def _hydra(value: Any) -> str:
    """A value as `dvc exp run -S` takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w\-]*", value) and value not in ("null", "true", "false", "nan", "inf")
        return value if plain else "'{}'".format(value.replace("'", "\\'"))
    return json.dumps(value)


def _with(content: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Any]:
    """Parameters with some of them, by dotted name, replaced."""
    changed = {section: dict(value) if isinstance(value, Mapping) else value for section, value in content.items()}
    for name, value in values.items():
        section, _, key = name.partition(".")
        changed[section][key] = value
    return changed


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _storage() -> str:
    """Optuna's SQLite database; made whole or not at all."""
    import optuna

    file = paths.SWEEPS.resolve() / "optuna.db"
    file.parent.mkdir(exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            with records.replacing(file) as temporary:
                optuna.storages.RDBStorage(f"sqlite:///{temporary}").engine.dispose()
    return f"sqlite:///{file}"


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(
            "a search needs Optuna: `pip install -c constraints.txt -e '.[search]'` in the project folder"
        ) from None


def _committed(path: Path) -> tuple[str, str]:
    """The commit that trials start from, and the project's folder in the repository; UserError unless all is in it, but
    the search's file and what `dvc repro` writes."""
    own, here = path.resolve(), Path.cwd()
    apart = [*provenance.RESULTS, *([own.relative_to(here).as_posix()] if own.is_relative_to(here) else [])]
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".",
        *(f":(exclude){name}" for name in apart),
    )  # fmt: skip
    if changed:
        files = ", ".join(line[2:].strip() for line in changed.splitlines())
        raise UserError(f"trials start from the last commit, and {files} differs from it: `git commit` first")
    return _git("rev-parse", "HEAD"), _git("rev-parse", "--show-prefix")


def _cache() -> Path:
    return lockfile.cache_folder(Path())


def _who(key: str) -> str:
    return os.environ.get(f"GIT_COMMITTER_{key.upper()}") or _git("config", f"user.{key}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip("\n")


def _rows(study: Study, total: int) -> Iterator[list[str]]:
    for number in range(total):
        outcome, job = study.ended[number], study.jobs[number]
        loss = "" if outcome.loss is None else f"{outcome.loss:.6f}"
        parameters = "" if outcome.parameters is None else str(outcome.parameters)
        values = [_hydra(study.values[number][key]) for key in study.plan.parameters]
        yield [str(number), job.name, *values, outcome.state, loss, parameters, outcome.run or ""]


def _header(study: Study) -> list[str]:
    return ["trial", "experiment", *study.plan.parameters, "state", "validation_loss", "trainable", "run"]


def _print_table(study: Study, total: int) -> None:
    table = Table(*_header(study)[:-1], box=None, pad_edge=False)
    for row in _rows(study, total):
        table.add_row(*map(escape, row[:-1]))
    Console(soft_wrap=True, width=1000).print(table)  # as wide as the names are
