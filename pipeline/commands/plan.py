"""`lora-repro plan`: predicts the memory that each stage of an experiment needs, and the settings that fit a device.

No rows are read. The longest row is assumed to be as long as the parameters allow: `prompt.max_tokens`, and for each
instruction an answer of `generation.max_new_tokens`. A stage counts its own rows (`pipeline.model.memory`).
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import forget as reading
from pipeline.commands import use
from pipeline.core import baseline, params, paths
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.fetch import glance
from pipeline.fetch.unfit import named
from pipeline.model import adapted, memory
from pipeline.model.memory import GB, Device, Parts, total
from pipeline.model.shape import Shape

CARDS = (24, 48, 80)
"""Sizes of GPUs, in GB of 10^9 bytes. A card sold by this size has about so much."""
MEMORY = ("keep_dequantized", "gradient_checkpointing", "sharding")
"""The settings of `runtime` that decide how much memory a process needs."""
MOST = 131_072
"""The largest number of tokens that is tried."""


@dataclass(frozen=True)
class Plan:
    """An experiment's parameters and its model's architecture, on one kind of device. Each method predicts a stage."""

    given: params.Params
    shape: Shape
    device: Device
    keep_dequantized: bool

    @property
    def base(self) -> memory.Base:
        quantize, dtype = self.given.quantize, self.given.model.dtype
        base = memory.Base(self.shape, dtype, quantize.method, quantize.double_quantization, False, quantize.groups)
        runtime = self.given.runtime.model_copy(update={"keep_dequantized": self.keep_dequantized})
        return memory.loaded(base, runtime, self.device)

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt."""
        return min(self.given.prompt.max_tokens, self.shape.context)

    @property
    def longest(self) -> int:
        """Tokens of the longest group of rows, which share a prompt and have an answer each."""
        columns = self.given.data.columns
        shared = self.given.data.format == "aclsum" or bool(columns and columns.group)
        answers = max(1, len(self.given.prompt.instructions)) if shared else 1
        return self.prompt + answers * self.given.generation.max_new_tokens

    @property
    def supervised(self) -> float:
        """The share of a micro-batch's tokens whose logits are computed."""
        return 1.0 if self.given.train.prompt_loss_weight else memory.ANSWERS

    def quantize(self) -> Parts:
        return memory.quantizing(self.base, self.device, rows=self.given.quantize.read_rows)

    def quantize_alone(self) -> Parts:
        """As `quantize`, with the unquantized base in main memory."""
        return memory.quantizing(self.base, self.device, base_elsewhere=self.given.quantize.method != "none")

    def train(self, micro_batch_tokens: int | None = None) -> Parts:
        tokens = max(micro_batch_tokens or self.given.train.micro_batch_tokens, self.longest)
        load = memory.Load(tokens, round(self.supervised * tokens), self.longest)
        recomputed = self.given.runtime.gradient_checkpointing
        return memory.training(self.base, self.given.lora, self.given.train, load, self.device, recomputed)

    def infer(self, batch_tokens: int | None = None) -> Parts:
        limits = self.given.generation
        if batch_tokens is not None:
            limits = limits.model_copy(update={"batch_tokens": batch_tokens})
        return memory.inference(self.base, limits, self.prompt, self._added, self.device)

    def infer_unquantized(self) -> Parts:
        dense = replace(self.base, method="none", double_quantization=False, group_size=None)
        return memory.inference(dense, self.given.generation, self.prompt, 0, self.device)

    def infer_shots(self) -> Parts:
        """With demonstrations as long as the longest prompt, or as the model's context has room for."""
        limits = self.given.generation
        longest = min(self.prompt * (1 + self.given.baseline.shots), self.shape.context - limits.max_new_tokens)
        return memory.inference(self.base, limits, max(self.prompt, longest), 0, self.device)

    def forget(self) -> Parts:
        tokens = max([reading.TOGETHER, *(probe.window for probe in self.given.forget.probes)])
        return memory.reading(self.base, tokens, self._added, self.device)

    def contamination(self) -> Parts:
        dense = replace(self.base, method="none", double_quantization=False)
        return memory.likelihoods(dense, self.given.contamination.tokens, self.device)

    @property
    def _added(self) -> int:
        """Values of the saved adapter."""
        return adapted.size(self.shape, self.given.lora).saved

    def stages(self) -> dict[str, Parts]:
        """The stages that load a model; `unquantized` and `shots` are infer-unquantized and infer-shots."""
        stages = {"quantize": self.quantize(), "train": self.train(), "infer": self.infer()}
        asked = self.given.baseline
        if baseline.unquantized_off(asked.unquantized, self.given.quantize.method) is None:
            stages["unquantized"] = self.infer_unquantized()
        if baseline.shots_off(asked.shots) is None:
            stages["shots"] = self.infer_shots()
        if self.given.contamination.shards:
            stages["contamination"] = self.contamination()
        return {**stages, "forget": self.forget()} if self.given.forget.probes else stages


def gpu_gb(given: params.Params, shape: Shape) -> int:
    """The GB of a GPU on which every stage runs, if a 4-bit base is unpacked on the fly, and the unquantized base may
    lie in main memory."""
    plan = Plan(given, shape, "cuda", keep_dequantized=False)
    needed = {**plan.stages(), "quantize": plan.quantize_alone()}
    return math.ceil(max(map(total, needed.values())) / GB)


def show(recipe: str | None) -> None:
    """Print the plan of a recipe, or of `params.yaml`."""
    here = params.load()
    if recipe is None:
        name, given, stated = str(paths.PARAMS), here, None
    else:
        name, given = f"recipe {recipe}", use.experiment(recipe, here)
        stated = use.stated_shape(recipe)
    shape = stated or _shape(given)
    for line in lines(name, given, shape):
        say(line)


def _shape(given: params.Params) -> Shape:
    """The architecture of the model: from the fetched base, from a local folder, or from a recipe that states it."""
    if paths.BASE_FACTS.is_file():
        facts = json.loads(paths.BASE_FACTS.read_text(encoding="utf-8"))
        if facts["source"] == given.model.source:
            return Shape.read(paths.BASE)
    with named(given.model.source):
        if seen := glance.shape(Path(given.model.source).expanduser()):
            return seen
    if found := use.shape_of(given.model.source):
        return found
    raise UserError(
        f"the architecture of {given.model.source} is unknown: fetch the model with `dvc repro fetch`, or state the "
        f"architecture in a recipe as needs.model (keys: {', '.join(Shape.model_fields)})"
    )


def lines(name: str, given: params.Params, shape: Shape) -> Iterator[str]:
    """The lines of the plan: the settings, the peak of each stage by parts, and the settings that fit each device."""
    keep = given.runtime.keep_dequantized
    plan = Plan(given, shape, "cuda", keep)
    adapter = adapted.size(shape, given.lora).trained
    yield (
        f"{name}: {shape.family}, {shape.parameters / 1e6:,.0f} M parameters, {given.model.dtype}; "
        f"{given.quantize.method}; adapter of rank {given.lora.r}, {adapter / 1e6:,.1f} M; {given.train.optimizer}"
    )
    yield f"{_runtime(given.runtime)}; GB of 10^9 bytes"
    yield ""
    stages = plan.stages()
    names = list(dict.fromkeys(part for parts in stages.values() for part in parts))
    yield f"{'predicted peak on CUDA':30}" + "".join(f"{stage:>14}" for stage in stages)
    for part in names:
        cells = (f"{parts[part] / GB:.2f}" if part in parts else "" for parts in stages.values())
        yield f"{part:30}" + "".join(f"{cell:>14}" for cell in cells)
    yield f"{'total':30}" + "".join(f"{total(parts) / GB:>14.2f}" for parts in stages.values())
    yield ""
    here = memory.main_memory() + memory.LIBRARIES["cpu"]
    cards: list[tuple[str, float, Device]] = [(f"{card} GB", card * GB, "cuda") for card in CARDS]
    yield from _fitting(given, shape, [*cards, (f"CPU, {here / GB:.0f} GB", here, "cpu")])
    yield ""
    yield (
        f"Assumed: prompts of {plan.prompt} tokens, groups of {plan.longest}; at most "
        f"{plan.supervised:.0%} of a micro-batch are supervised. A stage counts its own rows before it loads the model."
    )
    yield "Predictions were compared with peaks on a CPU (docs/memory.md); on CUDA and MPS nothing has been measured."


def _runtime(runtime: params.Runtime) -> str:
    """The settings that decide memory, as they are printed."""
    settings = [f"runtime.{name}: {str(getattr(runtime, name)).lower()}" for name in MEMORY]
    divided = f", over {runtime.processes} devices" if runtime.sharding != "none" else ""
    return ", ".join(settings) + divided


def _fitting(given: params.Params, shape: Shape, devices: list[tuple[str, float, Device]]) -> Iterator[str]:
    """For each device, given by name and bytes: whether the stages fit, and the largest settings that do."""
    yield f"{'largest that fits':36}" + "".join(f"{name:>18}" for name, _, _ in devices)
    either = given.runtime.sharding == "none" and Plan(given, shape, "cpu", True).base.packed
    modes = [True, False] if either else [given.runtime.keep_dequantized]

    def row(label: str, cell: Callable[[Plan, float], str], keep: bool = False) -> str:
        cells = (cell(Plan(given, shape, device, keep), room) for _, room, device in devices)
        return f"{label:36}" + "".join(f"{one:>18}" for one in cells)

    yield row("quantize", _quantize)
    for keep in modes:
        behind = f", {'unpacked' if keep else 'packed'}" if len(modes) > 1 else ""
        yield row(f"train.micro_batch_tokens{behind}", _train, keep)
        yield row(f"generation.batch_tokens{behind}", _infer, keep)
        if given.forget.probes:
            yield row(f"forget{behind}", lambda plan, room: "yes" if total(plan.forget()) <= room else "no", keep)
    if len(modes) > 1:
        yield "unpacked, packed: runtime.keep_dequantized true, false"


def _quantize(plan: Plan, room: float) -> str:
    if memory.demand(plan.quantize()) <= room:
        return "yes"
    if plan.device == "cuda" and total(plan.quantize_alone()) <= room and plan.given.quantize.method != "none":
        return f"with {plan.base.dense_bytes * (1 + memory.MARGIN) / GB:.0f} GB RAM"
    return "no"


def _train(plan: Plan, room: float) -> str:
    if plan.device not in params.OPTIMIZERS[plan.given.train.optimizer]:
        return "other optimizer"
    return _tokens(memory.largest(plan.train, room, memory.TILE, MOST), plan.longest)


def _infer(plan: Plan, room: float) -> str:
    return _tokens(memory.largest(plan.infer, room, memory.TILE, MOST), 0)


def _tokens(fits: int | None, longest: int) -> str:
    """A number of tokens that fits. A smaller number than `longest`, the longest group, needs as much memory as that
    group, which is computed alone."""
    if fits is None:
        return "no"
    return f">= {fits:,}" if fits == MOST else f"{max(fits, longest):,}"
