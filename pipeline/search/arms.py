"""A comparison of methods: arms that differ in declared parameters, each at its best learning rate, with several seeds.

The rate of an arm is chosen by the validation loss of one seed. Then each arm's whole pipeline runs with all seeds, and
is tested: one experiment an arm. A comparison that was killed and started again repeats nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.check.check import Examiner
from pipeline.core import params, yaml12
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.record import identity
from pipeline.search import grid, run, spec, trial
from pipeline.search.printing import quoted
from pipeline.search.spec import Value
from pipeline.search.study import Judge, digest, hydra

RATE = "train.learning_rate"
OF_ARMS = ("lora", "train", "quantize")
"""The sections that an arm may change. Others change what is asked or how it is judged."""
OF_ALL = (*OF_ARMS, "data")
"""The sections that all arms may change together."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Arms(params.Section):
    """The whole file; sweeps/methods.yaml explains it key by key."""

    reference: str
    common: dict[str, Value]
    rates: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    rate_seed: Seed
    seeds: Annotated[list[Seed], Field(min_length=1)]
    arms: Annotated[dict[str, dict[str, Value]], Field(min_length=2)]

    def overrides(self, arm: str) -> dict[str, Value]:
        """What an arm changes of params.yaml, by dotted name, without its learning rate if that is to be found."""
        return {**self.common, **self.arms[arm]}

    def rates_of(self, arm: str) -> list[float]:
        """The learning rates that are tried for an arm: one that the arm names itself, or `rates`."""
        own = self.arms[arm].get(RATE)
        return self.rates if own is None else [own]  # type: ignore[list-item]  # checked against params


@dataclass(frozen=True, slots=True)
class Chosen:
    """An arm at the rate chosen among `losses` (validation losses by rate), and the experiment that tests it."""

    arm: str
    rate: float
    losses: dict[float, float]
    experiment: str
    digest: str


def is_comparison(path: Path) -> bool:
    """Whether a file declares arms; otherwise it declares a search."""
    content = yaml12.read(path) if path.is_file() else None
    return isinstance(content, Mapping) and "arms" in content


def load(path: Path) -> Arms:
    """Read and check the file of a comparison; UserError lists every mistake, of all arms."""
    spec.require_name(path)
    plan = params.checked(Arms, yaml12.read(path), str(path))
    problems: dict[str, None] = {}
    if plan.reference not in plan.arms:
        problems[f"reference = {plan.reference!r} is none of the arms: {', '.join(plan.arms)}"] = None
    content = params.load().model_dump(mode="json")
    problems |= dict.fromkeys(_unknown("common", plan.common, OF_ALL, content))
    for arm, values in plan.arms.items():
        if not spec.is_name(arm):
            problems[f"arms.{arm}: an arm's name has letters, digits, - and _ only"] = None
        problems |= dict.fromkeys(_unknown(f"arms.{arm}", values, OF_ARMS, content))
    if not problems:
        for arm in plan.arms:
            for rate in plan.rates_of(arm):
                try:
                    params.check(_given(content, plan, arm, rate, plan.seeds), f"arm {arm}")
                except UserError as error:
                    problems |= dict.fromkeys(f"arms.{arm}: {one}" for one in error.problems)
    if problems:
        raise listing(problems, f"{path}: nothing was run:")
    return plan


def compared(plan: Arms, path: Path, jobs: int) -> list[Chosen]:
    """Run the comparison `plan` that the file `path` declares, or continue it; the arms in their order.

    `jobs` trials run at once. UserError for what is missing on this machine, before anything runs, and if a trial
    fails, when the others have ended.
    """
    given = params.load()
    grid.require_git()
    examiner = Examiner()
    content = given.model_dump(mode="json")
    found = {arm: _given(content, plan, arm, plan.rates_of(arm)[0], plan.seeds) for arm in plan.arms}
    if problems := dict.fromkeys(one for arm in found for one in examiner.problems(found[arm], f"arm {arm}")):
        raise listing(problems, f"{path}: nothing was run:")
    with run.begun(path, given) as (source, folder):
        runner = run.Local(source, folder, jobs)
        losses = _validated(plan, list(_trials(plan, path.stem, content)), runner)
        best = {arm: min(of_rate, key=lambda rate: (of_rate[rate], rate)) for arm, of_rate in losses.items()}
        tested = []
        for number, arm in enumerate(plan.arms):
            job = _job(plan, path.stem, content, number, arm, best[arm], plan.seeds)
            tested.append(_tested(arm, best[arm], losses[arm], runner, replace(job, name=f"{job.name}-tested")))
        return tested


def _trials(plan: Arms, name: str, content: Mapping[str, Any]) -> Iterator[tuple[str, float, trial.Job]]:
    """Each arm with each of its rates, and the trial that validates it."""
    number = 0
    for arm in plan.arms:
        for rate in plan.rates_of(arm):
            yield arm, rate, _job(plan, name, content, number, arm, rate, [plan.rate_seed])
            number += 1


def _validated(
    plan: Arms, trials: Sequence[tuple[str, float, trial.Job]], runner: run.Local
) -> dict[str, dict[float, float]]:
    """The validation loss of each arm at each rate. UserError, when all have ended, if some failed."""
    losses: dict[str, dict[float, float]] = {arm: {} for arm in plan.arms}
    failed: list[str] = []
    waiting, running = list(reversed(trials)), dict[Any, tuple[str, float, trial.Job]]()
    while waiting or running:
        while waiting and len(running) < runner.at_once:
            one = waiting.pop()
            running[runner.start(one[2], Judge(None, None, []))] = one
        for handle, outcome in runner.wait(list(running)):
            arm, rate, job = running.pop(handle)
            if outcome.loss is None:
                failed.append(f"{job.name} ({job}):\n{quoted(outcome.log)}")
            else:
                losses[arm][rate] = outcome.loss
                say(f"{arm}, rate {rate:g}: validation loss {outcome.loss:.4f} ({job.name})")
    if failed:
        raise listing(failed, f"{len(failed)} trials failed; the same command tries them again:")
    return losses


def _tested(arm: str, rate: float, losses: dict[float, float], runner: run.Local, job: trial.Job) -> Chosen:
    """Run the whole pipeline of an arm with all seeds. UserError if that fails."""
    say(f"{arm}: tested at rate {rate:g} with seeds {', '.join(map(str, job.seeds))} as {job.name}")
    outcome = runner.test(job)
    if outcome.state == trial.FAILED:
        raise UserError(f"{job.name}: failed; the same command tries it again\n{quoted(outcome.log)}")
    return Chosen(arm, rate, losses, job.name, identity.digest_of(outcome.log, job.seeds))


def _job(
    plan: Arms, name: str, content: Mapping[str, Any], number: int, arm: str, rate: float, seeds: Sequence[int]
) -> trial.Job:
    given = _given(content, plan, arm, rate, seeds)
    overrides = tuple(f"{key}={hydra(one)}" for key, one in _values(plan, arm, rate, seeds).items())
    return trial.Job(number, f"{name}-{arm}-{digest(given)}", overrides, given)


def _given(content: Mapping[str, Any], plan: Arms, arm: str, rate: float, seeds: Sequence[int]) -> dict[str, Any]:
    """All parameters of an arm."""
    return spec.replaced(content, _values(plan, arm, rate, seeds))


def _values(plan: Arms, arm: str, rate: float, seeds: Sequence[int]) -> dict[str, Any]:
    """What a trial of an arm has instead of the values in params.yaml, by dotted name."""
    return {**plan.overrides(arm), RATE: rate, "seeds": list(seeds)}


def _unknown(
    place: str, values: Mapping[str, Value], allowed: Sequence[str], content: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with the names of parameters."""
    for name in values:
        if name.partition(".")[0] not in allowed:
            ours = ", ".join(f"{one}.*" for one in allowed)
            yield f"{place}.{name}: only {ours} may differ, so that all arms answer the same and are judged alike"
            continue
        inner: Any = content
        for part in name.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) and part in inner else _MISSING
        if inner is _MISSING:
            yield f"{place}.{name}: there is no such parameter"


_MISSING = object()
