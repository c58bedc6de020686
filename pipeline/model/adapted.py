"""Which layers of a model an adapter changes, with which ranks, and how many values that takes; nothing is loaded.

`pipeline.lora.start` makes the adapter that is described here.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.model.shape import Shape

Layers = dict[str, tuple[int, int]]
"""Adapted layers by their full names in transformers, each with its inputs and outputs."""
Ranks = tuple[tuple[str, int], ...]
"""The adapted layers of one block by the last part of their names, each with its rank."""


def pattern_of(keys: Iterable[str], layer: str) -> str | None:
    """The key of `rank_pattern` or `alpha_pattern` that is for a layer, by its full name; None if none is.

    As in PEFT, it is the first that matches the whole name, or its end after a dot.
    """
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", layer)), None)


def rank_of(lora: params.Lora, layer: str) -> int:
    """The rank at a layer, by its full name."""
    key = pattern_of(lora.rank_pattern, layer)
    return lora.r if key is None else lora.rank_pattern[key]


def adapts(lora: params.Lora, block: int, layer: str) -> bool:
    """Whether the layer of that name, such as q_proj, gets an adapter in a block (from 0)."""
    named = lora.target_modules == "all-linear" or layer in lora.target_modules
    return named and (lora.layers is None or block in lora.layers)


# What a model does not have


def require_shape(lora: params.Lora, shape: Shape, biases: bool | None = None) -> None:
    """UserError for settings that a model of this shape cannot honour. `biases`: whether it has any; None: unknown."""
    require_targets(lora, shape.linears)
    require_blocks(lora, shape.layers)
    layers = {
        full: shape.linears[name]
        for block in range(shape.layers)
        for name, full in shape.names(block).items()
        if adapts(lora, block, name)
    }
    require_layers(lora, layers)
    require_untied(lora, shape.tied_embeddings)
    if lora.bias != "none" and biases is False:
        raise UserError(f"lora.bias = {lora.bias!r}, but this model has no biases: set it to none")


def require_targets(lora: params.Lora, known: Iterable[str]) -> None:
    """UserError for a target module that is none of the model's `known` linear layers."""
    if unknown := sorted(set(lora.target_modules) - set(known)) if lora.target_modules != "all-linear" else []:
        raise UserError(
            f"lora.target_modules names {', '.join(unknown)}, which this model does not have; "
            f"it has {', '.join(sorted(known))} (all-linear takes all of them)"
        )


def require_blocks(lora: params.Lora, blocks: int) -> None:
    """UserError if `lora.layers` names a block that a model with so many does not have."""
    if beyond := [at for at in lora.layers or [] if at >= blocks]:
        raise UserError(f"lora.layers names block {beyond[0]}, but this model has {blocks}: 0 to {blocks - 1}")


def require_layers(lora: params.Lora, layers: Layers) -> None:
    """UserError for a pattern that decides nothing at `layers`, and for a start with more ranks than a weight has."""
    for name in ("rank_pattern", "alpha_pattern"):
        keys: Mapping[str, float] = getattr(lora, name)
        used = {pattern_of(keys, layer) for layer in layers}
        if idle := [key for key in keys if key not in used]:
            first = next(iter(layers))
            raise UserError(
                f"lora.{name} has {idle[0]!r}, which matches no adapted layer, or none that an earlier pattern has not "
                f"matched: name a layer such as {first.rpartition('.')[2]} or {first}"
            )
    if lora.decomposes or lora.init == "loftq":
        for layer, sizes in layers.items():
            if (rank := rank_of(lora, layer)) > min(sizes):
                raise UserError(
                    f"lora.init = {lora.init!r} with rank {rank} at {layer}, whose weight has rank {min(sizes)} at "
                    "most: lower lora.r, or give it a rank in lora.rank_pattern"
                )


def require_untied(lora: params.Lora, tied: bool) -> None:
    """UserError if a module would be trained whole that is one with another."""
    if lora.modules_to_save and tied:
        raise UserError(
            f"lora.modules_to_save = {lora.modules_to_save}, but embeddings and head of this model are one tensor: a "
            "trained copy of one would part them, and a merged export could not hold that; set it to []"
        )


# What it takes


def blocks(shape: Shape, lora: params.Lora) -> Counter[Ranks]:
    """How many blocks have which adapters."""
    return Counter(
        tuple((name, rank_of(lora, full)) for name, full in shape.names(block).items() if adapts(lora, block, name))
        for block in range(shape.layers)
    )


@dataclass(frozen=True, slots=True)
class Size:
    """The values of an adapter: those that are trained, those that are held frozen beside them, and those that are
    saved. Trained biases, at most one for each output, are not counted."""

    trained: int
    frozen: int
    saved: int


def size(shape: Shape, lora: params.Lora) -> Size:
    """rank x inputs in each A, rank x outputs in each B, with DoRA a length for each output, and whole modules."""
    a = b = lengths = 0
    for ranks, count in blocks(shape, lora).items():
        for name, rank in ranks:
            inputs, outputs = shape.linears[name]
            a, b, lengths = a + count * rank * inputs, b + count * rank * outputs, lengths + count * outputs
    others = (lengths if lora.dora else 0) + len(lora.modules_to_save) * shape.vocabulary * shape.hidden_size
    idle = {"A": b, "B": a, None: 0}[lora.train_only]
    start = a + b if lora.decomposes else 0
    return Size(trained=a + b - idle + others, frozen=idle + start, saved=a + b + start + others)
