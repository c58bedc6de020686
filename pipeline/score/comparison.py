"""The comparison of base and tuned, which the stage `compare` computes once and stores in `paths.COMPARISON_JSON`.

The report, the page, the record, an export and its card read it there.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.core import contracts, params, paths
from pipeline.core.records import Encoded
from pipeline.score.guard_record import Guard
from pipeline.score.known import Known
from pipeline.score.side_effects import Cost
from pipeline.score.significance import Direction, Interval

Verdict = Literal[
    "better", "partly-better", "unspecific", "worse", "partly-worse", "mixed", "equivalent", "none", "few"
]


@dataclass(frozen=True, slots=True)
class Spread:
    """The spread over several seeds.

    `sd` is the standard deviation of their differences to base. `both` is the mean difference, with the interval that
    covers the choice of examples and of seeds.
    """

    sd: float
    both: Interval


@dataclass(frozen=True, slots=True)
class Result:
    """One metric over all test rows, or over those of one aspect. `tuned` is the mean over seeds.

    The interval of `diff` covers the choice of examples; `seeds` is None with a single seed. `direction` is what is
    shown of the difference. `within_margin` says whether it is shown to be within `compare.margin`; None without one.
    `p` is the two-sided p-value of no difference; `effect` and `effect_of_rows` are Cohen's d_z over groups and rows.
    `detectable` is the difference in points that such a
    comparison finds in 80 % of repetitions. `wins`, `ties` and `losses` are the shares of examples on which tuned
    scores higher than, the same as, and lower than base.
    """

    base: Interval
    tuned: Interval
    diff: Interval
    seeds: Spread | None
    direction: Direction
    within_margin: bool | None
    p: float
    effect: float
    effect_of_rows: float
    detectable: float
    wins: float
    ties: float
    losses: float

    @property
    def deciding(self) -> Interval:
        """The difference with the interval that decides the verdict."""
        return self.seeds.both if self.seeds else self.diff


@dataclass(frozen=True, slots=True)
class Aspect:
    """The results over the rows of one aspect, or of one slice. `p_holm` are the deciding metrics' p-values, corrected
    over all aspects, or over all slices."""

    name: str
    n: int
    results: dict[str, Result]
    p_holm: dict[str, float]


@dataclass(frozen=True, slots=True)
class Line:
    """A reference line over `n` rows. `scores` maps a metric to the line's score, `ahead` to tuned minus the line."""

    key: str
    label: str
    about: str
    n: int
    scores: dict[str, float]
    ahead: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class SpecificGain:
    """How much of the gain in one metric is specific to the source (`pipeline.score.specific`).

    The scores of base and tuned for their own sources, and as if their outputs were about others; means over seeds.
    `gain` is (tuned_own - tuned_other) - (base_own - base_other), with the interval that decides. `p` is corrected over
    all aspects if it belongs to one (Holm).
    """

    base_own: float
    base_other: float
    tuned_own: float
    tuned_other: float
    gain: Interval
    direction: Direction
    p: float


@dataclass(frozen=True, slots=True)
class Specific:
    """The specific gain in each deciding metric over `n` rows of `groups` groups: all rows, or those of an aspect."""

    aspect: str | None
    n: int
    groups: int
    results: dict[str, SpecificGain]


@dataclass(frozen=True, slots=True)
class EqualLength:
    """The gain in each deciding metric at outputs as long as base's.

    It is that of a line through the rows' gains over the logarithm of tuned's words over base's (each plus one).
    `ratio` is the median of that quotient.
    """

    ratio: float
    gains: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class Output:
    """The outputs of one variant: mean words, shares, scores, and how many hold a thought or its mark.

    The shares are of outputs that were stopped by the cap, are empty, equal their source, or are in
    `evaluate.language`, if that names a language. `samples` and `samples_sd` are those of the scores.
    """

    variant: str
    words: float
    stopped_by_cap: float
    empty: float
    copied: float
    in_language: float | None
    scores: dict[str, float]
    thoughts: int
    not_in_source: contracts.NotInSource | None
    samples: int = 1
    samples_sd: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the base does without training, over `n` rows of `groups` groups (`pipeline.score.baselines`).

    `label` names it in a sentence, `short` in a figure. `tuned` are the results of the tuned model over it, `gain` are
    its own over the base, and `ahead` its own over the variant before it, if there is one, on its rows.
    """

    label: str
    short: str
    n: int
    groups: int
    tuned: dict[str, Result]
    gain: dict[str, Result]
    ahead: dict[str, Result]
    output: Output


@dataclass(frozen=True, slots=True)
class Pair:
    """One example with both outputs, and their scores in the first metric of `decide_by`."""

    id: str
    source: str
    reference: str
    base: str
    tuned: str
    base_score: float
    tuned_score: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that the report shows. `tuned` has one entry a seed, in the order of params.

    `quantization` is the base's `quantize.method`, `split` the split that was scored. `specific` begins with all rows;
    it is empty if aspects have too few groups. `equal_length` is None if no row has outputs as long as base's or
    longer, or none as long or shorter.
    `decoding` holds the conditions that base and tuned share (`compare.MUST_AGREE`). `best` and `worst` come from the
    first seed, since texts have no mean. `published` holds figures of papers, `guards` those of all stages, in order.
    `encoded` tells what became of the examples of each split as prompts.
    `not_scored` counts what the test split's files hold and no row of it has, by reason; None if there is nothing.
    `shared_groups` are those of the data's card. `known` counts what training knows of the test split,
    `contamination` is the test for what the base knows of it.
    `notices` and `references_not_in_source` are those of the scores. `not_nfc` counts
    the test rows with a reference that is not in the normal form NFC, if a metric compares code points. `slices` are
    thirds of the rows by length and novelty, in the deciding metrics.
    """

    verdict: Verdict
    decide_by: list[str]
    margin: float | None
    quantization: str
    confidence: float
    samples: int
    seed: int
    split: params.Split
    n: int
    groups: int
    signature: str
    decoding: dict[str, Any]
    results: dict[str, Result]
    aspects: list[Aspect]
    slices: list[Aspect]
    specific: list[Specific]
    equal_length: EqualLength | None
    lines: list[Line]
    baselines: list[Baseline]
    base: Output
    tuned: list[Output]
    language: str | None
    references_in_language: float | None
    published: list[params.Published]
    reference_words: float
    best: list[Pair]
    worst: list[Pair]
    cost: Cost
    guards: list[Guard]
    encoded: dict[str, Encoded]
    known: Known
    contamination: contracts.Contamination
    notices: list[str]
    references_not_in_source: contracts.NotInSource | None
    not_scored: dict[str, int] | None = None
    shared_groups: list[contracts.SharedGroups] = field(default_factory=list)
    not_nfc: int = 0

    @property
    def outputs(self) -> list[Output]:
        """The outputs of all variants: base, its untrained variants, and tuned."""
        return [self.base, *(one.output for one in self.baselines), *self.tuned]

    @property
    def beyond_source(self) -> list[tuple[str, contracts.NotInSource]]:
        """What references and outputs say beyond their sources, by the name of the texts, where it was counted."""
        texts = [("references", self.references_not_in_source)]
        texts += [(one.variant, one.not_in_source) for one in self.outputs]
        return [(name, one) for name, one in texts if one is not None]

    @classmethod
    def read(cls) -> "Comparison":
        """The stored comparison. UserError if it is missing, or if another version wrote it."""
        return contracts.read(paths.COMPARISON_JSON, cls)
