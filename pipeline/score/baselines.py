"""What the base can do without training: its variants without quantization, and with demonstrations in its prompt.

They answer some rows of the split that is scored (`pipeline.core.baseline`), under the conditions of the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import contracts, paths, records
from pipeline.core.contracts import BaseFacts, QuantizedFacts, Scores, Skipped
from pipeline.core.errors import listing
from pipeline.core.records import Decoding, Example, Prediction
from pipeline.score import side_by_side

MUST_AGREE = ("split", "generation", "device", "threads", "dtype", "thinking")
"""What a variant has in common with base. Prompts and model are compared by what each variant is."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """A variant of the base as its stages wrote it. `label` names it in a sentence, `short` in a figure.

    `rows` holds the places, from 0, of its rows in the split, and `predictions` and `scores.examples` have one
    entry for each of them, in order.
    """

    name: str
    label: str
    short: str
    rows: list[int]
    predictions: list[Prediction]
    scores: Scores


def read() -> list[Baseline]:
    """The variants that `baseline` asks for, of none, one or both: base-unquantized and base-shots, in this order.

    UserError if an output is missing, or lists every way in which the variants are not comparable with base: another
    condition of decoding, other prompts, another model, an adapter, other rows, another signature of the scores.
    """
    base = side_by_side.outputs(paths.variant(None))
    test = side_by_side.rows_of(base.scores.decoding.split)
    found = [one for variant in VARIANTS if (one := _read(variant, len(test))) is not None]
    if problems := [problem for one in found for problem in _unequal(one, test, base)]:
        raise listing(problems, "variants of the base were not run under its conditions; run `dvc repro`:")
    return found


def why_off(variant: str) -> str | None:
    """Why a variant of `VARIANTS` is not computed, by the parameter that says so; None if it is."""
    scores = contracts.read_or_skipped(paths.scores(variant), Scores)
    return scores.off if isinstance(scores, Skipped) else None


VARIANTS = (paths.UNQUANTIZED, paths.SHOTS)


def _read(variant: str, test_rows: int) -> Baseline | None:
    scores = contracts.read_or_skipped(paths.scores(variant), Scores)
    if isinstance(scores, Skipped):
        return None
    rows = scores.decoding.rows
    return Baseline(
        name=variant,
        label=_label(variant, scores.decoding),
        short="Base, unquantized" if variant == paths.UNQUANTIZED else f"Base, {_shots(scores.decoding)} examples",
        rows=list(range(test_rows)) if rows is None else rows,
        predictions=records.read_rows(paths.predictions(variant), Prediction),
        scores=scores,
    )


def _label(variant: str, decoding: Decoding) -> str:
    if variant == paths.UNQUANTIZED:
        return "the base without quantization"
    count = _shots(decoding)
    return f"the base with {count} demonstration{'' if count == 1 else 's'}"


def _shots(decoding: Decoding) -> int:
    return 0 if decoding.demonstrations is None else decoding.demonstrations.most


def _unequal(one: Baseline, test: Sequence[Example], base: side_by_side.Outputs) -> list[str]:
    """Why a variant cannot be compared with base: messages, none if it can."""
    own, theirs = one.scores.decoding, base.scores.decoding
    problems = side_by_side.unequal(one.name, own, theirs, MUST_AGREE)
    for what in ("signature", "test_sha256"):
        here, there = getattr(one.scores, what), getattr(base.scores, what)
        if here != there:
            problems.append(f"{what}: {one.name} has {here}, base has {there}")
    expected = (
        contracts.read(paths.BASE_FACTS, BaseFacts).sha256
        if one.name == paths.UNQUANTIZED
        else contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts).sha256
    )
    if own.model_sha256 != expected:
        problems.append(f"model_sha256: {one.name} was decoded with {own.model_sha256}, and the model is {expected}")
    if own.adapter_sha256 is not None:
        problems.append(f"{one.name} was decoded with an adapter")
    misplaced = _misplaced(one, test)
    if not misplaced and one.name == paths.UNQUANTIZED and len(base.predictions) == len(test):
        problems += _other_prompts(one, base)
    return problems + misplaced


def _misplaced(one: Baseline, test: Sequence[Example]) -> list[str]:
    """Why outputs are not of the rows that the variant says it answered."""
    beyond = [row for row in one.rows if not 0 <= row < len(test)]
    if beyond or sorted(set(one.rows)) != one.rows:
        return [f"{one.name} answered rows that the split of {len(test)} rows does not have, or one row twice"]
    return side_by_side.misplaced([test[row] for row in one.rows], side_by_side.Outputs(one.predictions, one.scores))


def _other_prompts(one: Baseline, base: side_by_side.Outputs) -> list[str]:
    other = [
        own.id
        for row, own in zip(one.rows, one.predictions, strict=True)
        if own.prompt_sha256 != base.predictions[row].prompt_sha256
    ]
    if not other:
        return []
    return [f"{len(other)} prompts of {one.name} are not those of base, the first is that of {other[0]}"]
