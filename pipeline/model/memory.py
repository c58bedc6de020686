"""How much memory a plan takes, predicted from the architecture before anything is loaded; too much is refused.

A prediction is a sum of named parts, in bytes: permanent memory (weights, adapter, optimizer), what a micro-batch holds
for its backward pass, transient memory at the peak, and a margin. Activations are counted as the fused layers keep them
(`pipeline.model.fused`), logits for the supervised tokens alone (`pipeline.model.loss`), keys and values for the
columns that the scheduler allots (`pipeline.infer.scheduler`). It errs to the safe side: `docs/memory.md` compares
predictions with peaks measured on a CPU, and `python -m bench.memory` measures them again.

Letters: s bytes of a value in the model's dtype, h hidden, i intermediate, a all query heads, k all key heads, r rank,
N supervised tokens, V vocabulary.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.core import params, paths
from pipeline.core.contracts import Loadable, QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.model import adapted, pack, processes
from pipeline.model.shape import Shape

if TYPE_CHECKING:
    import torch

GB = 1e9
MARGIN = 0.05
"""Parts too small to be counted, as a share of the sum."""
LOST = {"cpu": 0.4, "mps": 0.4, "cuda": 0.1}
"""Fragmentation, as a share of transient memory (activations, logits). Measured on a CPU alone."""
LOST_AGAIN = {"cpu": 1.4, "mps": 1.4, "cuda": 0.2}
"""The same with gradient checkpointing, where less is kept but as much is transient. Measured on a CPU alone."""
LOST_SLOTS = {"cpu": 0.6, "mps": 0.6, "cuda": 0.1}
"""Fragmentation of keys and values, as a share: slots are cut anew as prompts get shorter. CUDA frees it."""
LIBRARIES = {"cpu": 0.65 * GB, "mps": 0.65 * GB, "cuda": 0.6 * GB}
"""Before anything is loaded: Python with torch and transformers in main memory, or CUDA's own context on its device."""
SPARE = 0.05
"""The share of available main memory that is left for other programs."""
TILE = pack.WHOLE
"""Packed sequences and micro-batches grow by this many tokens."""
ANSWERS = 0.5
"""The assumed share of answers in a micro-batch, before the rows are read."""
KEPT_WEIGHTS = 768
"""Columns up to which attention on a CPU keeps its weights (`pipeline.model.attention.Short`)."""
PREFILL = 1024
"""Prompt tokens computed at once in decoding (`pipeline.infer.scheduler.PREFILL_TOKENS`)."""
WINDOW = 256
"""Tokens of a window in which stage quantize measures perplexity."""
MAPPED = "mapped file"
PLACES = 32
"""Places whose distributions `pipeline.forget` holds in float32 at once: 6 MB each for a vocabulary of 49,152."""
GATHERED = 4
"""Copies of a divided base's blocks: the one that computes and the next, each as gathered and as used."""
BLOCK, BLOCKS = 64, 256
"""Weights that share a constant in 4 bits; constants that share one with double quantization."""
OF_GROUP = 2
"""Bytes of a scale, and of a zero (`pipeline.model.groups.CONSTANTS`)."""
FUSED = frozenset({"llama"})
"""Families whose attention is one step that keeps only its inputs (`pipeline.model.fused`)."""

Device = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True, slots=True)
class Base:
    """The base as it lies in memory: shape, dtype and quantization; whether 4-bit layers are kept unpacked; and how it
    is divided among how many devices (`pipeline.model.shard`)."""

    shape: Shape
    dtype: str
    method: str
    double_quantization: bool
    keep_dequantized: bool
    group_size: int | None = None
    sharding: str = "none"
    devices: int = 1

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def packed(self) -> bool:
        return self.method in params.FOUR_BITS

    @classmethod
    def of(
        cls, folder: Path, dtype: str, method: str, double_quantization: bool, group_size: int | None = None
    ) -> "Base":
        """A checkpoint that is loaded so, packed and on one device."""
        return cls(Shape.read(folder), dtype, method, double_quantization, False, group_size)

    @classmethod
    def stored(cls, folder: Path, facts: Loadable) -> "Base":
        """The checkpoint in `folder`, with its facts, packed and on one device."""
        return cls.of(folder, facts.dtype, facts.method, facts.double_quantization, facts.group_size)

    @classmethod
    def quantized(cls, facts: QuantizedFacts) -> "Base":
        """The quantized base of the working directory, packed and on one device."""
        return cls.stored(paths.QUANTIZED, facts)

    @property
    def packed_bytes(self) -> float:
        """Bytes of all weights, with the linear layers as the checkpoint stores them."""
        return self._packed_linears + self._constants + self.shape.other_parameters * self.itemsize

    @property
    def _packed_linears(self) -> float:
        bytes_each = 0.5 if self.packed else 1 if self.method == "int8" else self.itemsize
        return float(self.shape.linear_parameters * bytes_each)

    @property
    def _constants(self) -> float:
        """Bytes of the constants: for 4 bits one for each block, quantized or not, or two for each group; for 8 bits
        one for each row."""
        if self.group_size is not None:
            return self.shape.linear_parameters * 2 * OF_GROUP / self.group_size
        if self.packed:
            return self.shape.linear_parameters * (8 + 32 / BLOCKS if self.double_quantization else 32) / BLOCK / 8
        rows = sum(outputs for _, outputs in self.shape.linears.values())
        return 4.0 * self.shape.layers * rows if self.method == "int8" else 0.0

    @property
    def dense_bytes(self) -> float:
        return float(self.shape.parameters * self.itemsize)

    @property
    def weights(self) -> float:
        """Bytes of the weights on one device."""
        if self.sharding == "tensor":
            return self.dense_bytes / self.devices
        if self.sharding == "fsdp":
            gathered = GATHERED * self._packed_linears / self.shape.layers
            return self.packed_bytes - self._packed_linears * (1 - 1 / self.devices) + gathered
        return self.dense_bytes if self.packed and self.keep_dequantized else self.packed_bytes

    @property
    def unpacking(self) -> float:
        """Bytes of weights unpacked on the fly: gate and up, each and joined; int8 in training on a CPU likewise."""
        if self.method == "none" or (self.packed and self.keep_dequantized):
            return 0.0
        both = self.shape.hidden_size * self.shape.intermediate_size
        # In groups: gate as it is kept, and up while it is unpacked (codes, float32, and the result).
        each = self.itemsize if self.group_size is None else max(self.itemsize, (2 * self.itemsize + 5) / 4)
        return 4.0 * both * each


def loaded(base: Base, runtime: params.Runtime, device: Device) -> Base:
    """The base as one process holds it under `runtime`.

    On a CPU a divided base counts as whole: for a moment it is, and the parts of all processes are as large together.
    """
    base = replace(base, keep_dequantized=runtime.keep_dequantized)
    return base if device == "cpu" else replace(base, sharding=runtime.sharding, devices=runtime.processes)


@dataclass(frozen=True, slots=True)
class Load:
    """The largest micro-batch: its tokens, its supervised tokens, and the tokens of the largest group."""

    tokens: int
    answers: int
    longest: int


def load(batches: Sequence[Sequence[pack.Tree]], micro_batch_tokens: int) -> Load:
    """The largest value of each figure over the micro-batches of all batches."""
    parts = [part for batch in batches for part in pack.micro_batches(batch, micro_batch_tokens)]
    return Load(
        tokens=max(sum(tree.tokens for tree in part) for part in parts),
        answers=max(sum(tree.supervised for tree in part) for part in parts),
        longest=max(tree.tokens for part in parts for tree in part),
    )


Parts = dict[str, float]


def training(
    base: Base, lora: params.Lora, train: params.Train, load: Load, device: Device, recomputed: bool = False
) -> Parts:
    """The parts of a training step's peak, in bytes; `recomputed`: with gradient checkpointing."""
    shape, s = base.shape, base.itemsize
    size = adapted.size(shape, lora)
    parameters = size.trained
    tokens = _whole(load.tokens)
    parts = {
        "weights": base.weights,
        "adapter": float(parameters * (s + 4) + size.frozen * s),  # in the model's dtype, and the float32 masters
        "optimizer": _state(train.optimizer, shape, lora),
        "gradients": float(parameters * (s + 4)),
    }
    if train.early_stopping:
        parts["best adapter"] = 4.0 * parameters
    alike = adapted.blocks(shape, lora)
    kept = {
        ranks: tokens * _kept_a_token(base, lora, ranks, load.longest, device) + _joined(shape, lora, ranks) * s
        for ranks in alike
    }
    parts["activations"] = tokens * 2 * shape.hidden_size * s + (
        max(kept.values()) + tokens * shape.layers * shape.hidden_size * s
        if recomputed
        else sum(count * kept[ranks] for ranks, count in alike.items())
    )
    logits = float(load.answers * shape.vocabulary * 12)  # log-probabilities, and the gradients of both
    backward = float(tokens * ((4 * shape.intermediate_size + 2 * shape.hidden_size) * s + 16 * shape.hidden_size))
    update = 8.0 * parameters if device == "cuda" and train.optimizer == "adamw" else 0.0
    parts["logits"] = logits
    weighing = _weighing(shape, lora) * s if lora.dora else 0.0
    parts["at the peak"] = max(backward + base.unpacking + weighing, update) - min(logits, backward)
    return _with_margin(parts, device, recomputed)


def inference(
    base: Base, generation: params.Generation, prompt_tokens: int, adapter_parameters: int, device: Device
) -> Parts:
    """The parts of decoding's peak, in bytes; `prompt_tokens`: length of the longest prompt."""
    shape, s = base.shape, base.itemsize
    a_token = 2.0 * shape.layers * shape.keys * s
    row = -(-(prompt_tokens + generation.max_new_tokens + 1) // 16) * 16
    beams = generation.num_beams
    held = max(beams * row, min(generation.batch_tokens, beams * generation.batch_size * row))
    computed = max(PREFILL, prompt_tokens) if beams == 1 else max(held, prompt_tokens)
    rows = max(1, held // (beams * row)) * beams
    parts = {
        "weights": base.weights,
        # Read in float32, and copied into the model's dtype.
        "adapter": float(adapter_parameters * (s + 4)),
        "keys and values": held * a_token * (1 + 2 / shape.layers),
        "at the peak": (
            computed * _passing(shape, s)
            + computed * shape.group * row * (s + 2)  # the mask, repeated for each query head of a group
            + rows * shape.vocabulary * (s if beams == 1 else 16)
            + base.unpacking
        ),
    }
    return _with_margin(parts, device)


def reading(base: Base, tokens: int, adapter_parameters: int, device: Device) -> Parts:
    """The parts of the stage forget, in bytes: it holds the logits of base and tuned for `tokens` tokens of text."""
    shape, s = base.shape, base.itemsize
    parts = {
        "weights": base.weights,
        "adapter": float(adapter_parameters * (s + 4)),
        "logits": float(2 * tokens * shape.vocabulary * s + PLACES * shape.vocabulary * 24),
        "at the peak": tokens * (_passing(shape, s) + shape.group * tokens * (s + 2)) + base.unpacking,
    }
    return _with_margin(parts, device)


def likelihoods(base: Base, tokens: int, device: Device) -> Parts:
    """The parts of the stage contamination, in bytes: it holds the logits of `tokens` tokens, in float32 as well."""
    shape, s = base.shape, base.itemsize
    parts = {
        "weights": base.weights,
        "logits": float(tokens * shape.vocabulary * (s + 8)),
        "at the peak": tokens * (_passing(shape, s) + shape.group * tokens * (s + 2)) + base.unpacking,
    }
    return _with_margin(parts, device)


def quantizing(base: Base, device: Device, base_elsewhere: bool = False, rows: int = 0) -> Parts:
    """The parts of the stage quantize, in bytes: the quantized base, and the dense one unless it lies elsewhere.

    `rows`: windows of text that gptq reads where the dense base lies.
    """
    shape, s = base.shape, base.itemsize
    parts = {
        "weights": 0.0 if base_elsewhere else base.dense_bytes,
        "quantized weights": 0.0 if base.method == "none" else base.packed_bytes,
        "logits": float(WINDOW * shape.vocabulary * (s + 8)),
        "at the peak": WINDOW * _passing(shape, s) + max(base.unpacking, 24.0 * _largest(shape)),
    }
    if base.group_size is not None:  # it is written as a copy, and read again beside what was made
        parts["written"] = 2 * base.packed_bytes
    if rows and not base_elsewhere:
        parts["calibration"] = _calibrating(base, rows)
    parts = _with_margin(parts, device)
    # The file is mapped while it is read: pages that the system takes back when it needs them.
    return parts if device == "cuda" else {**parts, MAPPED: base.dense_bytes}


def _calibrating(base: Base, rows: int) -> float:
    """Bytes that gptq holds beside the weights: what a block reads of all windows, and in float32 the products of what
    its layers read, with three more of the largest while that is inverted."""
    shape = base.shape
    products = 2 * shape.hidden_size**2 + shape.queries**2 + shape.intermediate_size**2
    inverted = 3 * max(inputs for inputs, _ in shape.linears.values()) ** 2
    return float(rows * WINDOW * shape.hidden_size * base.itemsize + 4 * (products + inverted))


def total(parts: Mapping[str, float]) -> float:
    return sum(parts.values())


def demand(parts: Mapping[str, float]) -> float:
    """Bytes that must be free. Mapped files need none, since the system takes their pages back."""
    return total(parts) - parts.get(MAPPED, 0.0)


def _state(optimizer: str, shape: Shape, lora: params.Lora) -> float:
    """Bytes of the optimizer's state.

    Two moments in float32, or in 8 bits with a constant for each block of 256; with Muon one in float32; with Adafactor
    a row and a column of each matrix.
    """
    size = adapted.size(shape, lora)
    if optimizer != "adafactor":
        each = {"adamw": 8.0, "muon": 4.0}.get(optimizer, 2 * (1 + 4 / 256))
        return each * size.trained
    edges = 0
    for ranks, count in adapted.blocks(shape, lora).items():
        for name, rank in ranks:
            inputs, outputs = shape.linears[name]
            edges += count * ((lora.train_only != "B") * (rank + inputs) + (lora.train_only != "A") * (rank + outputs))
            edges += count * outputs * lora.dora
    edges += len(lora.modules_to_save) * (shape.vocabulary + shape.hidden_size)
    return 4.0 * edges


def _kept_a_token(base: Base, lora: params.Lora, ranks: adapted.Ranks, longest: int, device: Device) -> float:
    """Bytes that one block with these adapters keeps for each token for the backward pass."""
    shape, s = base.shape, base.itemsize
    h, i, a, k = shape.hidden_size, shape.intermediate_size, shape.queries, shape.keys
    changed = {name: shape.linears[name] for name, _ in ranks}
    read = {  # inputs of adapted layers, counted once for layers that read the same
        "attention": h * any(name in changed for name in ("q_proj", "k_proj", "v_proj", "qkv_proj")),
        "attended": a * ("o_proj" in changed),
        "mlp": h * any(name in changed for name in ("gate_proj", "up_proj", "gate_up_proj")),
        "gated": i * ("down_proj" in changed),
    }
    values = (
        2 * h  # the residual before each norm
        + (a + 2 * k)  # projected
        + (a + k)  # turned
        + a  # queries, the heads of a group below each other
        + 2 * i  # gate and up
        + (2 if lora.decomposes else 1) * sum(rank for _, rank in ranks)
        + (0 if lora.dropout or lora.train_only == "B" else sum(read.values()))
    )
    kept = float(values * s + 8)
    # The weights of attention; or the mask in the model's dtype, once for each query head of a group.
    if device == "cpu" and longest <= KEPT_WEIGHTS:
        kept += shape.attention_heads * longest * s
    else:
        kept += (a + shape.group * longest) * s
    if lora.dropout:  # PEFT's own steps: each layer keeps its own input, and the mask of what was dropped
        kept += sum(inputs for inputs, _ in changed.values()) * (s + (1 if device == "cuda" else s))
    if lora.dora:  # PEFT's own steps: what each layer gives without its adapter, and what the adapter adds
        kept += sum(2 * outputs for _, outputs in changed.values()) * s
    if shape.family not in FUSED:
        kept += 2 * (4 * h + 4) + (i + a + k) * s + 4 * h
    return kept


def _joined(shape: Shape, lora: params.Lora, ranks: adapted.Ranks) -> float:
    """Values that a block keeps of its adapters: joined if they read one input (`fused.Siblings`), and scaled B."""
    times = 2 if lora.decomposes else 1
    rank_of = {name: times * rank for name, rank in ranks}
    values = 0.0
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        several = [name for name in names if name in rank_of]
        together = sum(rank_of[name] for name in several)
        values += together * sum(shape.linears[name][1] for name in names if name in shape.linears)
        values += sum(rank_of[name] * shape.linears[name][0] for name in several)
    if lora.decomposes:  # the adapter and its start are joined in every layer
        values += sum(rank * sum(shape.linears[name]) for name, rank in rank_of.items())
    return values + sum(rank * shape.linears[name][1] for name, rank in rank_of.items())


def _weighing(shape: Shape, lora: params.Lora) -> float:
    """Values that DoRA holds at once while PEFT measures the weights of one layer: B A by an identity matrix of the
    inputs, scaled, added to the weights."""
    changed = [shape.linears[name] for ranks in adapted.blocks(shape, lora) for name, _ in ranks]
    return float(max((4 * inputs * outputs + inputs * inputs for inputs, outputs in changed), default=0))


def _passing(shape: Shape, s: int) -> float:
    """Bytes for one token on its way through a layer when nothing is kept."""
    h, i, a, k = shape.hidden_size, shape.intermediate_size, shape.queries, shape.keys
    return float((4 * h + 3 * i + 3 * a + 3 * k) * s + 12 * h)


def _largest(shape: Shape) -> int:
    return max(inputs * outputs for inputs, outputs in shape.linears.values())


def _whole(tokens: int) -> int:
    return -(-tokens // TILE) * TILE


def _with_margin(parts: Parts, device: Device, recomputed: bool = False) -> Parts:
    passing = sum(parts.get(name, 0.0) for name in ("activations", "logits", "at the peak"))
    share = LOST_AGAIN[device] if recomputed else LOST[device]
    lost = share * passing + LOST_SLOTS[device] * parts.get("keys and values", 0.0)
    return {**parts, "margin": MARGIN * total(parts) + lost, "libraries": LIBRARIES[device]}


# The device at hand


def available(device: "torch.device") -> float:
    """Bytes that this process may still take of CUDA's free memory, Metal's working set, or the main memory."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        metal = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(float(metal), main_memory())
    # The members of a stage on one machine share it, and all ask before any of them loads.
    return main_memory() / processes.local_processes()


CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where a container's limit stands, what it uses, and how much of that is reclaimable files; cgroup versions 2 and 1.
The machine's free memory does not show them."""


def main_memory() -> float:
    """Bytes of main memory that are available to this process; `SPARE` is left to others."""
    import psutil

    free = float(psutil.virtual_memory().available)
    for folder, limit, used, files in CGROUPS:
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
            taken = float((folder / used).read_text(encoding="utf-8")) - float(stat.get(files, 0))
            free = min(free, float((folder / limit).read_text(encoding="utf-8")) - taken)
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return (1 - SPARE) * free


def held(base: Base, runtime: params.Runtime, device: "torch.device") -> Base:
    """The base as this process holds it on `device` under `runtime`.

    UserError if FSDP divides it among GPUs and main memory has no room for the whole, which is read there first.
    """
    here = loaded(base, runtime, kind(device))
    if here.sharding == "fsdp" and here.packed_bytes * (1 + MARGIN) > main_memory():
        raise UserError(
            f"runtime.sharding = 'fsdp' reads the base into main memory before it divides it: "
            f"{_gb(here.packed_bytes)}, and {_gb(main_memory())} are left; take a machine with more"
        )
    return here


def kind(device: "torch.device") -> Device:
    known: dict[str, Device] = {"cpu": "cpu", "cuda": "cuda", "mps": "mps"}
    return known[device.type]


def largest(needed: Callable[[int], Mapping[str, float]], room: float, at_least: int, at_most: int) -> int | None:
    """The largest number of tokens, a multiple of `TILE`, whose `needed` bytes fit into `room`; None if `at_least` does
    not fit."""
    low, high = -(-at_least // TILE), at_most // TILE
    if low > high or total(needed(low * TILE)) > room:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total(needed(middle * TILE)) <= room else (low, middle - 1)
    return low * TILE


def require_training(
    device: "torch.device", base: Base, lora: params.Lora, train: params.Train, load: Load, recomputed: bool
) -> Parts:
    """What training is predicted to take beside the libraries.

    UserError if the device has less: it names the largest micro-batch that fits, or settings with which one fits.
    """
    here = Settings(base, train, recomputed)

    def needed(tokens: int, settings: Settings = here) -> Parts:
        share = min(1.0, tokens / load.tokens)
        limited = Load(tokens, round(share * load.answers), load.longest)
        return _loaded(training(settings.base, lora, settings.train, limited, kind(device), settings.recomputed))

    def remedy(room: float) -> str:
        fits = largest(needed, room, load.longest, load.tokens - 1)
        if fits is not None:
            return f"set train.micro_batch_tokens to {fits} or less (it is {train.micro_batch_tokens})"
        fitting = _other_settings(here, device, lambda other: total(needed(load.longest, other)) <= room)
        return f"the longest group alone has {load.longest} tokens and takes {_gb(total(needed(load.longest)))}: " + (
            " or ".join(fitting) if fitting else f"lower prompt.max_tokens or lora.r, or {_more(base)}"
        )

    return _require("train", needed(load.tokens), device, remedy)


def require_inference(
    device: "torch.device", base: Base, generation: params.Generation, prompt_tokens: int, adapter_parameters: int
) -> Parts:
    """What decoding is predicted to take.

    `prompt_tokens`: length of the longest prompt. UserError if the device has less: it names the largest
    `generation.batch_tokens` that fits, or settings with which one example fits.
    """

    def needed(tokens: int, base: Base = base) -> Parts:
        limited = generation.model_copy(update={"batch_tokens": tokens})
        return _loaded(inference(base, limited, prompt_tokens, adapter_parameters, kind(device)))

    def remedy(room: float) -> str:
        fits = largest(needed, room, TILE, generation.batch_tokens - 1)
        if fits is not None:
            return f"set generation.batch_tokens to {fits} or less (it is {generation.batch_tokens})"
        if base.packed and base.keep_dequantized:
            one = _gb(total(needed(TILE, _packed(base))))
            return f"set runtime.keep_dequantized to false (then it is {one} for one example)"
        return f"one example alone does not fit: lower prompt.max_tokens, or {_more(base)}"

    return _require("infer", needed(generation.batch_tokens), device, remedy)


def require_reading(device: "torch.device", base: Base, tokens: int, adapter_parameters: int) -> Parts:
    """What the stage forget is predicted to take for `tokens` tokens at once; UserError if the device has less."""

    def remedy(_: float) -> str:
        remedies = ["lower the largest window of forget.probes (its logits are held)"] if tokens > 2 * WINDOW else []
        if base.packed and base.keep_dequantized:
            remedies.append("set runtime.keep_dequantized to false")
        return " or ".join(remedies) or f"{_more(base)}, or set forget.probes to []"

    return _require("forget", _loaded(reading(base, tokens, adapter_parameters, kind(device))), device, remedy)


def require_likelihoods(device: "torch.device", base: Base, tokens: int) -> Parts:
    """What the stage contamination is predicted to take for shards of `tokens` tokens; UserError if the device has
    less."""
    parts = _loaded(likelihoods(base, tokens, kind(device)))
    return _require("contamination", parts, device, lambda _: "lower contamination.tokens, or set its shards to 0")


def _require(stage: str, parts: Parts, device: "torch.device", remedy: Callable[[float], str]) -> Parts:
    """`parts`; UserError with the remedy for the room there is, if the device has less."""
    room = available(device)
    if total(parts) > room:
        raise _too_much(stage, parts, device, room, remedy(room))
    return parts


def _too_much(stage: str, parts: Parts, device: "torch.device", room: float, remedy: str) -> UserError:
    return UserError(f"{stage} takes about {_explain(parts)}, and {device.type} has {_gb(room)} left: {remedy}")


def require_quantizing(device: "torch.device", base: Base, rows: int = 0) -> "torch.device":
    """The device for the unquantized base: the one at hand, else main memory. UserError if neither has room.

    `rows`: windows of text that gptq reads there.
    """
    import torch

    together, room = _loaded(quantizing(base, kind(device), rows=rows)), available(device)
    if total(together) <= room:
        return device
    alone = _loaded(quantizing(base, kind(device), base_elsewhere=True))
    main = torch.device("cpu")
    if device.type == "cuda" and base.method != "none" and total(alone) <= room:
        elsewhere = base.dense_bytes + (_calibrating(base, rows) if rows else 0.0)
        if elsewhere * (1 + MARGIN) <= main_memory():
            return main
        remedy = (
            f"the base by itself, {_gb(elsewhere)}, does not fit into the main memory either, which has "
            f"{_gb(main_memory())} left: take a larger machine for this stage (others need less), or a smaller model"
        )
    else:
        remedy = "take a larger machine, or a smaller model"
    raise _too_much("quantize", together, device, room, remedy)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything but the rows that decides the memory of training."""

    base: Base
    train: params.Train
    recomputed: bool


def _other_settings(here: Settings, device: "torch.device", fits: Callable[[Settings], bool]) -> list[str]:
    """The changes with which training fits, as few as possible: single ones, else pairs, else all together."""
    changes: list[tuple[str, Callable[[Settings], Settings]]] = []
    if here.base.packed and here.base.keep_dequantized:
        changes.append(("runtime.keep_dequantized to false", lambda one: replace(one, base=_packed(one.base))))
    if not here.recomputed:
        changes.append(("runtime.gradient_checkpointing to true", lambda one: replace(one, recomputed=True)))
    if here.train.optimizer == "adamw" and device.type != "mps":
        smaller = here.train.model_copy(
            update={"optimizer": "paged-adamw8bit" if device.type == "cuda" else "adamw8bit"}
        )
        changes.append((f"train.optimizer to {smaller.optimizer}", lambda one: replace(one, train=smaller)))
    for count in range(1, len(changes) + 1):
        found = []
        for chosen in itertools.combinations(changes, count):
            settings = here
            for _, change in chosen:
                settings = change(settings)
            if fits(settings):
                found.append("set " + " and ".join(name for name, _ in chosen))
        if found:
            return found
    return []


def _more(base: Base) -> str:
    return "take larger devices" if base.devices > 1 else "take a larger device or several (runtime.sharding)"


def _packed(base: Base) -> Base:
    return replace(base, keep_dequantized=False)


def _loaded(parts: Parts) -> Parts:
    """Without the libraries, which are already loaded when memory is looked at, and without mapped files."""
    return {name: value for name, value in parts.items() if name not in ("libraries", MAPPED)}


def _explain(parts: Mapping[str, float]) -> str:
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    return f"{_gb(total(parts))} of memory ({', '.join(f'{name} {_gb(value)}' for name, value in largest_first[:4])})"


def _gb(value: float) -> str:
    return f"{value / GB:.1f} GB"
