"""The interface of the backends, which compute a model's answers: two functions, `load` and `complete`.

| backend | where it computes | what it supports |
|---|---|---|
| `transformers` | `pipeline.infer.backend_transformers`, in this process | everything in `generation` |
| `llama.cpp` | `pipeline.infer.backend_llamacpp`, in this process, base and adapter as GGUF | greedy decoding |
| `vllm` | `pipeline.infer.backend_vllm`, in a process with another torch, on CUDA | greedy decoding |

All receive the same token ids and stop at the same tokens; none tokenizes. `pipeline.core.params` or `load` refuses
settings that a backend does not support.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.core import params, paths
from pipeline.core.contracts import Loadable

Families = Sequence[Sequence[tuple[str, list[int]]]]
"""Names with prompts (token ids). The prompts of a family may begin alike."""

PROBE = range(3, 19)
"""Token ids of a fixed prompt: an adapter must change the probabilities of the token after it."""


class Adapter(Protocol):
    """The interface of `pipeline.lora.adapter.Saved`. As a protocol, it keeps inference of the base apart from LoRA."""

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
    """What a backend loads: the base in `folder`, with its `facts`, and `adapter` if there is one.

    `config` is transformers' whole GenerationConfig. `tokens` is the longest prompt's length with its answer. The base
    is the quantized one unless `folder` says otherwise.
    """

    facts: Loadable
    config: Any
    generation: params.Generation
    runtime: params.Runtime
    adapter: Adapter | None
    tokens: int
    folder: Path = paths.QUANTIZED

    @property
    def slots(self) -> int:
        """How many sequences may be computed at once."""
        return max(1, min(self.generation.batch_size, self.generation.batch_tokens // self.tokens))


class Engine(Protocol):
    """A loaded model. `threads` is 0 if the CPU does not compute. `conditions` holds other causes of the result."""

    @property
    def device(self) -> str: ...

    @property
    def threads(self) -> int: ...

    @property
    def conditions(self) -> dict[str, Any]: ...

    def together(self) -> AbstractContextManager[None]:
        """A context for everything that this process completes while others complete their shares."""


class Backend(Protocol):
    """The interface of the modules above."""

    def load(self, setup: Setup) -> Any:
        """An `Engine`. UserError for unsupported settings, or an adapter of another base or without effect."""

    def complete(self, engine: Any, families: Families) -> Iterator[tuple[str, list[int]]]:
        """Yield each prompt's name and new token ids, with the stop token, when they are finished."""


def until_stop(ids: list[int], stops: Container[int]) -> list[int]:
    """`ids` up to the first stop token, which is kept; all of them if there is none."""
    for at, token in enumerate(ids):
        if token in stops:
            return ids[: at + 1]
    return ids
