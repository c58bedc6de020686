"""Parity: what is lost when the experiment leaves transformers for llama.cpp, measured on the same token ids.

Three questions, for the base and for the first seed's adapter on it. How many of the tokens that greedy decoding writes
are the same, up to an answer's first difference? How likely does each backend find the references of the validation
split? And does it score lower on the test split, where the difference has a paired interval over groups
(`pipeline.score.significance`)? A GGUF type loses where such an interval lies below zero, or where perplexity rises
by more
than a stated share; a difference that merely may be one is not called a loss.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from pipeline import gguf as gguf_file
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.core.progress import bar, say
from pipeline.core.records import Example
from pipeline.infer import backend, backend_llamacpp, choice
from pipeline.infer import infer as generate
from pipeline.lora import adapter
from pipeline.model import checkpoint, loss, pack
from pipeline.model.prompt import Encoder, Row
from pipeline.score import compare as comparison
from pipeline.score import metrics
from pipeline.score.compare import Table
from pipeline.score.significance import Interval


@dataclass(frozen=True)
class Side:
    """What one backend made of one variant. `loss` is the sum over the validation references' tokens."""

    written: dict[str, list[int]]
    seconds: float
    loss: float
    table: Table

    @property
    def speed(self) -> float:
        """New tokens a second, prompts included in the time."""
        return sum(map(len, self.written.values())) / self.seconds


@dataclass(frozen=True)
class Agreement:
    """Two backends' tokens: shares of answers that are the same, and of tokens before an answer's first difference;
    the median place of that difference among the answers that have one."""

    answers: float
    tokens: float
    first_difference: float | None


def parity(given: params.Params, types: Sequence[str], rows: int | None, merged: bool, max_rise: float) -> bool:
    """Compare, write `reports/parity.md` and `.json`, and say whether any of `types` loses.

    UserError for what llama.cpp cannot do with this experiment, and where the experiment has not been run.
    """
    # Read when OpenMP is loaded; as in `stage.run`.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    generations = {kind: _generation(given, kind) for kind in types}
    for generation in generations.values():
        params.require_backend(given.model_copy(update={"generation": generation}))
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    gguf_file.refuse(paths.QUANTIZED)
    tokenizer = checkpoint.tokenizer()
    encoder = Encoder(tokenizer, given.prompt, facts.context)
    test = _first_groups(records.read_rows(paths.split("test"), Example), rows)
    prompts = {example.id: encoder.prompt(example) for example in test}
    encoder.require_fit(prompts, "test", given.generation.max_new_tokens)
    validation = references(encoder, rows)
    tokens = sum(len(row.completion) for row in validation)
    if not tokens:
        raise UserError(f"no row of {paths.split('validation')} fits: parity needs references to take the loss of")
    longest = max(
        max(map(len, prompts.values())) + given.generation.max_new_tokens,
        max(len(row.prompt) + len(row.completion) for row in validation),
    )
    config = generate.configuration(given.generation, sorted({encoder.end, *facts.stop_ids}), tokenizer)
    saved = adapter.Saved(paths.adapter(given.seeds[0]))
    saved.require_of(facts.sha256)
    runtime = given.runtime.model_copy(update={"processes": 1, "sharding": "none"})
    variants = {paths.variant(None): None, paths.variant(given.seeds[0]): saved}
    groups = np.array([example.group for example in test])
    conditions: dict[str, Any] = {}

    def measured(kind: str | None) -> dict[str, Side]:
        generation = _generation(given, kind)
        sides = {}
        for variant, on_it in variants.items():
            setup = backend.Setup(facts, config, generation, runtime, on_it, longest)
            say(f"parity: {variant} through {generation.backend}{f', {kind}' if kind else ''}")
            if kind is None:
                engine = choice.chosen(generation.backend).load(setup)
            else:
                engine = backend_llamacpp.load(setup, merged)
            conditions[generation.backend] = {"device": engine.device, "threads": engine.threads, **engine.conditions}
            conditions[generation.backend].pop("gguf_type", None)
            sides[variant] = _side(engine, kind, test, prompts, validation, tokenizer, given.evaluate)
        return sides

    reference = measured(None)
    base, tuned = variants
    found: dict[str, Any] = {
        "test_rows": len(test),
        "groups": len(set(groups)),
        "validation_rows": len(validation),
        "validation_tokens": tokens,
        "prompts_sha256": records.sha256_ids(token for ids in prompts.values() for token in [*ids, -1]),
        "model_sha256": facts.sha256,
        "adapter_sha256": saved.sha256,
        "merged": merged,
        "max_rise": max_rise,
        "confidence": given.compare.confidence,
        "signature": metrics.signature(given.evaluate),
        "transformers": {
            "variants": {name: _told(side, tokens) for name, side in reference.items()},
            "gain": _contrast(reference[base], reference[tuned], groups, given),
        },
        "llama.cpp": {},
    }
    for kind in types:
        sides = measured(kind)
        told = {name: _told(side, tokens) for name, side in sides.items()}
        for name, side in sides.items():
            told[name] |= {
                "agreement": asdict(agreement(reference[name].written, side.written)),
                "rise": math.exp((side.loss - reference[name].loss) / tokens) - 1,
                "difference": _contrast(reference[name], side, groups, given),
            }
        found["llama.cpp"][kind] = {
            "variants": told,
            "gain": _contrast(sides[base], sides[tuned], groups, given),
            "loses": losing(told, given.compare.decide_by, max_rise),
        }
    found["conditions"] = conditions
    records.write_json(paths.PARITY_JSON, found)
    page = markdown(found, given.compare.decide_by)
    records.write_text(paths.PARITY_MD, page)
    say(page)
    return any(one["loses"] for one in found["llama.cpp"].values())


def agreement(reference: dict[str, list[int]], other: dict[str, list[int]]) -> Agreement:
    """How far the tokens of two backends are the same."""
    places = {name: _first_difference(ids, other[name]) for name, ids in reference.items()}
    differing = [place for place in places.values() if place is not None]
    same = sum(len(ids) if places[name] is None else places[name] or 0 for name, ids in reference.items())
    return Agreement(
        answers=1 - len(differing) / len(reference),
        tokens=same / sum(map(len, reference.values())),
        first_difference=float(np.median(differing)) if differing else None,
    )


def losing(told: dict[str, Any], decide_by: Sequence[str], max_rise: float) -> list[str]:
    """In which ways a GGUF type is worse than transformers, in words; none where no loss is shown."""
    reasons = []
    for variant, one in told.items():
        for metric in decide_by:
            difference = one["difference"][metric]
            if difference["high"] < 0:
                reasons.append(f"{variant} scores lower in {metric}: {_points(difference)}")
        if one["rise"] > max_rise:
            reasons.append(f"{variant}'s perplexity is {one['rise']:.1%} higher, and {max_rise:.1%} was allowed")
    return reasons


def markdown(found: dict[str, Any], decide_by: Sequence[str]) -> str:
    """The report that people read."""
    level = f"{found['confidence']:.0%}"
    lines = [
        "# Parity of transformers and llama.cpp",
        "",
        f"{found['test_rows']} test rows of {found['groups']} groups decoded greedily from the same token ids; "
        f"perplexity of {found['validation_tokens']} tokens in {found['validation_rows']} validation references. "
        f"Intervals: paired bootstrap over groups, {level}. The adapter is "
        f"{'merged into the GGUF file' if found['merged'] else 'a GGUF file of its own'}.",
        "",
        "| backend | variant | perplexity | rise | same answers | same tokens | first difference | tokens/s | "
        + " | ".join(decide_by) + " | " + " | ".join(f"{metric} against transformers" for metric in decide_by) + " |",
        "|---|---|---|---|---|---|---|---|" + "---|" * 2 * len(decide_by),
    ]  # fmt: skip
    sides = {"transformers": found["transformers"], **found["llama.cpp"]}
    for name, side in sides.items():
        for variant, one in side["variants"].items():
            cells = [name, variant, f"{one['perplexity']:.3f}"]
            if "agreement" in one:
                first = one["agreement"]["first_difference"]
                shares = (f"{one['agreement'][key]:.1%}" for key in ("answers", "tokens"))
                cells += [f"{one['rise']:+.2%}", *shares, "" if first is None else f"{first:g}"]
            else:
                cells += [""] * 4
            cells += [f"{one['tokens_per_second']:.0f}", *(f"{one['scores'][metric]:.1f}" for metric in decide_by)]
            cells += [_points(one["difference"][metric]) if "difference" in one else "" for metric in decide_by]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"What fine-tuning changes, tuned minus base, with {level} intervals:", ""]
    for name, side in sides.items():
        lines.append(f"- {name}: " + ", ".join(f"{metric} {_points(side['gain'][metric])}" for metric in decide_by))
    lines.append("")
    for kind, side in found["llama.cpp"].items():
        verdict = "; ".join(side["loses"]) or "no loss is shown"
        lines.append(f"**{kind}{' loses' if side['loses'] else ''}**: {verdict}.")
    return "\n".join(lines) + "\n"


def references(encoder: Encoder, count: int | None) -> list[Row]:
    """The first rows of the validation split, whole groups, so many at most where that is given, that fit."""
    examples = _first_groups(records.read_rows(paths.split("validation"), Example), count)
    rows = [encoder.row(example) for example in examples]
    return [row for row in rows if encoder.fits(row.prompt) and encoder.holds(row)]


def _generation(given: params.Params, kind: str | None) -> params.Generation:
    """The experiment's decoding through transformers, or through llama.cpp as GGUF of type `kind`."""
    change = {"backend": "transformers"} if kind is None else {"backend": "llama.cpp", "gguf_type": kind}
    if kind is not None and given.quantize.method == "int8":
        raise UserError("quantize.method = 'int8' quantizes activations as well: no GGUF file computes that")
    return params.checked(params.Generation, given.generation.model_dump() | change, "generation, for parity")


def _side(
    engine: Any,
    kind: str | None,
    test: Sequence[Example],
    prompts: dict[str, list[int]],
    validation: Sequence[Row],
    tokenizer: Any,
    evaluate: params.Evaluate,
) -> Side:
    families = [
        [(example.id, prompts[example.id]) for example in group]
        for _, group in groupby(test, key=lambda one: one.group)
    ]
    started = time.perf_counter()
    with bar("decode", len(test), "examples") as advance:
        written = {}
        for name, ids in choice.chosen("transformers" if kind is None else "llama.cpp").complete(engine, families):
            written[name] = ids
            advance(1)
    seconds = time.perf_counter() - started
    total = 0.0
    with bar("references", len(validation), "rows") as advance:
        for row in validation:
            if kind is None:
                total += _loss(engine.model, row)
            else:
                total += sum(backend_llamacpp.losses(engine, row.prompt, row.completion))
            advance(1)
    texts = [generate.text(tokenizer, written[example.id]) for example in test]
    chosen = metrics.chosen(evaluate)
    statistics = [metric.statistics(texts, [example.references for example in test]) for metric in chosen]
    return Side(written, seconds, total, Table(chosen, statistics))


def _loss(model: Any, row: Row) -> float:
    import torch

    with torch.no_grad():
        return float(loss.summed(model, pack.pack([pack.tree([row])], model.device)))


def _told(side: Side, tokens: int) -> dict[str, Any]:
    rows = np.array([len(side.written)], np.float64)
    return {
        "perplexity": math.exp(side.loss / tokens),
        "tokens_per_second": side.speed,
        "scores": {
            metric.name: float(metric.corpus(table.sum(axis=0, keepdims=True), rows)[0])
            for metric, table in zip(side.table.metrics, side.table.statistics, strict=True)
        },
    }


def _contrast(one: Side, other: Side, groups: Any, given: params.Params) -> dict[str, Any]:
    """`other` minus `one`: each metric's difference with its paired interval."""
    results = comparison.contrast([one.table], [other.table], groups, given.compare)
    return {name: asdict(result.diff) for name, result in results.items()}


def _first_groups(examples: Sequence[Example], rows: int | None) -> list[Example]:
    """The first rows, so many at most, in whole groups, but two groups at least: over one nothing can be resampled."""
    kept: list[Example] = []
    groups = [list(group) for _, group in groupby(examples, key=lambda one: one.group)]
    for number, group in enumerate(groups):
        if rows is not None and number >= 2 and len(kept) + len(group) > rows:
            break
        kept += group
    return kept


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    if list(one) == list(other):
        return None
    shared = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(shared, min(len(one), len(other)))


def _points(difference: dict[str, float]) -> str:
    """`+0.1 (-0.4 to +0.6)`."""
    interval = Interval(**difference)
    return f"{interval.value:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"
