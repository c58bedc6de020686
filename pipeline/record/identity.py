"""What identifies an experiment: the parameters that its stages were locked with, and the content of their outputs.

The digest covers both, so an experiment that is reproduced under another name or on another day is the same one.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core import paths, records
from pipeline.core.errors import UserError
from pipeline.record import lockfile

UPSTREAM = ("prepare", "fetch", "quantize")
"""The stages that training depends on."""

BASELINES = ("infer-unquantized", "infer-shots", "evaluate-unquantized", "evaluate-shots")
"""The stages of the variants of the base that section `baseline` asks for. They depend on no adapter."""


@dataclass(frozen=True, slots=True)
class Locked:
    """What `dvc.lock` holds of one stage: its parameters by section, and the md5 of its outputs by path."""

    params: dict[str, Any]
    outs: dict[str, str]


Stages = dict[str, Locked]


def here(seeds: Sequence[int]) -> Stages:
    """The stages of the experiment in the working directory; UserError as of `stages_of`."""
    return stages_of(lockfile.text(paths.DVC_LOCK), seeds)


def stages_of(lock: str, seeds: Sequence[int]) -> Stages:
    """The stages of a complete experiment, without `track`, in the text of a `dvc.lock`; UserError as of `chosen`."""
    of_seeds = ("train", "infer-tuned", "forget", "evaluate-tuned")
    names = [*UPSTREAM, "infer@base", "evaluate@base", *BASELINES, "contamination", "compare"]
    return chosen(lock, names + [f"{stage}@{seed}" for seed in seeds for stage in of_seeds])


def stages_of_trial(lock: str, seeds: Sequence[int]) -> Stages:
    """The stages of a trial, which is trained and validated but not tested; UserError as of `chosen`."""
    return chosen(lock, [*UPSTREAM, *(f"train@{seed}" for seed in seeds)])


def chosen(lock: str, names: Sequence[str]) -> Stages:
    """The stages `names` in the text of a `dvc.lock`, which also keeps stages that `dvc.yaml` no longer has.

    UserError if a stage is missing, or was run with another adapter, as after `dvc repro train@17` alone.
    """
    locked = lockfile.stages_of(lock, paths.DVC_LOCK.name)
    if missing := [name for name in names if name not in locked]:
        raise UserError(f"{paths.DVC_LOCK} has no {', '.join(missing)}: run `dvc repro`")
    made = {path: md5 for name in names for path, md5 in lockfile.outs_of(locked[name]).items()}
    for name in names:
        for path, md5 in lockfile.deps_of(locked[name]).items():
            if path.startswith(f"{paths.ADAPTERS.as_posix()}/") and made.get(path, md5) != md5:
                raise UserError(
                    f"{paths.DVC_LOCK} mixes two experiments, {name} was run with another {path}: run `dvc repro`"
                )
    return {name: Locked(lockfile.params_of(locked[name]), lockfile.outs_of(locked[name])) for name in names}


def digest(stages: Stages) -> str:
    """The digest of the experiment with these stages."""
    return _digest_of({name: asdict(one) for name, one in stages.items()})


def _digest_of(content: Any) -> str:
    return records.sha256_text(
        json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    )


def digest_here(seeds: Sequence[int]) -> str:
    """The digest of the experiment in the working directory; UserError as of `chosen`."""
    return digest(here(seeds))


def digest_of(lock: str, seeds: Sequence[int]) -> str:
    """The digest of the experiment in the text of a `dvc.lock`; UserError as of `chosen`."""
    return digest(stages_of(lock, seeds))


def answers(stages: Stages) -> str:
    """The digest of what makes the answers of base and tuned, to whatever split: data, models, adapters, decoding."""
    names = [name for name in stages if name in UPSTREAM or name.startswith(("train@", "infer@", "infer-tuned@"))]
    made = {name: stages[name].outs for name in names if not name.startswith("infer")}
    asked = {name: _without(stages[name].params, "evaluate.split") for name in names}
    return _digest_of([made, asked])


def rule(stages: Stages) -> str:
    """The digest of the rule of the decision: what is scored and compared, and how. What only the report shows, and
    the split, do not belong to it."""
    given = stages["compare"].params
    decides = _without(given.get("compare", {}), "examples", "explorer", "published")
    return _digest_of([given.get("seeds"), _without(given.get("evaluate", {}), "split"), decides])


def _without(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in names}


def params_of(stages: Stages) -> dict[str, str]:
    """Every parameter that a stage was locked with, by dotted name; UserError if two stages disagree."""
    merged: dict[str, str] = {}
    stage_of: dict[str, str] = {}
    for stage, content in stages.items():
        for key, value in flat(content.params):
            if merged.setdefault(key, value) != value:
                raise UserError(
                    f"{paths.DVC_LOCK} mixes two experiments, {key} differs between {stage_of[key]} and {stage}: "
                    "run `dvc repro`"
                )
            stage_of.setdefault(key, stage)
    return merged


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters by dotted name. Text stays; all else becomes JSON, also a mapping with keys that MLflow refuses.

    The items of a list that have names, as the probes of forgetting, stand under these: `forget.probes.code.tokens`.
    """
    for name, value in values.items():
        yield from _leaves(value, name)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, list) and _has_names(value):
        value = {item["name"]: {key: inner for key, inner in item.items() if key != "name"} for item in value}
    if isinstance(value, Mapping) and value and all(re.fullmatch(r"[\w\- ]+", str(key)) for key in value):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _has_names(items: list[Any]) -> bool:
    """Whether each item of a list is a mapping with a name, and these differ."""
    names = [item.get("name") if isinstance(item, Mapping) and len(item) > 1 else None for item in items]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names) > 0
