"""Backends: who computes what a model writes. One interface of two functions, `load` and `complete`.

| backend | where it computes | what it honours |
|---|---|---|
| `transformers` | `pipeline.infer.backend_transformers`, in this process | everything in `generation` |
| `llama.cpp` | `pipeline.infer.backend_llamacpp`, in this process, base and adapter as GGUF | greedy decoding |
| `vllm` | `pipeline.infer.backend_vllm`, in a process with another torch, on CUDA | greedy decoding |

All are given the same token ids and stop at the same tokens; none tokenizes. What a backend cannot do is refused by
`pipeline.core.params`, or by its `load`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.core import params
from pipeline.core.contracts import QuantizedFacts

Families = Sequence[Sequence[tuple[str, list[int]]]]
"""Names with prompts; those of a family may begin alike."""


class Adapter(Protocol):
    """A saved adapter (`pipeline.lora.adapter.Saved`), as a protocol: the base's inference needs nothing of LoRA."""

    @property
    def folder(self) -> Path: ...

    @property
    def sha256(self) -> str: ...

    @property
    def parameters(self) -> int: ...

    def require_of(self, model_sha256: str) -> None: ...

    def load(self, model: Any, model_sha256: str) -> Any: ...


@dataclass(frozen=True)
class Setup:
    """The input of a backend: the quantized base of `facts`, and `adapter` on it.

    `config` is transformers' whole GenerationConfig; `tokens` the length of the longest prompt with its answer.
    """

    facts: QuantizedFacts
    config: Any
    generation: params.Generation
    runtime: params.Runtime
    adapter: Adapter | None
    tokens: int


class Engine(Protocol):
    """A loaded model. `threads` is 0 where the CPU does not compute; `conditions` are the backend's own settings that a
    result depends on."""

    @property
    def device(self) -> str: ...

    @property
    def threads(self) -> int: ...

    @property
    def conditions(self) -> dict[str, Any]: ...

    def together(self) -> AbstractContextManager[None]:
        """The frame in which several processes complete, each its share."""


class Backend(Protocol):
    """The two functions of each module above."""

    def load(self, setup: Setup) -> Any:
        """An `Engine`; UserError for what cannot be honoured, and for an adapter of another base or without effect."""

    def complete(self, engine: Any, families: Families) -> Iterator[tuple[str, list[int]]]:
        """Yield the name and the new token ids, the stop token included, of each prompt, as they are finished."""
