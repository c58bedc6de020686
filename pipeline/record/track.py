"""One complete MLflow run for each experiment, written after the fact from `dvc.lock` and the outputs.

A stage that DVC restores from its run cache executes no code, so a record kept by the stages themselves would be false.
The last stage therefore writes the whole record, and an experiment is known by a digest of what DVC locked: parameters
in, content out. Reproducing it, under whatever name, on whatever day, finds the run that is there.

MLflow is imported inside functions: it takes seconds, and the command line should not pay them.
"""

import csv
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError, listing
from pipeline.core.progress import say
from pipeline.record import lockfile, provenance, store
from pipeline.record.store import Point, Record

COMMAND = "dvc repro --force --single-item track"
"""Writes the page, the MLflow run of the working directory, unless a finished one is there, and the receipt."""

UPSTREAM = ("prepare", "fetch", "quantize")
"""The stages that training rests on."""

Stages = dict[str, dict[str, Any]]


def track(train_seeds: list[int], tracking: params.Tracking) -> None:
    """Record the experiment in the working directory, unless it is recorded already, and write `paths.RECEIPT`.

    Before that, publish its comparison: DVC has removed the reports, and what the store refuses is read all the same.

    UserError when `dvc.lock` or an output is missing, when `dvc.lock` mixes two experiments, for a metric that MLflow
    cannot hold, and for a store that cannot be used. A run is FINISHED only when everything is in it.
    """
    publish()
    record = gather(train_seeds)
    _refuse_other_content(record, _stages(train_seeds))
    [(run, word)] = store.write([record], tracking)
    records.write_json(paths.RECEIPT, {"digest": record.digest})
    say(f"{word}: {store.line(run, tracking)}")


def publish() -> None:
    """Copy the files of `paths.COMPARISON`, which a cache may have restored, to `paths.REPORTS`."""
    for path in sorted(path for path in paths.COMPARISON.rglob("*") if path.is_file()):
        with records.replacing(paths.published(path)) as temporary:
            shutil.copyfile(path, temporary)


def describe(train_seeds: list[int], tracking: params.Tracking) -> str:
    """Where the record of the working directory is, in one line; the store is opened only if it is there."""
    digest = _digest(_stages(train_seeds))
    file = store.database(tracking)
    if file is None or file.exists():
        with store.opened(tracking) as client:
            experiment = client.get_experiment_by_name(tracking.experiment)
            for run in store.runs(client, experiment.experiment_id, store.DIGEST, digest) if experiment else []:
                if run.info.status == "FINISHED":
                    return store.line(run, tracking)
    return "not recorded: run `dvc repro` (or `dvc repro --single-item --force track` if that finds nothing to do)"


# What an experiment is


def _stages(seeds: list[int]) -> Stages:
    return _locked(lockfile.text(paths.DVC_LOCK), _names(seeds))


def _names(seeds: list[int]) -> list[str]:
    """The stages of a complete experiment, but for `track`."""
    names = [*UPSTREAM, "infer@base", "evaluate@base", "compare"]
    of_seeds = ("train", "infer-tuned", "forget", "evaluate-tuned")
    return names + [f"{stage}@{seed}" for seed in seeds for stage in of_seeds]


def _locked(lock: str, names: list[str]) -> Stages:
    """Parameters and outputs of some stages, as `{stage: {params, outs}}`, from the text of a `dvc.lock`.

    It also keeps stages that `dvc.yaml` no longer has, such as a seed's after the seeds changed: not these. UserError
    where a stage is missing, or read another adapter than the one there, as after `dvc repro train@17` alone.
    """
    locked = lockfile.stages_of(lock, paths.DVC_LOCK.name)
    if missing := [name for name in names if name not in locked]:
        raise UserError(f"{paths.DVC_LOCK} has no {', '.join(missing)}: run `dvc repro`")
    made = {out["path"]: out["md5"] for name in names for out in locked[name].get("outs", [])}
    adapters = paths.ADAPTERS.as_posix()
    for name in names:
        for dep in locked[name].get("deps", []):
            if dep["path"].startswith(f"{adapters}/") and made.get(dep["path"], dep["md5"]) != dep["md5"]:
                raise UserError(
                    f"{paths.DVC_LOCK} mixes two experiments, {name} was run with another {dep['path']}: run "
                    "`dvc repro`"
                )
    return {
        name: {
            "params": {
                key: value for of_file in locked[name].get("params", {}).values() for key, value in of_file.items()
            },
            "outs": {out["path"]: out["md5"] for out in locked[name].get("outs", [])},
        }
        for name in names
    }


def _digest(stages: Stages) -> str:
    canonical = json.dumps(stages, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return records.sha256_text(canonical)


def digest_of(lock: str, seeds: list[int]) -> str:
    """The digest of the experiment that the text of a `dvc.lock` holds; UserError where it lacks a stage."""
    return _digest(_locked(lock, _names(seeds)))


def params_of(lock: str, seeds: list[int]) -> dict[str, str]:
    """The parameters by dotted name, as a run has them, of the experiment that the text of a `dvc.lock` holds."""
    return _params(_locked(lock, _names(seeds)))


def outs_of(lock: str, seeds: list[int]) -> dict[str, dict[str, str]]:
    """The outputs of each stage, as `{stage: {path: md5}}`, that the text of a `dvc.lock` holds."""
    return {name: content["outs"] for name, content in _locked(lock, _names(seeds)).items()}


# What goes into its run


def _refuse_other_content(record: Record, stages: Stages) -> None:
    """UserError where an output that goes into the run is not what its stage wrote.

    DVC takes a file for what it was by time and size, and restores what has rotted in its cache.
    """
    recorded = [path for path, _ in record.files] + [paths.split("test"), *paths.PREDICTIONS.glob("*.jsonl")]
    changed = [
        f"{out}: not what stage {name} wrote"
        for name, content in stages.items()
        for out, md5 in content["outs"].items()
        if any(path.is_relative_to(out) or Path(out).is_relative_to(path) for path in recorded)
        and records.dvc_md5(Path(out)) != md5
    ]
    if changed:
        remedy = "`lora-repro verify` says what mends it"
        raise listing(changed, f"nothing is recorded of outputs that have changed on the disk; {remedy}:")


def gather(seeds: list[int]) -> Record:
    """All that a run of the experiment in the working directory holds; UserError as of `track`."""
    stages = _stages(seeds)
    digest = _digest(stages)
    sha, dirty = provenance.commit(Path())
    experiment = provenance.experiment()
    # Many experiments share a commit that they differ from: its name alone would be none.
    at_commit = sha and (f"{sha[:7]}+{digest[:7]}" if dirty else sha[:7])
    tags = {
        store.DIGEST: digest,
        store.EXPERIMENTS: experiment,
        store.COMMITS: sha,
        "mlflow.source.name": "dvc repro",
        store.COMMIT: sha,
        "git.dirty": str(dirty).lower() if sha else None,
        "device": records.read_json(paths.decoding("base"))["device"],
        store.NOTE: paths.COMPARISON_MD.read_text(encoding="utf-8").split("\n", 1)[0][: store.MAX_TAG],
        "energy": _meters(seeds, Path()),
        **store.surroundings(),
    }
    files: list[tuple[Path, str | None]] = [(paths.DVC_LOCK, None), (paths.PARAMS, None), (paths.DATA_CARD, "data")]
    files += [(path, "models") for path in (paths.BASE_FACTS, paths.QUANTIZED_FACTS)]
    reports = (paths.METRICS, paths.COMPARISON_MD, paths.REPORT_HTML, paths.COMPARISON_SVG)
    files += [(path, "reports") for path in reports]
    files += [(folder, f"reports/{folder.name}") for folder in (paths.FIGURES, paths.TABLES)]
    files += [(paths.scores(variant), paths.SCORES.name) for variant in map(paths.variant, (None, *seeds))]
    for seed in seeds:
        files.append((paths.adapter(seed), f"adapter/{seed}"))
        files += [(path, "training") for path in (paths.training_summary(seed), paths.training_log(seed))]
        files.append((paths.forgetting(seed), paths.FORGETTING.name))
    if missing := [str(path) for path, _ in files if not path.exists()]:
        raise listing(missing, "outputs are missing, run `dvc repro` or `dvc checkout`:")
    metrics = [*_results(), *_training(seeds, Path()), *_costs(seeds, Path())]
    return Record(
        name=experiment or at_commit or digest[:12],
        tags={key: value for key, value in tags.items() if value is not None},
        params=_params(stages),
        metrics=metrics,
        predictions=_predictions(seeds),
        files=files,
    )


def gather_trial(root: Path, commit: str, seeds: list[int], name: str, sweep: str, loss: float) -> Record:
    """All that the run of the trial `name` holds, whose outputs are in the project folder `root`."""
    lock = (root / paths.DVC_LOCK).read_text(encoding="utf-8")
    stages = _locked(lock, [*UPSTREAM, *(f"train@{seed}" for seed in seeds)])
    files: list[tuple[Path, str | None]] = [(root / paths.DVC_LOCK, None), (root / paths.PARAMS, None)]
    for seed in seeds:
        files.append((root / paths.adapter(seed), f"adapter/{seed}"))
        files += [(root / path, "training") for path in (paths.training_summary(seed), paths.training_log(seed))]
    metrics = [Point("validation_loss", loss), *_training(seeds, root), *_costs(seeds, root)]
    device = records.read_json(root / paths.training_summary(seeds[0]))["device"]
    note = f"Trial of sweep {sweep}: validation loss {loss:.4f}; not tested"
    tags = _trial_tags(commit, _digest(stages), name, sweep, note) | {"trial.state": "complete", "device": device}
    return Record(name, tags, _params(stages), metrics, {}, files)


def gather_pruned(
    commit: str, given: Mapping[str, Any], name: str, sweep: str, curve: list[tuple[int, float]]
) -> Record:
    """What there is of a trial that was ended early: its parameters, and its validation losses until then."""
    values = dict(leaf for section, value in given.items() for leaf in _flat(value, section))
    tags = _trial_tags(commit, "", name, sweep, f"Trial of sweep {sweep}: pruned; not tested")
    identity = json.dumps([commit, values, curve], sort_keys=True)
    tags |= {store.TRIAL: records.sha256_text(identity), "trial.state": "pruned"}
    points = [Point("validation/loss", loss, step) for step, loss in curve]
    return Record(name, tags, {key: store.cut(value, "params.yaml") for key, value in values.items()}, points, {}, [])


def _trial_tags(commit: str, digest: str, name: str, sweep: str, note: str) -> dict[str, str]:
    tags = {
        store.TRIAL: digest,
        "kind": "trial",
        store.SWEEP: sweep,
        store.EXPERIMENTS: name,
        "mlflow.source.name": "lora-repro sweep",
        store.NOTE: note,
    }
    # A trial differs from its commit in its parameters.
    return tags | {store.COMMITS: commit, store.COMMIT: commit, "git.dirty": "true"} | store.surroundings()


def _params(stages: Stages) -> dict[str, str]:
    """Every parameter that a stage was locked with, by dotted name; UserError where two stages disagree."""
    merged: dict[str, str] = {}
    stage_of: dict[str, str] = {}
    for stage, content in stages.items():
        leaves = (leaf for section, value in content["params"].items() for leaf in _flat(value, section))
        for key, value in leaves:
            if merged.setdefault(key, value) != value:
                raise UserError(
                    f"{paths.DVC_LOCK} mixes two experiments, {key} differs between {stage_of[key]} and {stage}: "
                    "run `dvc repro`"
                )
            stage_of.setdefault(key, stage)
    return {key: store.cut(value, "params.yaml") for key, value in merged.items()}


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Leaves by dotted name: text as it is, the rest as JSON, as is a mapping with keys that MLflow refuses."""
    if isinstance(value, Mapping) and value and all(re.fullmatch(r"[\w\- ]+", str(key)) for key in value):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _results() -> Iterator[Point]:
    """The comparison, the sizes of the data, and what quantization cost in quality."""
    yield from _numbers(records.read_json(paths.METRICS))
    for split, facts in records.read_json(paths.DATA_CARD)["splits"].items():
        for name in ("read", "rows", "groups"):
            yield Point(f"data/{split}_{name}", facts[name])
    for name, value in records.read_json(paths.QUANTIZED_FACTS).items():
        if _is_number(value):
            yield Point(f"quantize/{name}", value)


def _numbers(value: Any, name: str = "") -> Iterator[Point]:
    """The leaves of `reports/metrics.json` by dotted name; whatever is no number is refused, not skipped."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else key)
    elif _is_number(value):
        yield Point(name, value)
    else:
        raise UserError(f"{paths.METRICS}: {name} = {value!r} is not a number")


def _training(seeds: list[int], root: Path) -> Iterator[Point]:
    for seed in seeds:
        prefix = f"seed-{seed}/" if len(seeds) > 1 else ""
        summary = records.read_json(root / paths.training_summary(seed))
        for name, value in summary.items():
            if _is_number(value) and name != "seed":
                yield Point(f"{prefix}training/{name}", value)
        for entry in summary["validation"]:
            yield Point(f"{prefix}validation/loss", entry["loss"], entry["step"])
        with (root / paths.training_log(seed)).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                yield from (Point(f"{prefix}train/{name}", float(cell), step) for name, cell in row.items())


def _costs(seeds: list[int], root: Path) -> Iterator[Point]:
    """Time, memory and measured energy of each stage, where this folder ran it for the very result that is here now.

    A result restored from a cache cost this experiment nothing, and what it cost another is in the other's run.
    """
    for stage, cost in spent(seeds, root).items():
        names = {"seconds": "seconds", "peak_memory_mb": "peak_mb", "peak_device_memory_mb": "peak_device_mb"}
        names |= {"energy_kwh": "energy_kwh"}
        yield from (Point(f"cost/{stage}_{name}", cost[key]) for key, name in names.items() if key in cost)


def _meters(seeds: list[int], root: Path) -> str | None:
    """What measured the energy of the stages that ran here, or why nothing did."""
    costs = spent(seeds, root).values()
    meters = dict.fromkeys(str(cost["energy_meter"]) for cost in costs if "energy_meter" in cost)
    return "; ".join(meters)[: store.MAX_TAG] or None


def spent(seeds: list[int], root: Path) -> dict[str, dict[str, Any]]:
    """The cost of each stage (`stage.run`), empty where the folder did not run it for the result that is there now."""
    results = {"prepare": paths.DATA_CARD, "fetch": paths.BASE_FACTS, "quantize": paths.QUANTIZED_FACTS}
    results |= {"infer-base": paths.predictions(paths.variant(None))}
    for seed in seeds:
        results[f"train-{seed}"] = paths.training_summary(seed)
        results[f"infer-tuned-{seed}"] = paths.predictions(paths.variant(seed))
        results[f"forget-{seed}"] = paths.forgetting(seed)
    found: dict[str, dict[str, Any]] = {}
    for stage, result in results.items():
        noted = root / paths.costs(result)
        cost = records.read_json(noted) if noted.exists() else {}
        found[stage] = cost if cost and cost["result_sha256"] == records.sha256_path(root / result) else {}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _predictions(seeds: list[int]) -> dict[str, list[Any]]:
    """One row a test example: its text, what each variant wrote, and each variant's scores."""
    variants = {"base": paths.variant(None)}
    variants |= {("tuned" if len(seeds) == 1 else paths.variant(seed)): paths.variant(seed) for seed in seeds}
    examples = records.read_rows(paths.split("test"), records.Example)
    table: dict[str, list[Any]] = {
        "id": [row.id for row in examples],
        "aspect": [row.aspect for row in examples],
        "source": [row.source for row in examples],
        "reference": [row.target for row in examples],
    }
    scores: dict[str, list[float]] = {}
    for column, variant in variants.items():
        written = records.read_rows(paths.predictions(variant), records.Prediction)
        scored = records.read_json(paths.scores(variant))["examples"]
        if not table["id"] == [row.id for row in written] == [row["id"] for row in scored]:
            raise UserError(f"predictions or scores of {variant} are not of this test split: run `dvc repro`")
        table[column] = [row.text for row in written]
        for metric in (name for name in scored[0] if name not in ("id", "group", "aspect")):
            scores[f"{metric} {column}"] = [row[metric] for row in scored]
    return table | scores
