"""Decoding of many prompts at once, greedy or by drawn tokens. Nothing is computed twice, and finished sequences make
room for new ones.

Each active sequence has a slot of one key-value cache. The common beginning of a family's prompts is computed once and
copied. A long beginning that all families share, such as demonstrations, is computed and held once, and read once a
step for all sequences. A finished sequence leaves its slot at once, and the next ones in the queue take over. Each
token sees that beginning and the columns of its own slot, with the same order and positions as if it were alone. So the
batch changes only rounding, and that only on some devices.

Dimensions: R rows (slots in use), Q new tokens of a row, C columns of the cache, H key-value heads, D their size, V
vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    Cache,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from pipeline.core import params
from pipeline.infer import sampling

PREFILL_TOKENS = 1024
"""The most prompt tokens computed at once. A longer prompt is computed alone."""

REFILL = 4
"""New sequences start when 1/REFILL of the slots is free: computing few prompts at once would be slow."""

COMMON = 256
"""A beginning of at least so many tokens that all families share is held once for all of them. The system message of a
chat template, which is shorter, is computed with each family."""

COLUMNS = 16
"""Attention covers a multiple of this many columns, so that sums run over whole vectors in any batch."""


@dataclass(slots=True)
class Request:
    """A prompt of at least one token, and the new tokens after it."""

    name: str
    prompt: list[int]
    new: list[int] = field(default_factory=list)


Beginning = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of a beginning, HxLxD each, by layer."""

Family = list[Request]
"""Requests whose prompts may begin alike."""


def decode(
    model: Any,
    config: Any,
    families: Sequence[Family],
    rows: int,
    tokens: int,
    drawing: params.Sampling | None = None,
) -> Iterator[Request]:
    """Yield each request when it is finished: at a stop token, which is kept, or after `config.max_new_tokens`.

    At most `rows` sequences are active at once, or fewer if they do not fit into `tokens` columns, but at least one.
    `config` is a transformers GenerationConfig, of which penalties and ends are used. The likeliest token is taken, or
    one is drawn as `drawing` says.
    """
    return _Scheduler(model, config, families, rows, tokens, drawing).run()


class Slots(Cache):  # type: ignore[misc]
    """The key-value cache. Column c of a slot holds the c-th token of the slot's sequence behind the beginning."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(layers=[])
        self.rows, self.columns = rows, columns
        self.held: dict[tuple[int, str], torch.Tensor] = {}  # (layer, keys or values): SxHxCxD, S slots

    def write_at(self, first: int, column_RxQ: torch.Tensor, visible: int) -> None:
        """Set where the next forward pass writes, from slot `first` on, and how many columns it sees."""
        rows = column_RxQ.shape[0]
        self.window = slice(first, first + rows)
        self.slot_Rx1 = torch.arange(first, first + rows, device=column_RxQ.device)[:, None]
        self.column_RxQ, self.visible = column_RxQ, visible

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store RxHxQxD keys and values of a layer, and return all that it sees. The model calls this in each layer."""
        return self._extend((layer_idx, "keys"), key_states), self._extend((layer_idx, "values"), value_states)

    def _extend(self, name: tuple[int, str], new_RxHxQxD: torch.Tensor) -> torch.Tensor:
        if name not in self.held:
            _, heads, _, size = new_RxHxQxD.shape
            self.held[name] = new_RxHxQxD.new_zeros(self.rows, heads, self.columns, size)
        held = self.held[name]
        held[self.slot_Rx1, :, self.column_RxQ] = new_RxHxQxD.transpose(1, 2)
        return held[self.window, :, : self.visible]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot to another."""
        for held in self.held.values():
            held[target, :, :length] = held[source, :, :length]

    def beginning(self, length: int) -> "Beginning":
        """The first `length` columns of the first slot: keys and values, HxLxD each, by layer."""
        layers = {layer for layer, _ in self.held}
        return {at: (self.held[at, "keys"][0, :, :length], self.held[at, "values"][0, :, :length]) for at in layers}

    def move(self, rows: int, larger: "Slots") -> "Slots":
        """Move the first `rows` slots to `larger`, which may have more rows and fewer columns, and return it."""
        columns = min(self.columns, larger.columns)
        for name in list(self.held):
            held = self.held.pop(name)
            _, heads, _, size = held.shape
            grown = larger.held[name] = held.new_zeros(larger.rows, heads, larger.columns, size)
            grown[:rows, :, :columns] = held[:rows, :, :columns]
        return larger


class _Scheduler:
    def __init__(
        self,
        model: Any,
        config: Any,
        families: Sequence[Family],
        rows: int,
        tokens: int,
        drawing: params.Sampling | None,
    ) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config, self.rows, self.tokens = config, rows, tokens
        self.stop = set(config.eos_token_id)
        self.processors = _processors(config)
        self.drawing, self.draws = drawing, dict[str, Iterator[float]]()
        self.warpers = None if drawing is None else sampling.warpers(drawing)
        # The longest first: that needs little padding, and memory runs out at once or never.
        self.queue = deque(sorted(families, key=lambda family: -max(len(request.prompt) for request in family)))
        self.active: list[Request] = []  # the request in slot 0, 1, ...
        self.slots = Slots(0, 0)
        self.common = _common(families)
        self.beginning: Beginning | None = None

    def run(self) -> Iterator[Request]:
        with torch.inference_mode():
            self._begin()
        while self.queue or self.active:
            # Not around the whole loop: inference mode must not cover the caller's code between two requests.
            with torch.inference_mode():
                if self.queue:
                    self._make_room()
                    if not self.active or self.slots.rows - len(self.active) >= self.slots.rows / REFILL:
                        self._admit()
                finished = self._step()
            yield from finished

    def _begin(self) -> None:
        """Compute what all prompts begin with."""
        if self.common:
            self.slots = Slots(1, _whole(self.common + 1))
            self._fill(0, [self.queue[0][0].prompt[: self.common]], [0])
            self.beginning = self.slots.beginning(self.common)
            self.slots = Slots(0, 0)

    def _make_room(self) -> None:
        """When only shorter sequences remain, make more slots out of the same memory."""
        longest = max(len(request.prompt) for request in [*self.active, *self.queue[0]])
        # Padding writes to one column more than any sequence needs.
        columns = _whole(longest - self.common + self.config.max_new_tokens + 1)
        rows = max(1, min(self.rows, self.tokens // columns))
        if 4 * rows >= 5 * self.slots.rows or (rows > self.slots.rows and not self.active):
            self.slots = self.slots.move(len(self.active), Slots(rows, columns))

    def _admit(self) -> None:
        """Move families from the queue into free slots, and compute their prompts except for the last tokens."""
        # 1. Choose families. One that is larger than all slots is split.
        families: list[Family] = []
        free = self.slots.rows - len(self.active)
        while self.queue and free:
            family = self.queue.popleft()
            if len(family) > free:
                if families or self.active:
                    self.queue.appendleft(family)
                    break
                self.queue.appendleft(family[free:])
                family = family[:free]
            families.append(family)
            free -= len(family)
        # 2. Compute their shared prefixes: that of the n-th family in slot first + n.
        first = len(self.active)
        shared = [_shared(family) for family in families]
        prefixes = [family[0].prompt[self.common : length] for family, length in zip(families, shared, strict=True)]
        self._fill(first, prefixes, [self.common] * len(families))
        # 3. Copy each prefix to its family's slots, in reverse order, so that none is overwritten before it is copied.
        end = first + sum(map(len, families))
        for number in reversed(range(len(families))):
            for slot in reversed(range(end - len(families[number]), end)):
                if slot != first + number:
                    self.slots.copy(first + number, slot, shared[number] - self.common)
            end -= len(families[number])
        # 4. Compute the rest of each prompt.
        rests: list[list[int]] = []
        starts: list[int] = []
        for family, length in zip(families, shared, strict=True):
            rests += [request.prompt[length:-1] for request in family]
            starts += [length] * len(family)
            self.active += family
        self._fill(first, rests, starts)

    def _fill(self, first: int, rows: list[list[int]], starts: list[int]) -> None:
        """Extend the sequences in the slots from `first` on by `rows`, each after `starts` tokens, in parts."""
        begin = 0
        while begin < len(rows):
            end = begin + 1
            width = len(rows[begin])
            while end < len(rows) and max(width, len(rows[end])) * (end + 1 - begin) <= PREFILL_TOKENS:
                width = max(width, len(rows[end]))
                end += 1
            if width:
                self._forward(self.model.get_decoder(), first + begin, rows[begin:end], starts[begin:end])
            begin = end

    def _step(self) -> list[Request]:
        """Write one token after every active sequence, and return the requests that are finished."""
        last = [(request.new or request.prompt)[-1] for request in self.active]
        starts = [len(request.prompt) + len(request.new) - 1 for request in self.active]
        output = self._forward(self.model, 0, [[token] for token in last], starts)
        scores_RxV = output.logits[:, -1]
        if self.processors:
            scores_RxV = torch.cat(
                [
                    self.processors(
                        torch.tensor([request.prompt + request.new], device=scores_RxV.device), scores_RxV[row, None]
                    )
                    for row, request in enumerate(self.active)
                ]
            )
        for request, token in zip(self.active, self._chosen(scores_RxV), strict=True):
            request.new.append(token)
        finished = []
        for slot in reversed(range(len(self.active))):
            request = self.active[slot]
            if request.new[-1] in self.stop or len(request.new) == self.config.max_new_tokens:
                mover = self.active.pop()
                if mover is not request:
                    self.slots.copy(len(self.active), slot, len(mover.prompt) + len(mover.new) - 1 - self.common)
                    self.active[slot] = mover
                self.draws.pop(request.name, None)
                finished.append(request)
        return finished

    def _chosen(self, scores_RxV: torch.Tensor) -> list[int]:
        """The next token of each active sequence."""
        if self.drawing is None or self.warpers is None:
            tokens: list[int] = scores_RxV.argmax(-1).tolist()
            return tokens
        names = [request.name for request in self.active]
        for name in names:
            self.draws.setdefault(name, sampling.draws(name, self.drawing.seed))
        numbers = [next(self.draws[name]) for name in names]
        return sampling.drawn(self.warpers(None, scores_RxV.float()), numbers)

    def _forward(self, module: Any, first: int, rows: list[list[int]], starts: list[int]) -> Any:
        """Extend the sequences in the slots from `first` on by `rows`, each after `starts` tokens, with one pass."""
        width = max(map(len, rows))
        before = 0 if self.beginning is None else self.common
        device, spare = self.model.device, self.slots.columns - 1
        ids_RxQ = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows], device=device)
        columns = [
            [*range(start - before, start - before + len(ids)), *[spare] * (width - len(ids))]
            for ids, start in zip(rows, starts, strict=True)
        ]
        column_RxQ = torch.tensor(columns, device=device)
        visible = _whole(max(start - before + len(ids) for ids, start in zip(rows, starts, strict=True)))
        self.slots.write_at(first, column_RxQ, visible)
        hidden_RxQxC = torch.arange(visible, device=device) > column_RxQ[..., None]
        mask_Rx1xQxC = torch.zeros(hidden_RxQxC.shape, dtype=self.model.dtype, device=device)
        mask_Rx1xQxC = mask_Rx1xQxC.masked_fill_(hidden_RxQxC, float("-inf"))[:, None]
        return module(
            input_ids=ids_RxQ,
            # Some rotary embeddings depend on the largest position, so padding must not have a large one.
            position_ids=(column_RxQ + before).where(column_RxQ < spare, 0),
            attention_mask=mask_Rx1xQxC,
            past_key_values=self.slots,
            use_cache=True,
            **({} if self.beginning is None else {"beginning": self.beginning}),
        )


def _shared(family: Family) -> int:
    """The length of the prompts' longest common beginning, without the last token of any prompt."""
    length = min(len(request.prompt) for request in family) - 1
    first = family[0].prompt
    return next(
        (at for at in range(length) if any(request.prompt[at] != first[at] for request in family)),
        length,
    )


def _common(families: Sequence[Family]) -> int:
    """The length of the longest beginning that the prompts of all families share; 0 if it is shorter than `COMMON`."""
    everything = [request for family in families for request in family]
    length = _shared(everything) if len(families) > 1 else 0
    return length if length >= COMMON else 0


def _processors(config: Any) -> Any:
    """The processors that `transformers.generate` applies to the scores before a token is chosen."""
    processors = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return processors


def _whole(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS
