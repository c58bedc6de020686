"""The seal of a run: a manifest with the sha256 of everything in it, and a tag with the sha256 of the manifest."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core import records
from pipeline.record.runs import NOTE, Record, Stored, in_line

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
SEALED_TAGS = ("dvc.digest", "trial.", "claim.", "git.", "device", "machine.", "version.", "mlflow.source.", NOTE)
"""Beginnings of the names of tags that never change. A user may add other tags, and rename the run."""


def manifest(record: Record) -> dict[str, str]:
    """sha256 of every parameter, metric with its curve, sealed tag and file of a record, by its place in the run."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in record.metrics:
        curves.setdefault(point.name, []).append((point.step, float(point.value)))
    latest = {name: max(curve)[1] for name, curve in curves.items()}
    files: dict[str, Path] = {}
    for path, folder in record.files:
        prefix = f"{folder}/" if folder else ""
        within = [(file, file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        files |= {f"{prefix}{relative.as_posix()}": file for file, relative in within or [(path, Path(path.name))]}
    return _digests(record.params, record.tags, curves, latest, files)


def manifest_now(client: Any, run: Any, folder: Path) -> dict[str, str]:
    """The same of an MLflow run as it is in the store now; its artifacts are in `folder`."""
    curves = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files.pop(MANIFEST, None)
    return _digests(run.data.params, run.data.tags, curves, run.data.metrics, files)


def _digests(
    params: Mapping[str, str],
    tags: Mapping[str, str],
    curves: Mapping[str, list[tuple[int, float]]],
    latest: Mapping[str, float],
    files: Mapping[str, Path],
) -> dict[str, str]:
    content = {f"params/{name}": value for name, value in params.items()}
    content |= {f"tags/{name}": value for name, value in tags.items() if name.startswith(SEALED_TAGS)}
    # MLflow keeps the last value of a curve a second time.
    content |= {f"metrics/{name}": json.dumps([sorted(curve), latest.get(name)]) for name, curve in curves.items()}
    digests = {place: records.sha256_text(text) for place, text in content.items()}
    return digests | {f"artifacts/{name}": records.sha256_file(path) for name, path in files.items()}


def put(client: Any, run_id: str, record: Record) -> None:
    """Seal a run that has everything else: log its manifest, and set the tag."""
    content = manifest(record)
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        # MLflow wrote these files itself.
        for written in ("versions.json", *(["tables/predictions.json"] if record.predictions else [])):
            path = Path(client.download_artifacts(run_id, written, folder))
            content[f"artifacts/{written}"] = records.sha256_file(path)
        path = Path(folder) / MANIFEST
        records.write_json(path, content)
        client.log_artifact(run_id, str(path))
        client.set_tag(run_id, SEAL, records.sha256_file(path))


def faults(run: Stored, now: Mapping[str, str], folder: Path) -> list[str]:
    """What in a finished run is not as it was written; `now` and `folder` are as of `store.read_back`."""
    path = folder / MANIFEST
    if not path.is_file():
        return [f"artifacts/{MANIFEST} is missing"]
    if records.sha256_file(path) != run.tags.get(SEAL):
        return [f"artifacts/{MANIFEST} is not the one that the tag {SEAL} pins"]
    written = records.read_json(path)
    if not isinstance(written, dict):
        return [f"artifacts/{MANIFEST} is not a manifest"]
    changed = sorted(place for place in written if written[place] != now.get(place))
    # A user may add to a run, but not to the files that PEFT would load.
    added = sorted(place for place in now.keys() - written.keys() if place.startswith("artifacts/adapter/"))
    found = [f"{place} {'is not what was written' if place in now else 'is missing'}" for place in changed]
    return [in_line(fault) for fault in [*found, *(f"{place} was added" for place in added)]]
