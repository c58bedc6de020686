"""Adapters as versions of a registered model in MLflow; the alias `champion` names the best.

A version is one adapter. Of several seeds it is the one with the lowest validation loss, since a choice by test scores
would flatter it. So `promote` compares adapters, and `lora-repro compare` ways to make them. The alias moves only to an
adapter that is shown to be better than its own base and than the champion, paired on the same test examples, in every
metric of `compare.decide_by`. Each experiment that was scored on this test split is a look at it, and has its own level
of significance (`pipeline.record.looks`): else the best of many equal adapters would become the champion by chance.

The files of a version are those of its run (`adapter/<seed>`), which are sealed and which `lora-repro verify` checks.
`mlflow.register_model` is not used: it needs an `MLmodel` file beside them, which PEFT does not write.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.commands import show
from pipeline.commands.compare import Experiment, gain, gain_over_base, of_artifacts
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import TrainingSummary
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.record import address, identity, looks, seal, store
from pipeline.record.runs import DIGEST, NOTE, TEST, Stored, of_digest
from pipeline.report import wording
from pipeline.score import intervals
from pipeline.score.comparison import Result, Verdict
from pipeline.score.contrast import verdict
from pipeline.score.metrics import LABELS

ALIAS = "champion"
SEED = "seed"
ADAPTER = "adapter_sha256"
AGAINST = "against_champion"
WORDS: dict[Verdict, str] = {
    "better": "better",
    "partly-better": "better in part of the metrics",
    "unspecific": "not specific to the source",
    "worse": "worse",
    "partly-worse": "worse in part of the metrics",
    "mixed": "the metrics disagree",
    "equivalent": "equivalent",
    "none": "no difference shown",
    "few": "too few groups of test examples",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter of a run, with its scores and its validation loss; `seeds` is the number of seeds in the run."""

    run: Stored
    seed: int
    seeds: int
    loss: float
    sha256: str
    scored: Experiment

    @property
    def test(self) -> str:
        return self.scored.base.test_sha256

    def __str__(self) -> str:
        chosen = f", the lowest of {self.seeds} seeds" if self.seeds > 1 else ""
        return f"seed {self.seed} of {self.run}, validation loss {self.loss:.4f}{chosen}"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the alias moves and why, and the comparison with the champion if there was one."""

    moves: bool
    why: str
    against: str | None = None


def register_and_decide(name: str | None, model: str | None, given: params.Params, dry_run: bool) -> None:
    """Register the adapter of a run as a version, move the alias if the adapter is better, and print why.

    `name` is a run as of `show.find`, by default that of the working directory; `model` is a registered model, by
    default one named as `tracking.experiment`. With `dry_run`, nothing is written. UserError if there is no such run,
    if it is not finished or not as it was written, and if the champion was tested on other examples or scored in
    another way.
    """
    tracking = given.tracking
    model = _named(tracking.experiment if model is None else model)
    runs = store.stored(tracking)
    one = _candidate(_run(name, given, runs), tracking)
    if one.scored.base.decoding.split != "test":
        raise UserError(
            f"{one.run} was scored on the {one.scored.base.decoding.split} split, which is for choosing: "
            "`lora-repro unseal` scores it on the test split, and that run can be promoted"
        )
    seen = looks.among(runs, looks.Look.of(one.run.tags))
    given = _at_level(given, seen)
    base = gain_over_base(one.scored, given.compare)
    settle = _planned if dry_run else _settled
    say(f"adapter   {one}")
    say(f"looks     {seen.told()} {_levels(given, seen)}")
    say(f"base      {_figures(base)}: {_word(base)}")
    for line in settle(one, base, model, runs, given):
        say(line)


def _at_level(given: params.Params, seen: looks.Looks) -> params.Params:
    """The parameters with the confidence that the experiment needs, as one look of several."""
    needed = looks.level(seen.place, given.compare.confidence)
    return given.model_copy(update={"compare": given.compare.model_copy(update={"confidence": needed})})


def _levels(given: params.Params, seen: looks.Looks) -> str:
    """Which level the experiment has, and why."""
    alpha = 100 * (1 - given.compare.confidence)
    text = f"This is look {seen.place}: intervals of {100 - alpha:.6g} %, p up to {alpha / 100:.2g}."
    if alpha / 100 < intervals.LEAST_P:
        text += " So small a p cannot be shown: take a new test split."
    return text


def _planned(
    one: Candidate, base: Mapping[str, Result], model: str, runs: list[Stored], given: params.Params
) -> Iterator[str]:
    """Lines that say what `_settled` would do."""
    with store.opened(given.tracking) as client:
        champion, versions = _champion(client, model), _listed(client, model)
    decision = _decide(one, base, champion, runs, given)
    known = next((version for version in versions if _is(one, version)), None)
    version = f"version {known.version}" if known else "a new version"
    yield from _against(decision)
    yield f"version   {'it is' if known else 'it would be'} {version} of {model}"
    yield _result(decision, champion, f"would move to {version}")


def _settled(
    one: Candidate, base: Mapping[str, Result], model: str, runs: list[Stored], given: params.Params
) -> Iterator[str]:
    """Register the adapter and move the alias. Yields lines that say so.

    If another process moves the alias during the decision, it is made again.
    """
    while True:
        with store.opened(given.tracking) as client:
            before = _champion(client, model)
        decision = _decide(one, base, before, runs, given)
        with store.opened(given.tracking) as client:
            champion = _champion(client, model)
            if (champion and champion.version) == (before and before.version):
                versions = _listed(client, model)
                version = next((known for known in versions if _is(one, known)), None)
                new = version is None
                version = version or _register(client, model, one, base)
                if decision.against:
                    client.set_model_version_tag(model, version.version, AGAINST, decision.against)
                if decision.moves:
                    client.set_registered_model_alias(model, ALIAS, version.version)
                break
    yield from _against(decision)
    yield f"version   {version.version} of {model}, {'new' if new else 'registered before'}"
    yield _result(decision, champion, f"moves to version {version.version}")
    if champion or decision.moves:
        uri = shlex.quote(f"models:/{model}@{ALIAS}")
        yield f"fetch     {address.COMMAND} artifacts download --artifact-uri {uri} --dst-path {ALIAS}"


def _against(decision: Decision) -> Iterator[str]:
    if decision.against:
        yield f"champion  {decision.against}"


def _result(decision: Decision, champion: Any, moving: str) -> str:
    stays = f"{ALIAS} stays version {champion.version}" if champion else f"there is no {ALIAS}"
    return f"result    {f'{ALIAS} {moving}' if decision.moves else stays}: {decision.why}"


# The adapters that are compared


def _run(name: str | None, given: params.Params, runs: list[Stored]) -> Stored:
    if name is not None:
        run = show.find(name, runs)
        if not run.finished or DIGEST not in run.tags:
            raise UserError(f"{run} is not a finished experiment, its status is {run.status}: name another run")
        return run
    if not paths.DVC_LOCK.is_file():
        raise UserError(f"{paths.DVC_LOCK} is missing: run `dvc repro`, which makes it, or name a run")
    if found := of_digest(identity.digest_here(given.seeds), runs):
        return found[0]
    raise UserError("the experiment of this folder is not recorded: run `dvc repro`, or name a run")


def _candidate(run: Stored, tracking: params.Tracking, seed: int | None = None) -> Candidate:
    """The adapter of `seed` of a run, by default of the lowest validation loss; UserError if a file has changed."""
    with store.copied(run, tracking) as (folder, held):
        if faults := seal.faults(run, held, folder):
            raise listing(faults, f"{run} is not what was written, so it cannot be trusted:")
        scored = of_artifacts(run, folder)
        seeds = run.seeds
        losses = {one: _loss(folder / "training" / f"{one}.json") for one in seeds}
        if seed is None:
            seed = min(losses, key=lambda one: losses[one])
        sha256 = records.sha256_tree(folder / "adapter" / str(seed))
    tuned = [item for item in scored.tuned if item.variant == paths.variant(seed)]
    # With the id: two runs may have the same name.
    scored = replace(scored, name=str(run), tuned=tuned)
    return Candidate(run, seed, len(seeds), losses[seed], sha256, scored)


def _loss(summary: Path) -> float:
    """The validation loss of the adapter that was kept. With early stopping it need not be the last."""
    return contracts.read(summary, TrainingSummary).kept_loss


def _decide(
    one: Candidate, base: Mapping[str, Result], champion: Any, runs: list[Stored], given: params.Params
) -> Decision:
    if champion is not None and _is(one, champion):
        return Decision(False, "it is this adapter")
    if _verdict(base) != "better":
        return Decision(False, f"the adapter is not shown to be better than its base ({_word(base)})")
    if champion is None:
        return Decision(True, "it is better than its base, and there was none")
    if (champion.tags.get(DIGEST), champion.tags.get(SEED)) == (one.run.tags[DIGEST], str(one.seed)):
        return Decision(True, f"it is the adapter of version {champion.version}, whose run was recorded anew")
    before = _candidate_of(champion, runs, given.tracking)
    try:
        gained = gain(one.scored, before.scored, given.compare)
    except UserError as error:
        other = shlex.quote(f"{champion.name}-2")
        elsewhere = f"\nAdapters of another test set belong to another registered model: --model {other}"
        raise UserError(f"{error}{elsewhere}") from None
    against = f"version {champion.version} (run {before.run.name}): {_figures(gained)}: {_word(gained)}"
    if _verdict(gained) == "better":
        return Decision(True, f"it is better than version {champion.version}", against)
    why = {
        "few": f"its test examples have too few groups to compare it with version {champion.version}",
        "none": f"no difference from version {champion.version} is shown",
        "equivalent": f"it is equivalent to version {champion.version}",
        "worse": f"it is worse than version {champion.version}",
        "partly-better": f"not all metrics show it to be better than version {champion.version}",
        "partly-worse": f"it is worse than version {champion.version} in one metric",
        "mixed": f"the metrics disagree about it and version {champion.version}",
    }
    return Decision(False, why[_verdict(gained)], against)


def _candidate_of(champion: Any, runs: list[Stored], tracking: params.Tracking) -> Candidate:
    """The champion with its scores, from its run or the run that has replaced that."""
    own = [run for run in runs if run.run_id == champion.run_id]
    run = next(iter([*own, *of_digest(champion.tags.get(DIGEST, ""), runs)]), None)
    seed = champion.tags.get(SEED, "")
    if run is None or not seed.isdecimal():
        raise UserError(
            f"{ALIAS} is version {champion.version} of {champion.name}, and no run here holds its scores: restore its "
            "run, or remove the alias on MLflow's page of the model; the next champion is then the first"
        )
    return _candidate(run, tracking, int(seed))


def _verdict(results: Mapping[str, Result]) -> Verdict:
    return verdict(list(results.values()))


def _word(results: Mapping[str, Result]) -> str:
    return WORDS[_verdict(results)]


def _figures(results: Mapping[str, Result]) -> str:
    return ", ".join(
        f"{LABELS[name]} {wording.points(one.base.value)} → {wording.points(one.tuned.value)} "
        f"({wording.signed(one.deciding.value)}, {wording.span(one.deciding)})"
        for name, one in results.items()
    )


# The registry


def _named(model: str) -> str:
    if not re.fullmatch(r"[^/:'\"]+", model) or model != model.strip():
        raise UserError(f"{model!r} cannot be the name of a registered model (no / : or quotes): give one with --model")
    return model


def _listed(client: Any, model: str) -> list[Any]:
    """All versions of a registered model, the oldest first; none if it does not exist."""
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{model}'", page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))


def _champion(client: Any, model: str) -> Any:
    """The version with the alias; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(model, ALIAS)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model; no such alias
            return None
        raise


def _is(one: Candidate, version: Any) -> bool:
    """Whether a version is this adapter of this run. A run that was recorded anew has files of its own."""
    return bool(version.run_id == one.run.run_id and version.tags.get(SEED) == str(one.seed))


def _register(client: Any, model: str, one: Candidate, base: Mapping[str, Result]) -> Any:
    """Create a version with all its tags in one step, so that a killed process leaves a whole one or none."""
    from mlflow.exceptions import MlflowException

    about = (
        f"LoRA adapters in PEFT's format. The alias `{ALIAS}` moves only on a significant gain (`lora-repro promote`)."
    )
    try:
        client.create_registered_model(model, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "verdict": _verdict(base),
        "validation_loss": f"{one.loss:.6f}",
        SEED: str(one.seed),
        "base_model": one.run.params.get("model.source", "n/a"),
        "quantization": one.run.params.get("quantize.method", "n/a"),
        "signature": one.scored.base.signature,
        DIGEST: one.run.tags[DIGEST],
        TEST: one.test,
        ADAPTER: one.sha256,
    }
    return client.create_model_version(
        model,
        source=f"runs:/{one.run.run_id}/adapter/{one.seed}",
        run_id=one.run.run_id,
        tags=tags,
        description=one.run.tags.get(NOTE, "").replace("**", ""),
    )
