"""The trials of one search, as Optuna has them: what the next one is, whether one is pruned, which is the best.

What trial number n is depends on the file's seed and on trials 0 to n - at_once alone, however many run at once and
wherever. Optuna's own studies promise this for one process only, and one that is loaded again draws its random numbers
from the start: so each draw has a sampler of its own here, seeded by the trial's number.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from filelock import FileLock

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.search import trial
from pipeline.search.spec import Parameter, Pruner, Search, Value, replaced

DIGITS = 4
"""Significant digits of a value drawn from a range: more say nothing, and names and tables become unreadable."""

ATTEMPTS = 100
"""How often a combination that was tried already is drawn again."""


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
            content = replaced(self.content, values)
            name = f"{self.name}-{_digest(content)}"
            overrides = [f"{key}={hydra(value)}" for key, value in values.items()]
            overrides += [f"seeds={hydra(self.plan.seeds)}"]
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
        taken = [replaced(self.content, self.values[earlier]) for earlier in range(number)]
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
            if replaced(self.content, values) not in taken:
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


def hydra(value: Any) -> str:
    """A value as `dvc exp run -S` takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra, value))}]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w\-]*", value) and value not in ("null", "true", "false", "nan", "inf")
        return value if plain else "'{}'".format(value.replace("'", "\\'"))
    return json.dumps(value)


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
