"""The trials of one search, drawn and pruned by Optuna.

Trial number n depends only on the file's seed and on trials 0 to n - at_once, however many trials run at once, and
wherever they run. Optuna's own studies promise this for one process only, and a study that is loaded again starts its
random numbers anew. So each draw here has a sampler of its own, seeded by the trial's number.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from filelock import FileLock

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.search import trial
from pipeline.search.spec import Parameter, Pruner, Search, Value, replaced

DIGITS = 4
"""Significant digits of a value drawn from a range: more mean nothing, and make names and tables unreadable."""

ATTEMPTS = 100
"""How often trial n is drawn again if it repeats an earlier one."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Optuna's pruner, with the curves of the complete trials that one trial may know. Called with a curve, it says
    whether that trial is to be pruned."""

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
    """The trials of one search: those that have ended, kept in Optuna's database, and the next ones.

    By a trial's number, `values` holds its parameters, `jobs` the trial itself, and `ended` its outcome. A trial that
    failed when the search ran before is not among `ended`: it runs again.
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
        # A search stays the same with more trials, and on other machines.
        identity = plan.model_dump(mode="json", exclude={"trials", "cluster"})
        identity |= {"commit": commit, "given": self.content}
        study_name = f"{name}-{digest(identity)}"
        self.study = optuna.create_study(storage=_storage(), study_name=study_name, load_if_exists=True)
        for frozen in self.study.get_trials(deepcopy=False):
            number = frozen.user_attrs["number"]
            self.values[number] = json.loads(frozen.user_attrs["values"])
            outcome = trial.Outcome(**json.loads(frozen.user_attrs["outcome"]))
            if outcome.state != trial.FAILED and number < plan.total:
                curve = [(int(step), float(loss)) for step, loss in outcome.curve]
                self.ended[number] = replace(outcome, curve=curve)
                self.jobs[number] = self.job(number)

    def knows(self, number: int) -> bool:
        """Whether every trial has ended that trial `number` depends on."""
        return all(earlier in self.ended for earlier in range(number - self.plan.at_once + 1))

    def judge(self, number: int) -> Judge:
        """The pruner of trial `number`."""
        known = [self.ended[earlier] for earlier in range(max(0, number - self.plan.at_once + 1))]
        curves = [outcome.curve for outcome in known if outcome.state == trial.COMPLETE]
        return Judge(self.plan.pruner, self.plan.startup, curves)

    def job(self, number: int) -> trial.Job:
        """Trial `number`, whether or not it has run. UserError if no combination is left for it."""
        if number not in self.jobs:
            if number not in self.values:
                self.values[number] = self._drawn(number)
            values = self.values[number]
            content = replaced(self.content, values)
            name = f"{self.name}-{digest(content)}"
            overrides = [f"{key}={hydra(value)}" for key, value in values.items()]
            overrides += [f"seeds={hydra(self.plan.seeds)}"]
            self.jobs[number] = trial.Job(number, name, tuple(overrides), content)
        return self.jobs[number]

    def place(self, number: int) -> tuple[float, int, int]:
        """The rank of a complete trial: by validation loss, then by trainable parameters, then by number."""
        outcome = self.ended[number]
        assert outcome.loss is not None
        assert outcome.parameters is not None
        return outcome.loss, outcome.parameters, number

    def add(self, job: trial.Job, outcome: trial.Outcome) -> None:
        """Keep the outcome of a trial, also in Optuna's database."""
        self.ended[job.number] = outcome
        frozen = self._ended(job.number)
        frozen.set_user_attr("number", job.number)
        frozen.set_user_attr("experiment", job.name)
        frozen.set_user_attr("values", json.dumps(self.values[job.number]))
        frozen.set_user_attr("outcome", json.dumps(asdict(outcome) | {"log": ""}))
        self.study.add_trial(frozen)

    def _ended(self, number: int) -> Any:
        """A trial that has ended, in Optuna's form."""
        values = {key: _optuna(value) for key, value in self.values[number].items()}
        outcome = self.ended[number]
        return _frozen(values, self.space, outcome.state, outcome.loss, outcome.curve)

    def _drawn(self, number: int) -> dict[str, Value]:
        """The parameters of trial `number`: the next of the grid, or drawn by Optuna, which knows the trials that this
        one depends on. They differ from those of every earlier trial."""
        import optuna

        if self.plan.sampler == "grid":
            choices = [parameter.ends for parameter in self.plan.parameters.values()]
            combination = next(itertools.islice(itertools.product(*choices), number, None))
            return dict(zip(self.plan.parameters, combination, strict=True))
        taken = [replaced(self.content, self.values[earlier]) for earlier in range(number)]
        known = [self._ended(earlier) for earlier in range(number - self.plan.at_once + 1)]
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
        raise UserError(f"{ATTEMPTS} draws gave only combinations that were tried before: set trials to {number}")

    def _value(self, key: str, drawn: Any) -> Value:
        """A drawn value in the form that params.yaml has."""
        parameter = self.plan.parameters[key]
        if parameter.choices is not None:
            return next(choice for choice in parameter.choices if _optuna(choice) == drawn)
        if parameter.whole:
            return int(drawn)
        low, high = parameter.range
        return float(min(max(float(f"{drawn:.{DIGITS}g}"), low), high))


def _frozen(
    values: Mapping[str, Any], space: Mapping[str, Any], state: str, loss: float | None, curve: trial.Curve
) -> Any:
    """A trial in Optuna's form. Its curve is indexed by the number of the validation, not by the training step, so that
    trials with different batch sizes can be compared."""
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
    low, high = parameter.range
    log = bool(parameter.log)
    if parameter.whole:
        return distributions.IntDistribution(int(low), int(high), log=log)
    return distributions.FloatDistribution(low, high, log=log)


def _optuna(value: Value) -> Any:
    """A value in Optuna's form: it takes no lists as choices, so they become text."""
    return json.dumps(value) if isinstance(value, list) else value


def hydra(value: Any) -> str:
    """A value in the form that `dvc exp run -S` takes."""
    if isinstance(value, list):
        return f"[{','.join(map(hydra, value))}]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w\-]*", value) and value not in ("null", "true", "false", "nan", "inf")
        return value if plain else "'{}'".format(value.replace("'", "\\'"))
    return json.dumps(value)


def digest(content: Any) -> str:
    """A short name for the parameters of a trial, or for those of a search."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _storage() -> str:
    """The address of Optuna's SQLite database, which is created whole or not at all."""
    import optuna

    file = paths.SWEEPS.resolve() / "optuna.db"
    file.parent.mkdir(exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            with records.replacing(file) as temporary:
                optuna.storages.RDBStorage(f"sqlite:///{temporary}").engine.dispose()
    return f"sqlite:///{file}"
