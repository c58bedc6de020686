"""What the linear layers of a model read, block by block, on windows of the training sources."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from pipeline.core.progress import bar


class _EnoughError(Exception):
    """Ends a forward pass of which no more is needed."""


@torch.no_grad()
def blocks(model: Any, windows: Sequence[Sequence[int]]) -> Iterator[dict[str, torch.Tensor]]:
    """For each block of a model, first to last: the names of its linear layers, and for each the sum of x x', IxI in
    float32, over its inputs x.

    Layers that read one input share a tensor. Whoever iterates may replace the block's layers before asking for the
    next block, which then reads what the replaced ones write.
    """
    decoder = model.get_decoder()
    inside = next(name for name, module in model.named_modules() if module is decoder.layers)
    with bar("calibrate", len(decoder.layers), "blocks") as advance:
        states, options = _first(decoder, windows)
        for number, block in enumerate(decoder.layers):
            given = {length: each[number] for length, each in options.items()}
            name = f"{inside}.{number}"
            yield {f"{name}.{layer}": products for layer, products in _products(block, states, given).items()}
            for at, state in enumerate(states):
                states[at] = _output(block, state, given[state.shape[1]])
            advance(1)


def _first(
    decoder: Any, windows: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], dict[int, list[dict[str, Any]]]]:
    """What the first block reads of each window, 1xLxH, and for each length what else each block is given."""
    device = next(decoder.parameters()).device
    states: list[torch.Tensor] = []
    options: dict[int, list[dict[str, Any]]] = {}

    def first(_: Any, given: tuple[Any, ...]) -> None:
        states.append(given[0])
        if given[0].shape[1] in options:
            raise _EnoughError

    def every(_: Any, given: tuple[Any, ...], others: dict[str, Any]) -> None:
        options.setdefault(given[0].shape[1], []).append(others)

    with ExitStack() as hooks:
        hooks.enter_context(decoder.layers[0].register_forward_pre_hook(first))
        for block in decoder.layers:
            hooks.enter_context(block.register_forward_pre_hook(every, with_kwargs=True))
        for window in windows:
            try:
                decoder(input_ids=torch.tensor([window], device=device), use_cache=False)
            except _EnoughError:
                continue
    return states, options


def _products(
    block: Any, states: Sequence[torch.Tensor], options: dict[int, dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """The sums of a block's linear layers. Layers that are given the same tensor share one."""
    read: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}

    def note(name: str, _: Any, given: tuple[Any, ...]) -> None:
        read[name] = given[0]

    with ExitStack() as hooks:
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear):
                hooks.enter_context(layer.register_forward_pre_hook(partial(note, name)))
        for state in states:
            _output(block, state, options[state.shape[1]])
            while read:
                name, given = read.popitem()
                if name not in sums:
                    sums[name] = torch.zeros(given.shape[-1], given.shape[-1], device=given.device)
                for other in [other for other, one in read.items() if one is given]:
                    sums[other] = sums[name]
                    del read[other]
                x_LxI = given.flatten(0, -2).float()
                sums[name].addmm_(x_LxI.T, x_LxI)
    return sums


def _output(block: Any, state: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """What a block writes, 1xLxH."""
    given = block(state, **options)
    output: torch.Tensor = given[0] if isinstance(given, tuple) else given
    return output
