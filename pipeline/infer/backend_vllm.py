"""The backend `vllm`, on CUDA. It runs in its own process, since vLLM needs another torch than the pinned one.

It gets the base with its 4-bit weights unpacked to their values, and applies the adapter at run time. Prompts are token
ids, and vLLM must report the same ids as read. Its sums depend on its batches, which depend on timing, so two runs may
differ. It follows vLLM's documentation and is tested with a fake vLLM; it was never run with a real one.
"""

import contextlib
import json
import os
import subprocess
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import gguf
from pipeline.core import params, paths, records
from pipeline.core.contracts import Loadable
from pipeline.core.errors import UserError
from pipeline.infer import vllm_worker
from pipeline.infer.backend import PROBE, Families, Setup, until_stop
from pipeline.model import checkpoint

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's setting for the largest rank of adapters."""


@dataclass(frozen=True)
class Engine:
    """A running worker. It ends with its standard input, so at the latest with this process."""

    worker: "subprocess.Popen[str]"
    stops: frozenset[int]
    device: str
    threads: int
    conditions: dict[str, Any]

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def load(setup: Setup) -> Engine:
    """Start the worker. UserError without CUDA, for a rank that is too large, or if the worker reports an error."""
    if setup.runtime.device not in ("auto", "cuda"):
        raise UserError(f"generation.backend = 'vllm' computes on CUDA, but runtime.device = {setup.runtime.device!r}")
    python = os.environ.get(params.VLLM_PYTHON)
    if not python:
        raise UserError(
            f"generation.backend = 'vllm' needs {params.VLLM_PYTHON}, the Python of an environment with vLLM, in the "
            "environment"
        )
    if setup.adapter is not None:
        setup.adapter.require_of(setup.facts.sha256)
    rank = 0 if setup.adapter is None else _rank(setup.adapter.folder)
    checkpoint.require_intact(setup.folder, setup.facts.sha256)
    wanted = {
        "model": str(_plain(setup.folder, setup.facts).resolve()),
        "dtype": setup.facts.dtype,
        "adapter": None if setup.adapter is None else str(setup.adapter.folder.resolve()),
        "rank": rank,
        "tokens": setup.tokens,
        "rows": setup.slots,
        "new_tokens": setup.generation.max_new_tokens,
        "stops": sorted(setup.config.eos_token_id),
        "probe": [one % records.read_json(setup.folder / "config.json")["vocab_size"] for one in PROBE],
    }
    worker = subprocess.Popen(
        [python, vllm_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        answer = _exchange(worker, wanted)
        if "error" in answer:
            raise UserError(f"generation.backend = 'vllm': {answer['error']}")
    except BaseException:
        _end(worker)
        raise
    engine = Engine(worker, frozenset(setup.config.eos_token_id), "cuda", 0, {"vllm": answer["version"]})
    weakref.finalize(engine, _end, worker)
    return engine


def _rank(adapter: Path) -> int:
    """The smallest of `RANKS` that holds the adapter."""
    own = records.read_json(adapter / "adapter_config.json")["r"]
    if own > RANKS[-1]:
        raise UserError(f"lora.r = {own}, and vLLM takes adapters of rank {RANKS[-1]} at most")
    return next(rank for rank in RANKS if rank >= own)


def complete(engine: Engine, families: Families) -> Iterator[tuple[str, list[int]]]:
    """As `pipeline.infer.backend.Backend`. vLLM gets all prompts at once: it finds prefixes and fills batches
    itself."""
    named = [item for family in families for item in family]
    answers = _exchange(engine.worker, [prompt for _, prompt in named])
    for (name, prompt), answer in zip(named, answers, strict=True):
        if answer["prompt"] != prompt:
            raise UserError(
                f"vLLM read other tokens than were sent for {name}: {answer['prompt'][:8]}, not {prompt[:8]}"
            )
        yield name, until_stop(answer["new"], engine.stops)


def _exchange(worker: "subprocess.Popen[str]", content: Any) -> Any:
    """Send a line and wait for the answer. UserError if the worker has ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        print(json.dumps(content), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise UserError(f"vLLM has ended with exit code {worker.wait()}: its output above says why")
    return json.loads(line)


def _end(worker: "subprocess.Popen[str]") -> None:
    """End the worker by closing its standard input."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with worker.stdout, contextlib.suppress(BrokenPipeError):
        worker.stdin.close()
    worker.wait()


def _plain(base: Path, facts: Loadable) -> Path:
    """A folder with the model in `base`, its 4-bit weights unpacked to the model's dtype. It stays in `.scratch/` for
    later runs."""
    if facts.method == "none":
        return base
    folder = paths.SCRATCH / f"vllm-{facts.sha256[:32]}"
    if not (folder / "config.json").is_file():
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in gguf.weights(base).items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = records.read_json(base / "config.json")
        del config["quantization_config"]
        records.write_json(folder / "config.json", config)  # last, as a sign that the folder is complete
    return folder
