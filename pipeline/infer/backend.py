"""Backends: who computes what a model writes. One interface of two functions, `load` and `complete`.

| backend | where it computes | what it honours |
|---|---|---|
| `transformers` | `pipeline.infer.backend_transformers`, in this process | everything in `generation` |
| `llama.cpp` | `pipeline.infer.backend_llamacpp`, in this process, base and adapter as GGUF | greedy decoding |
| `vllm` | `pipeline.infer.backend_vllm`, in a process with another torch, on CUDA | greedy decoding |

All are given the same token ids and stop at the same tokens; none tokenizes. What one cannot do,
`pipeline.core.params` or
its `load` refuses.
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
    """What `pipeline.lora.adapter.Saved` offers. A protocol, so that inference of the base depends on nothing of
    LoRA."""

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
    """What a backend is loaded with: the quantized base of `facts`, and `adapter` on it.

    `config` is transformers' whole GenerationConfig; `tokens` the length of the longest prompt with its answer.
    """

    facts: QuantizedFacts
    config: Any
    generation: params.Generation
    runtime: params.Runtime
    adapter: Adapter | None
    tokens: int


class Engine(Protocol):
    """A loaded model. `threads` is 0 where the CPU does not compute; `conditions` is what else a result rests on."""

    @property
    def device(self) -> str: ...

    @property
    def threads(self) -> int: ...

    @property
    def conditions(self) -> dict[str, Any]: ...

    def together(self) -> AbstractContextManager[None]:
        """Around all that several processes complete, each its share of it."""


class Backend(Protocol):
    """What each of the modules above offers."""

    def load(self, setup: Setup) -> Any:
        """An `Engine`; UserError for what cannot be honoured, and for an adapter of another base or without effect."""

    def complete(self, engine: Any, families: Families) -> Iterator[tuple[str, list[int]]]:
        """Yield the name and the new token ids, the stop token included, of each prompt, as they are finished."""
