"""Parity: what is lost when the experiment moves from transformers to llama.cpp, measured on the same token ids.

Three questions, for the base and for the first seed's adapter on it. How many tokens of greedy decoding are equal, up
to an answer's first difference? How likely are the references of the validation split in each backend? Does llama.cpp
score lower on the same rows? That difference has a paired interval over groups (`pipeline.score.significance`). A GGUF
type loses if such an interval is below zero, or if the perplexity rises by more than a given share. A difference that
may be chance is not called a loss.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from pipeline import gguf
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.core.progress import bar, say
from pipeline.core.records import Example
from pipeline.infer import backend, backend_llamacpp, choice, infer
from pipeline.lora import adapter
from pipeline.model import checkpoint, loss, pack
from pipeline.model.prompt import Encoder, Row
from pipeline.score import metrics
from pipeline.score.contrast import contrast
from pipeline.score.significance import Interval
from pipeline.score.tables import Table


@dataclass(frozen=True)
class Side:
    """The result of one variant in one backend; `loss` is the sum over the tokens of the validation references."""

    written: dict[str, list[int]]
    seconds: float
    loss: float
    table: Table

    @property
    def speed(self) -> float:
        """New tokens a second. The time includes that of the prompts."""
        return sum(map(len, self.written.values())) / self.seconds


@dataclass(frozen=True)
class Agreement:
    """How far two backends wrote the same tokens.

    `answers` is the share of equal answers, `tokens` the share of tokens before an answer's first difference, and
    `first_difference` the median place of that difference (None: all answers are equal).
    """

    answers: float
    tokens: float
    first_difference: float | None


@dataclass(frozen=True)
class Rows:
    """The input of both backends: test prompts to answer, and validation rows whose references have a loss."""

    test: list[Example]
    prompts: dict[str, list[int]]
    validation: list[Row]
    tokenizer: Any
    config: Any

    @property
    def groups(self) -> Any:
        return np.array([example.group for example in self.test])

    @property
    def tokens(self) -> int:
        """The number of tokens in all references."""
        return sum(len(row.completion) for row in self.validation)

    @property
    def bos(self) -> bool:
        """Whether prompts begin with a BOS, as the chat template or the tokenizer says."""
        return {row.prompt[0] for row in self.validation} == {self.tokenizer.bos_token_id}

    def longest(self, new_tokens: int) -> int:
        """The number of tokens in the longest sequence, if an answer has at most `new_tokens`."""
        answered = max(map(len, self.prompts.values())) + new_tokens
        return max(answered, max(len(row.prompt) + len(row.completion) for row in self.validation))


def measure(given: params.Params, types: Sequence[str], rows: int | None, merged: bool, max_rise: float) -> bool:
    """Compare, write `reports/parity.md` and `.json`, and return whether any of the GGUF `types` loses.

    `rows` limits the test and validation rows, `merged` merges the adapter into the GGUF weights, and `max_rise` is the
    allowed rise in perplexity, as a share. UserError for what llama.cpp cannot do with this experiment, and if the
    experiment has not been run.
    """
    # 1. Whatever can be refused before anything is computed.
    if given.generation.sampling is not None:
        raise UserError("parity compares greedy answers token by token: set generation.sampling to null")
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # read when OpenMP is loaded; as in `stage.run`
    for written_as in types:
        params.require_backend(_generation(given, written_as))
    gguf.refuse(paths.QUANTIZED)
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    saved = adapter.Saved(paths.adapter(given.seeds[0]))
    saved.require_of(facts.sha256)
    gguf.refuse_adapter(saved.folder)
    chosen = _rows(given, facts, rows)
    # 2. Base and tuned in each backend.
    variants = {paths.variant(None): None, paths.variant(given.seeds[0]): saved}
    conditions: dict[str, Any] = {}
    sides: dict[str | None, dict[str, Side]] = {}
    everything: list[str | None] = [None, *types]
    for kind in everything:
        sides[kind] = {}
        for variant, on_it in variants.items():
            say(f"parity: {variant} through {'transformers' if kind is None else f'llama.cpp, {kind}'}")
            setup = _setup(given, kind, facts, on_it, chosen)
            engine = _load(setup, kind, merged)
            conditions[setup.generation.backend] = _conditions(engine)
            sides[kind][variant] = _side(engine, kind, chosen, given.evaluate)
    # 3. The differences.
    of_types = {kind: _compared(sides[kind], sides[None], chosen, given, max_rise) for kind in types}
    found = {
        "rows": len(chosen.test),
        "split": given.evaluate.split,
        "groups": len(set(chosen.groups)),
        "validation_rows": len(chosen.validation),
        "validation_tokens": chosen.tokens,
        "validation_bos": chosen.bos,
        "prompts_sha256": records.sha256_ids(token for ids in chosen.prompts.values() for token in [*ids, -1]),
        "model_sha256": facts.sha256,
        "adapter_sha256": saved.sha256,
        "merged": merged,
        "max_rise": max_rise,
        "confidence": given.compare.confidence,
        "signature": metrics.signature(given.evaluate, [row.references for row in chosen.test]),
        "transformers": _summed(sides[None], chosen, given),
        "llama.cpp": of_types,
        "conditions": conditions,
    }
    records.write_json(paths.PARITY_JSON, found)
    page = markdown(found, given.compare.decide_by)
    records.write_text(paths.PARITY_MD, page)
    say(page)
    return any(one["loses"] for one in of_types.values())


def _rows(given: params.Params, facts: QuantizedFacts, count: int | None) -> Rows:
    """The first `count` rows of the scored split and of validation, in whole groups.

    UserError if there are none to compare.
    """
    tokenizer = checkpoint.tokenizer()
    encoder = Encoder(tokenizer, given.prompt, facts.context)
    test = _first_groups(records.read_rows(paths.split(given.evaluate.split), Example), count)
    prompts = {example.id: encoder.prompt(example) for example in test}
    encoder.require_fit(prompts, given.evaluate.split, given.generation.max_new_tokens)
    config = infer.configuration(given.generation, sorted({encoder.end, *facts.stop_ids}), tokenizer)
    chosen = Rows(test, prompts, references(encoder, count), tokenizer, config)
    if not chosen.tokens:
        raise UserError(f"no row of {paths.split('validation')} fits: parity needs references to take the loss of")
    return chosen


def _setup(
    given: params.Params, kind: str | None, facts: QuantizedFacts, on_it: adapter.Saved | None, rows: Rows
) -> backend.Setup:
    runtime = given.runtime.model_copy(update={"processes": 1, "sharding": "none"})
    longest = rows.longest(given.generation.max_new_tokens)
    return backend.Setup(facts, rows.config, _generation(given, kind), runtime, on_it, longest)


def _load(setup: backend.Setup, kind: str | None, merged: bool) -> Any:
    if kind is None:
        return choice.chosen(setup.generation.backend).load(setup)
    return backend_llamacpp.load(setup, merged)


def _conditions(engine: Any) -> dict[str, Any]:
    """Where and how a backend computed, without the GGUF type, which the report has in another place."""
    content = {"device": engine.device, "threads": engine.threads, **engine.conditions}
    return {name: value for name, value in content.items() if name != "gguf_type"}


def _summed(sides: dict[str, Side], rows: Rows, given: params.Params) -> dict[str, Any]:
    """The figures of one backend's variants, and the gain of fine-tuning."""
    base, tuned = sides.values()
    variants = {name: _figures(side, rows.tokens) for name, side in sides.items()}
    return {"variants": variants, "gain": _contrast(base, tuned, rows.groups, given)}


def _compared(
    sides: dict[str, Side], reference: dict[str, Side], rows: Rows, given: params.Params, max_rise: float
) -> dict[str, Any]:
    """The same for a GGUF type, with its differences from transformers, and the reasons why it loses."""
    content = _summed(sides, rows, given)
    for name, side in sides.items():
        content["variants"][name] |= {
            "agreement": asdict(agreement(reference[name].written, side.written)),
            "rise": math.exp((side.loss - reference[name].loss) / rows.tokens) - 1,
            "difference": _contrast(reference[name], side, rows.groups, given),
        }
    return content | {"loses": losing(content["variants"], given.compare.decide_by, max_rise)}


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


def losing(variants: dict[str, Any], decide_by: Sequence[str], max_rise: float) -> list[str]:
    """The reasons why a GGUF type is worse than transformers, in words; none if no loss is shown."""
    reasons = []
    for variant, one in variants.items():
        for metric in decide_by:
            difference = one["difference"][metric]
            if difference["high"] < 0:
                reasons.append(f"{variant} scores lower in {metric}: {_points(difference)}")
        if one["rise"] > max_rise:
            reasons.append(f"{variant}'s perplexity is {one['rise']:.1%} higher, and {max_rise:.1%} was allowed")
    return reasons


def markdown(found: dict[str, Any], decide_by: Sequence[str]) -> str:
    """The report in Markdown."""
    level = f"{found['confidence']:.0%}"
    lines = [
        "# Parity of transformers and llama.cpp",
        "",
        f"{found['rows']} {found['split']} rows of {found['groups']} groups decoded greedily from the same token ids; "
        f"perplexity of {found['validation_tokens']} tokens in {found['validation_rows']} validation references, each "
        f"behind its prompt, which begins {'with a BOS' if found['validation_bos'] else 'without BOS'}. "
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
    """The rows of the validation split that fit, from the first groups with at most `count` rows (None: all)."""
    examples = _first_groups(records.read_rows(paths.split("validation"), Example), count)
    rows = [encoder.row(example) for example in examples]
    return [row for row in rows if encoder.fits(row.prompt) and encoder.holds(row)]


def _generation(given: params.Params, kind: str | None) -> params.Generation:
    """The settings of decoding through llama.cpp with GGUF of type `kind`, or through transformers if it is None."""
    change = {"backend": "transformers"} if kind is None else {"backend": "llama.cpp", "gguf_type": kind}
    if kind is not None and given.quantize.method == "int8":
        raise UserError("quantize.method = 'int8' quantizes activations as well: no GGUF file computes that")
    return params.checked(params.Generation, given.generation.model_dump() | change, "generation, for parity")


def _side(engine: Any, kind: str | None, rows: Rows, evaluate: params.Evaluate) -> Side:
    """What a loaded model writes for the rows, and its loss on the references."""
    families = [
        [(example.id, rows.prompts[example.id]) for example in group]
        for _, group in groupby(rows.test, key=lambda one: one.group)
    ]
    started = time.perf_counter()
    with bar("decode", len(rows.test), "examples") as advance:
        written = {}
        for name, ids in choice.chosen("transformers" if kind is None else "llama.cpp").complete(engine, families):
            written[name] = ids
            advance(1)
    seconds = time.perf_counter() - started
    total = 0.0
    with bar("references", len(rows.validation), "rows") as advance:
        for row in rows.validation:
            if kind is None:
                total += _loss(engine.model, row)
            else:
                total += sum(backend_llamacpp.losses(engine, row.prompt, row.completion))
            advance(1)
    texts = [infer.text(rows.tokenizer, written[example.id]) for example in rows.test]
    chosen = metrics.chosen(evaluate)
    statistics = [metric.statistics(texts, [example.references for example in rows.test]) for metric in chosen]
    return Side(written, seconds, total, Table(chosen, statistics))


def _loss(model: Any, row: Row) -> float:
    import torch

    with torch.no_grad():
        return float(loss.summed(model, pack.pack([pack.tree([row])], model.device)))


def _figures(side: Side, tokens: int) -> dict[str, Any]:
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
    results = contrast([one.table], [other.table], groups, given.compare)
    return {name: asdict(result.diff) for name, result in results.items()}


def _first_groups(examples: Sequence[Example], rows: int | None) -> list[Example]:
    """The first groups with at most `rows` rows, but at least two groups: one alone cannot be resampled."""
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
