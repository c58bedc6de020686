"""The JSON files that one stage writes and another reads: frozen records, checked when they are read.

A field whose default is None is left out of the file if it is None. Losses are in nats a token.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.core import records
from pipeline.core.errors import UserError
from pipeline.core.records import Decoding, Encoded

T = TypeVar("T")


# prepare


@dataclass(frozen=True, slots=True)
class Words:
    """Lengths of the texts of one split, in words."""

    min: int
    median: float
    max: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The rows that left a split for one reason: how many, and the ids of the first."""

    rows: int
    examples: list[str]


@dataclass(frozen=True, slots=True)
class Split:
    """One split of the data: the files of its rows, and how many were read, filtered, held out, merged and dropped.

    `read` counts the rows before any was dropped, and `rows` the remaining ones. `filtered` and `dropped` map a reason
    to the rows, `aspects` maps an aspect to its number of rows. `beyond_limit` counts the rows that `data.limits` cut
    off. The others are about the split's own files, and left out where they are zero: `left_out` counts entries that
    are no row, by reason; `unused` fields that hold something and are not used, by name; `changed` texts, by what was
    changed.
    """

    files: list[str]
    read: int
    rows: int
    groups: int
    aspects: dict[str, int]
    source_words: Words
    target_words: Words
    filtered: dict[str, Gone]
    held_out: int
    merged: int
    dropped: dict[str, Gone]
    beyond_limit: int | None = None
    left_out: dict[str, int] | None = None
    unused: dict[str, int] | None = None
    changed: dict[str, int] | None = None
    blank_lines: int | None = None


@dataclass(frozen=True, slots=True)
class Overlap:
    """The number of rows of one split that stand in another split too, exactly or nearly."""

    exact: int
    near: int


@dataclass(frozen=True, slots=True)
class SharedGroups:
    """Groups that the data declares and that have rows in two splits: `shared` of the `groups` of `split`.

    `examples` are the names of the first ones.
    """

    split: str
    other: str
    shared: int
    groups: int
    examples: list[str]

    @property
    def counted(self) -> str:
        """For people: `4 of 9 test groups are in train as well`."""
        are = "is" if self.shared == 1 else "are"
        return f"{self.shared:,} of {self.groups:,} {self.split} groups {are} in {self.other} as well"


@dataclass(frozen=True, slots=True)
class DataCard:
    """The data of an experiment: its sources with their digests, and its splits by name.

    `overlap` maps a pair such as "train in test" to the rows that were found and dropped. `shared_groups` has an entry
    for each pair of splits that share a group.
    """

    source: str | list[str]
    sha256: str | list[str | None] | None
    splits: dict[str, Split]
    overlap: dict[str, Overlap]
    shared_groups: list[SharedGroups] = field(default_factory=list)


# fetch, quantize


@dataclass(frozen=True, slots=True)
class Architecture:
    """The facts of a decoder's architecture. `context` is in tokens, `vocabulary` counts token ids."""

    family: str
    parameters: int
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied_embeddings: bool
    dtype: str
    linear_layers: list[str]
    kv_bytes_per_token: int
    stop_ids: list[int]


@dataclass(frozen=True, slots=True)
class BaseFacts(Architecture):
    """The base in `out/models/base`: its architecture, its source, and the digest of its files."""

    source: str
    sha256: str

    # As `QuantizedFacts` has them, for what loads either.
    @property
    def method(self) -> str:
        return "none"

    @property
    def double_quantization(self) -> bool:
        return False

    @property
    def quantized_layers(self) -> int:
        return 0

    @property
    def int8_threshold(self) -> None:
        return None

    @property
    def group_size(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class QuantizedFacts:
    """The quantized base in `out/models/quantized`.

    `layers` maps each quantized layer to its relative error |W - Q(W)| / |W| (Frobenius). The perplexities are of
    `perplexity_tokens` predicted tokens of validation sources, read in windows of at most `perplexity_window` tokens;
    `perplexity_bos` says whether each begins with a BOS, as the model's texts do or do not. `bytes` is the size of the
    weights' files. `context`, `dtype` and `stop_ids` are the base's. `base_on` names the device that held the base if
    another device quantized it. `group_size` is of gptq and hqq; `calibration_tokens` counts the tokens of training
    sources that gptq read.
    """

    method: str
    double_quantization: bool
    bits_per_parameter: float
    quantized_layers: int
    layers: dict[str, float]
    perplexity_before: float
    perplexity_after: float
    perplexity_tokens: int
    perplexity_window: int
    perplexity_bos: bool
    bytes: int
    sha256: str
    context: int
    dtype: str
    stop_ids: list[int]
    int8_threshold: float | None = None
    base_on: str | None = None
    group_size: int | None = None
    calibration_tokens: int | None = None

    @property
    def perplexity_read(self) -> str:
        """How the text was read, in words."""
        read = windows_read(self.perplexity_window, self.perplexity_bos)
        return f"{self.perplexity_tokens:,} tokens of validation sources, {read}"


Loadable = BaseFacts | QuantizedFacts
"""The facts of a checkpoint that a stage loads."""


# train


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the training curve. `loss` is the mean over supervised tokens, by their weights; `tokens` excludes
    padding."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Validation:
    """The mean loss over the supervised tokens of the validation rows, before step `step`."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """The training of one seed. `best_...` is the validation with the lowest loss, `kept_...` the saved adapter's.

    `training_loss` is measured like the validation loss, on `training_loss_rows` training rows, and `gap` is
    `kept_loss` minus it. `tokens` were computed, and `supervised_tokens` of them had a loss. `encoded` tells what
    became of the examples of both splits, those that were dropped included.
    """

    seed: int
    device: str
    threads: int
    attention: str
    rows: int
    dropped: int
    validation_rows: int
    steps: int
    planned_steps: int
    epochs: float
    stopped_early: bool
    prompts_checked: int
    encoded: dict[str, Encoded]
    shortest_answer: int
    repacked_layers: int
    largest_grad_norm: float
    trainable_parameters: int
    adapter_bytes: int
    supervised_tokens: int
    tokens: int
    final_loss: float
    validation: list[Validation]
    best_step: int
    best_epoch: float
    best_loss: float
    kept_step: int
    kept_epoch: float
    kept_loss: float
    training_loss: float
    training_loss_rows: int
    gap: float
    logit_change: float


@dataclass(frozen=True, slots=True)
class AdapterOrigin:
    """The base that an adapter was trained on, in a file beside PEFT's own two."""

    model_sha256: str


# forget


@dataclass(frozen=True, slots=True)
class Window:
    """Sums over the predicted tokens of one window of text, or of one conversation, in nats.

    `base` and `tuned` are the losses on the text. `cross_entropy` is tuned's against the base's distribution, `entropy`
    the base's own. `place` is the text's position in its source.
    """

    place: str
    tokens: int
    base: float
    tuned: float
    cross_entropy: float
    entropy: float


@dataclass(frozen=True, slots=True)
class Probed:
    """The losses of base and tuned on one probe: means over all predicted tokens, and the windows behind them.

    `name`, `style` and `source` are the probe's. In style plain a window has at most `window` tokens, and begins with a
    BOS if `bos` is true. In style chat a window is a conversation of at most `window` tokens, of whose answer all
    tokens are predicted, the closing EOS included.
    `left_out` counts the records and texts of the source that are none, or that repeat another, by reason.
    """

    name: str
    style: str
    source: str
    device: str
    threads: int
    tokens: int
    window: int
    bos: bool
    texts: int
    base_loss: float
    tuned_loss: float
    base_perplexity: float
    tuned_perplexity: float
    cross_entropy: float
    base_entropy: float
    kl: float
    windows: list[Window]
    left_out: dict[str, int] | None = None

    @property
    def read(self) -> str:
        """How the text was read, in words."""
        return probe_read(self.style, self.window, self.bos)


@dataclass(frozen=True, slots=True)
class Forgetting:
    """The effect of one seed's adapter on text that is not of the task: one entry a probe, in their order."""

    seed: int
    model_sha256: str
    adapter_sha256: str
    probes: list[Probed]


# contamination


@dataclass(frozen=True, slots=True)
class ShardOrders:
    """Some consecutive groups of test references: the log-likelihood of their `tokens` in the order of the files, and
    in shuffled orders, in nats."""

    groups: int
    rows: int
    tokens: int
    in_order: float
    shuffled: list[float]


@dataclass(frozen=True, slots=True)
class OrderTest:
    """How likely the base finds the test references in the order of their files (`pipeline.contamination`).

    `difference` is the log-likelihood in that order minus the mean of the `permutations` shuffled ones, in nats a
    token. `p` is one-sided. `groups`, `rows` and `tokens` are those of all shards.
    """

    device: str
    threads: int
    permutations: int
    groups: int
    rows: int
    tokens: int
    difference: float
    p: float
    shards: list[ShardOrders]


@dataclass(frozen=True, slots=True)
class Contamination:
    """The test for test references that the base knows, or in `not_tested` why it was not made."""

    model_sha256: str
    not_tested: str | None = None
    tested: OrderTest | None = None


# infer and evaluate


@dataclass(frozen=True, slots=True)
class Skipped:
    """Instead of a `Decoding` or `Scores`: the variant is not computed, because of the parameters that `off` names."""

    variant: str
    off: str


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """The scores of one test example alone: `scores` maps a metric to a score in [0, 100]."""

    id: str
    group: str
    aspect: str
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Absent:
    """Of the `found` numbers, names or words in some texts, `absent` do not stand in the source of their text."""

    found: int
    absent: int

    @property
    def share(self) -> float | None:
        """The share that is absent; None if nothing was found."""
        return self.absent / self.found if self.found else None


@dataclass(frozen=True, slots=True)
class NotInSource:
    """What texts say that their sources do not, counted without a model (`pipeline.score.faithfulness`)."""

    numbers: Absent
    names: Absent
    rare_words: Absent


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one variant.

    `test_sha256` is the digest of the ids, groups, aspects and references of the test split, in order; prompts may
    differ. `corpus` maps a metric to its score over all examples, in [0, 100]. `words` and `reference_words` are means.
    `thoughts` counts the predictions that hold a thought or its mark.
    `stopped_by_cap`, `empty` and `copied` (equal to the source) are shares of the predictions, and so is `in_language`
    if `evaluate.language` names a language. `references_in_language` is the same share of the references, since
    detection often mistakes the language of short texts. `examples` has one entry a row of the test split, in its
    order, or of those rows that the variant answered (`decoding.rows`). `statistics` maps chrF and BLEU to the counts
    of each row, which give the score over any set of rows. `notices` are what a reader of the scores must know of
    references and settings, a sentence each, equal for all variants. `not_in_source` counts what the outputs say beyond
    their sources, `references_not_in_source` the same of the first references, as a yardstick. `samples` is the number
    of answers to each prompt, over which scores are means; `samples_sd` is, for each metric, the standard deviation of
    the corpus score between them, None of one.
    """

    variant: str
    signature: str
    test_sha256: str
    n: int
    groups: int
    corpus: dict[str, float]
    words: float
    reference_words: float
    stopped_by_cap: float
    empty: float
    copied: float
    thoughts: int
    in_language: float | None
    references_in_language: float | None
    decoding: Decoding
    examples: list[ScoredRow]
    statistics: dict[str, list[list[float]]] = field(repr=False)
    notices: list[str] = field(default_factory=list)
    not_in_source: NotInSource | None = None
    references_not_in_source: NotInSource | None = None
    samples: int = 1
    samples_sd: dict[str, float | None] = field(default_factory=dict)


# track, and what a stage cost


@dataclass(frozen=True, slots=True)
class Receipt:
    """The digest of the experiment that `track` recorded."""

    digest: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a stage cost on one machine. `result_sha256` is the digest of its result.

    Memory is in MiB, the sum over `processes`; `threads` is the number in one process. `energy_meter` names the meter,
    or says why there is no figure.
    """

    result_sha256: str
    seconds: float
    peak_memory_mb: float
    peak_device_memory_mb: float | None = None
    device: str | None = None
    threads: int | None = None
    processes: int | None = None
    energy_kwh: float | None = None
    energy_meter: str | None = None


def windows_read(window: int, bos: bool) -> str:
    """How text was read for a perplexity, in words: in windows of at most `window` tokens, with a BOS or without."""
    return f"windows of {window:,} tokens, {'each with a BOS first' if bos else 'without BOS, as the model reads text'}"


def probe_read(style: str, window: int, bos: bool) -> str:
    """How the text of a probe was read, in words; `window` and `bos` as in `Probed`."""
    if style == "chat":
        return (
            f"through the chat template, in conversations of at most {window:,} tokens, of which the last answer counts"
        )
    return f"without a chat template, in {windows_read(window, bos)}"


# reading and writing


def write(path: Path, record: Any) -> None:
    """Write a record as JSON, atomically. ValueError for NaN or an infinity."""
    records.write_json(path, content(record))


def content(record: Any) -> Any:
    """A record, a section of the parameters, or a list or mapping of them, as JSON values."""
    if is_dataclass(record) and not isinstance(record, type):
        named = [(one, getattr(record, one.name)) for one in fields(record)]
        # None is also a value of fields without a default, which are never left out.
        return {one.name: content(value) for one, value in named if value is not None or one.default is not None}
    if isinstance(record, BaseModel):
        return record.model_dump(mode="json")
    if isinstance(record, dict):
        return {key: content(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [content(value) for value in record]
    return record


def read(path: Path, contract: type[T]) -> T:
    """The record in a JSON file.

    UserError if the file is missing, is not JSON, or holds no such record because another version wrote it.
    """
    return parse(records.read_json(path), contract, str(path))


def read_or_skipped(path: Path, contract: type[T]) -> T | Skipped:
    """The record in a JSON file of a variant that may be left out; otherwise as `read`."""
    found = records.read_json(path)
    skipped = isinstance(found, dict) and "off" in found
    return parse(found, Skipped, str(path)) if skipped else parse(found, contract, str(path))


def parse(found: Any, contract: type[T], name: str) -> T:
    """The record in the content of a JSON file. UserError, with the file's `name`, if it holds none."""
    try:
        made: T = _adapter(cast("Hashable", contract)).validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"{name} does not hold what this version writes there ({'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}): run `dvc repro`"
        ) from None
    return made


@cache
def _adapter(contract: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(contract)  # type: ignore[arg-type]


def curve_text(curve: Sequence[Step]) -> str:
    """A training curve as CSV, one row for each optimizer step."""
    names = [one.name for one in fields(Step)]
    return records.csv_text(names, ([getattr(step, name) for name in names] for step in curve))


def read_curve(path: Path) -> list[Step]:
    """The training curve that `curve_text` wrote. UserError if the file is missing or holds something else."""
    return parse(records.read_csv(path), list[Step], str(path))
