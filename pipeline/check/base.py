"""The base model, as far as its configuration or header tells, and what other sections ask of it."""

from pathlib import Path

from pipeline.check.report import Report
from pipeline.core import contracts, params, paths
from pipeline.core.contracts import BaseFacts
from pipeline.fetch import glance
from pipeline.model import prompt
from pipeline.sources import address, hub, source


def examine(draft: params.Draft, report: Report) -> None:
    """Check what is said of the model, and what must fit it, against the model, where it is on this machine."""
    model = draft.get(params.Model)
    if model is None:
        return
    before = len(report.problems)
    with report.part():
        source.check(model.source, model.sha256, "model")
    if len(report.problems) > before:
        return
    place = _place(model)
    if place is None:
        report.left.append("model.source is not on this machine; stage fetch downloads and checks it")
        return
    with report.part():
        if (seen := glance.glance(place)) is None:
            return
        report.seen.append("the model's header" if place.is_file() else "the model's configuration")
        if (given := draft.get(params.Prompt)) is not None:
            report.problems += prompt.model_faults(given, seen.context, seen.chat_template)
        if (lora := draft.get(params.Lora)) is not None:
            with report.part():
                glance.require_adaptable(seen, lora)
        if (general := draft.get(params.Forget)) is not None:
            with report.part():
                general.require_model(seen.context, seen.chat_template)
        if (test := draft.get(params.Contamination)) is not None:
            with report.part():
                test.require_context(seen.context)
        if (quantize := draft.get(params.Quantize)) is not None and quantize.groups and seen.shape is not None:
            with report.part():
                seen.shape.require_groups(quantize.groups)


def _place(model: params.Model) -> Path | None:
    """Where the model's files are: a local path, the hub's cache, or what `fetch` made of the same source."""
    where = address.parse(model.source, "model")
    if isinstance(where, Path):
        return where
    if isinstance(where, address.Repo) and (found := hub.here(where)):
        return found
    if paths.BASE.is_dir() and paths.BASE_FACTS.is_file():
        facts = contracts.read(paths.BASE_FACTS, BaseFacts)
        return paths.BASE if facts.source == model.source else None
    return None
