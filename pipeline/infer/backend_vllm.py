"""The backend `vllm`, on CUDA: in a process of its own, since vLLM wants another torch than the pinned one.

It is given the base with its 4-bit weights unpacked to the values that they stand for, and applies the adapter at run
time. The prompts are token ids, and what it says it has read must be the same ones. Its sums depend on what it computes
together, which depends on timing: it does not promise the same bytes twice. Written after vLLM's documentation and
tested with vLLM faked; it was never run.
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
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.infer import vllm_worker
from pipeline.infer.backend import Families, Setup
from pipeline.model import checkpoint

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of adapters."""

PROBE = range(3, 19)
"""Token ids behind which an adapter must change the next token's probabilities."""


@dataclass(frozen=True)
class Engine:
    """A running worker, which ends when this process or its standard input does."""

    worker: "subprocess.Popen[str]"
    stops: frozenset[int]
    device: str
    threads: int
    conditions: dict[str, Any]

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def load(setup: Setup) -> Engine:
    """Start the worker; UserError for another device than CUDA, a rank that is too large, and whatever it reports."""
    if setup.runtime.device not in ("auto", "cuda"):
        raise UserError(f"generation.backend = 'vllm' computes on CUDA, but runtime.device = {setup.runtime.device!r}")
    python = os.environ.get(params.VLLM_PYTHON)
    if not python:
        raise UserError(
            f"generation.backend = 'vllm' needs {params.VLLM_PYTHON}, the Python of an environment with vLLM, in the "
            "environment"
        )
    rank, adapter = 0, None
    if setup.adapter is not None:
        setup.adapter.require_of(setup.facts.sha256)
        adapter = str(setup.adapter.folder.resolve())
        own = records.read_json(setup.adapter.folder / "adapter_config.json")["r"]
        rank = next((one for one in RANKS if one >= own), 0)
        if not rank:
            raise UserError(f"lora.r = {own}, and vLLM takes adapters of rank {RANKS[-1]} at most")
    checkpoint.require_intact(paths.QUANTIZED, setup.facts.sha256)
    wanted = {
        "model": str(_plain(setup.facts).resolve()),
        "dtype": setup.facts.dtype,
        "adapter": adapter,
        "rank": rank,
        "tokens": setup.tokens,
        "rows": max(1, min(setup.generation.batch_size, setup.generation.batch_tokens // setup.tokens)),
        "new_tokens": setup.generation.max_new_tokens,
        "stops": sorted(setup.config.eos_token_id),
        "probe": [one % records.read_json(paths.QUANTIZED / "config.json")["vocab_size"] for one in PROBE],
    }
    worker = subprocess.Popen([python, vllm_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    conditions: dict[str, Any] = {}
    engine = Engine(worker, frozenset(setup.config.eos_token_id), "cuda", 0, conditions)
    weakref.finalize(engine, _end, worker)
    told = _exchange(worker, wanted)
    if "error" in told:
        raise UserError(f"generation.backend = 'vllm': {told['error']}")
    conditions["vllm"] = told["version"]
    return engine


def complete(engine: Engine, families: Families) -> Iterator[tuple[str, list[int]]]:
    """As of `pipeline.infer.backend.Backend`: all at once, since vLLM finds prefixes and fills batches by itself."""
    named = [item for family in families for item in family]
    answers = _exchange(engine.worker, [prompt for _, prompt in named])
    for (name, prompt), answer in zip(named, answers, strict=True):
        if answer["prompt"] != prompt:
            raise UserError(
                f"vLLM read other tokens than were sent for {name}: {answer['prompt'][:8]}, not {prompt[:8]}"
            )
        stop = next((at for at, token in enumerate(answer["new"]) if token in engine.stops), len(answer["new"]))
        yield name, answer["new"][: stop + 1]


def _exchange(worker: "subprocess.Popen[str]", content: Any) -> Any:
    """Send a line and wait for the answer; UserError when the worker has ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        print(json.dumps(content), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise UserError(f"vLLM has ended with exit code {worker.wait()}: it says above why")
    return json.loads(line)


def _end(worker: "subprocess.Popen[str]") -> None:
    """It ends with its standard input."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with worker.stdout, contextlib.suppress(BrokenPipeError):
        worker.stdin.close()
    worker.wait()


def _plain(facts: QuantizedFacts) -> Path:
    """The folder of the base, its 4-bit weights unpacked in the model's dtype: `.scratch/` forgets it in time."""
    if facts.method == "none":
        return paths.QUANTIZED
    folder = paths.SCRATCH / f"vllm-{facts.sha256[:32]}"
    if not (folder / "config.json").is_file():
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in gguf.weights(paths.QUANTIZED).items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = records.read_json(paths.QUANTIZED / "config.json")
        del config["quantization_config"]
        records.write_json(folder / "config.json", config)  # the last: it says that the others are there
    return folder
