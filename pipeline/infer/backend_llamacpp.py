"""The backend `llama.cpp`, through xllamacpp: base and adapter become GGUF files, the adapter is applied at run time.

Prompts are sent as token ids, many in one request, and what llama.cpp says it has read must be those tokens. The
members of a family follow one another in waves, so that each but the first finds the family's beginning in the prefix
cache. llama.cpp ends answers at tokens that it takes for ends by their names as well; where those are none of ours,
the answer goes on behind them, and where it knows one of ours for none, the answer is cut there.

A request's prompts are taken in order, each when a slot is free, so on one machine the same files give the same tokens.
Sums have another order than in transformers, and activations stay in float32 where transformers rounds them to the
model's type: the texts are not the same to the last token, and `pipeline.export.parity` says how far they are off.
"""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from pipeline import gguf
from pipeline.core import params, paths
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.infer.backend import Families, Setup
from pipeline.model import checkpoint, devices

WEEK = 7 * 24 * 3600
"""Seconds that a request may take: it is in this process, and a large one is no fault."""

CACHE_MB = 2048
"""Main memory for the prefixes of prompts whose slot was given to another, in MiB."""

PROBE = range(3, 19)
"""Token ids behind which an adapter must change the next token's probabilities."""

KEY = secrets.token_hex(16)
"""What the server wants to hear: it listens on this machine, where others may be at work."""

ACCELERATORS = {"cuda": ("CUDA",), "mps": ("Metal", "MTL")}
"""How llama.cpp's names of devices begin."""


@dataclass(frozen=True)
class Engine:
    """A running llama.cpp, and what its answers are read by."""

    server: Any
    stops: frozenset[int]
    new_tokens: int
    tokenizer: Any
    device: str
    threads: int
    conditions: dict[str, Any]

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


def load(setup: Setup, merged: bool = False) -> Engine:
    """Write base and adapter as GGUF, have llama.cpp read them, and prove that the adapter acts.

    With `merged` the adapter is part of the base's file, whose type then rounds both together.

    UserError as of `gguf.write_base` and `write_adapter`, for a device that this build of llama.cpp does not
    offer, for a base that is not what its stage wrote, and for an adapter of another base or without effect.
    """
    devices.quieten()
    gguf.refuse(paths.QUANTIZED)
    device = _device(setup.runtime)
    if setup.adapter is not None:
        setup.adapter.require_of(setup.facts.sha256)
    checkpoint.require_intact(paths.QUANTIZED, setup.facts.sha256)
    kind = setup.generation.gguf_type
    slots = max(1, min(setup.generation.batch_size, setup.generation.batch_tokens // setup.tokens))
    threads = setup.runtime.threads or os.cpu_count() or 1
    files: list[Path] = []
    try:
        # Read into memory, then removed: they follow from what DVC keeps. A killed run's are removed by the next stage.
        base, adapter = _scratch("base", files), None
        if setup.adapter is not None and merged:
            gguf.write_merged(paths.QUANTIZED, setup.adapter.folder, base, kind)
        else:
            gguf.write_base(paths.QUANTIZED, base, kind)
        if setup.adapter is not None and not merged:
            adapter = _scratch("adapter", files)
            gguf.write_adapter(setup.adapter.folder, paths.QUANTIZED, adapter, "F32")
        server = serve(base, adapter, kind, slots, setup.tokens, threads, device)
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    say(f"device: {device} of llama.cpp, {threads} threads, {slots} slots, {kind}")
    engine = Engine(
        server=server,
        stops=frozenset(setup.config.eos_token_id),
        new_tokens=setup.generation.max_new_tokens,
        tokenizer=checkpoint.tokenizer(),
        device=device,
        threads=threads if device == "cpu" else 0,
        conditions={"gguf_type": kind, "xllamacpp": version("xllamacpp")},
    )
    if adapter is not None and _probed(engine, 1.0) == _probed(engine, 0.0):
        assert setup.adapter is not None
        raise UserError(f"{setup.adapter.folder} does not change what llama.cpp computes: it is not applied")
    return engine


def serve(base: Path, adapter: Path | None, kind: str, slots: int, tokens: int, threads: int, device: str) -> Any:
    """A running `xllamacpp.Server` with room for `tokens` in each of `slots`; it ends when it is collected.

    Keys and values are kept in float32 where the weights are F32, else in float16, which is llama.cpp's own choice.

    UserError when llama.cpp cannot read the files.
    """
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(base)
    if adapter is not None:
        wanted.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    wanted.n_parallel = slots
    wanted.n_ctx = slots * (tokens + 1)
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
    wanted.n_gpu_layers = 0 if device == "cpu" else 999
    wanted.no_kv_offload = wanted.no_op_offload = device == "cpu"
    # It would lower the context, or move layers, by the memory that is free at this moment.
    wanted.fit_params = False
    if kind == "F32":
        wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    wanted.warmup = False
    wanted.cache_ram_mib = CACHE_MB
    wanted.timeout_read = wanted.timeout_write = WEEK
    wanted.api_keys = [KEY]
    wanted.verbosity = 0
    try:
        return xllamacpp.Server(wanted)
    except RuntimeError as error:
        raise UserError(
            f"llama.cpp cannot load {base} ({error}): it may lack memory for {slots} slots of {tokens} tokens; "
            "lower generation.batch_size or generation.batch_tokens"
        ) from None


def complete(engine: Engine, families: Families) -> Iterator[tuple[str, list[int]]]:
    """As of `pipeline.infer.backend.Backend`: a wave of every family's first prompt, one of every second, and so on."""
    for place in range(max(map(len, families))):
        wave = {family[place][0]: family[place][1] for family in families if len(family) > place}
        new: dict[str, list[int]] = {name: [] for name in wave}
        while wave:
            left = {name: engine.new_tokens - len(new[name]) for name in wave}
            answers = _ask(engine, [wave[name] + new[name] for name in wave], max(left.values()))
            going_on = {}
            for name, (written, ended) in zip(list(wave), answers, strict=True):
                kept = written[: left[name]]
                stop = next((at for at, token in enumerate(kept) if token in engine.stops), None)
                new[name] += kept if stop is None else kept[: stop + 1]
                if stop is None and ended and len(new[name]) < engine.new_tokens:
                    going_on[name] = wave[name]
                else:
                    yield name, new[name]
            wave = going_on


def losses(engine: Engine, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    """The negative log-likelihood of each token of `completion`.

    llama.cpp's server tells the probabilities of tokens that it writes, before any bias: so each is made to be written
    by a bias, and the next one is asked for behind it. Nearly all of its prompt is in the prefix cache.
    """
    found = []
    for at, token in enumerate(completion):
        behind = [*prompt, *completion[:at]]
        told = _forced(engine, behind, token, 1)
        if told is None:  # a token of half a character, of which it tells nothing: among all others, it does
            everything = _forced(engine, behind, min(engine.stops), len(engine.tokenizer)) or {"top_logprobs": []}
            told = next((one for one in everything["top_logprobs"] if one["id"] == token), None)
        if told is None or told["id"] != token:
            raise UserError(f"llama.cpp does not tell the probability of token {token} behind {len(behind)} others")
        found.append(-float(told["logprob"]))
    return found


def _forced(engine: Engine, prompt: list[int], token: int, count: int, **options: Any) -> dict[str, Any] | None:
    """What llama.cpp tells of `token`, made to be written behind `prompt`, and of the `count` likeliest ones."""
    body = _greedy(1) | {"prompt": prompt, "n_probs": count, "logit_bias": [[token, 1e6]]} | options
    told: list[dict[str, Any]] | None = post(engine.server, "completion", body).get("completion_probabilities")
    return told[0] if told else None


def _ask(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[tuple[list[int], bool]]:
    """For each prompt what was written, the token that ended it included, and whether llama.cpp ended it by itself."""
    answers = post(engine.server, "completion", _greedy(new_tokens) | {"prompt": prompts})
    answers = sorted([answers] if isinstance(answers, dict) else answers, key=lambda answer: answer["index"])
    for prompt, answer in zip(prompts, answers, strict=True):
        require_read(engine.tokenizer, prompt, answer)
        if not answer["tokens"]:
            raise UserError(f"llama.cpp wrote nothing behind {len(prompt)} tokens: {answer['stop_type']}")
    return [(answer["tokens"], answer["stop_type"] == "eos") for answer in answers]


def require_read(tokenizer: Any, prompt: Sequence[int], answer: dict[str, Any]) -> None:
    """UserError unless llama.cpp read what was sent: as many tokens, which by its own vocabulary are the same text."""
    sent = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # The halves of characters look different, and both take spaces away: llama.cpp those before punctuation.
    same = _bare(sent) == _bare(answer["prompt"])
    if answer["tokens_evaluated"] != len(prompt) or not same or answer["truncated"]:
        raise UserError(
            f"llama.cpp read {answer['tokens_evaluated']} tokens, {answer['prompt'][:80]!r}..., where {len(prompt)} "
            f"were sent, {sent[:80]!r}...: its vocabulary is another; set generation.backend to transformers"
        )


def _bare(text: str) -> str:
    return "".join(text.replace("\ufffd", "").split())


def _greedy(new_tokens: int) -> dict[str, Any]:
    """A request that writes the likeliest token each time."""
    return {
        "n_predict": new_tokens,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": True,
        "return_tokens": True,
    }


def post(server: Any, what: str, body: dict[str, Any]) -> Any:
    """What the server in this process answers, with tokens and prompts, which its Python method leaves out of many."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = Request(f"{server.listening_address}/{what}", json.dumps(body).encode(), headers)
    with build_opener(ProxyHandler({})).open(request, timeout=WEEK) as answer:
        return json.load(answer)


def _probed(engine: Engine, scale: float) -> Any:
    """What is likely behind a fixed sequence, with the adapter at this scale."""
    size = len(engine.tokenizer)
    options = {"cache_prompt": False, "lora": [{"id": 0, "scale": scale}]}
    return _forced(engine, [one % size for one in PROBE], min(engine.stops), 5, **options)


def _device(runtime: params.Runtime) -> str:
    """`runtime.device` in this build of llama.cpp; UserError for one that it does not offer."""
    import xllamacpp

    names = [str(one["name"]) for one in xllamacpp.get_device_info()]
    offered = [kind for kind, starts in ACCELERATORS.items() if any(name.startswith(starts) for name in names)]
    if runtime.device == "auto":
        return next(iter(offered), "cpu")
    if runtime.device != "cpu" and runtime.device not in offered:
        raise UserError(
            f"runtime.device = {runtime.device!r}, but this build of llama.cpp offers {', '.join(names)}: install "
            "xllamacpp's build for it (https://github.com/xorbitsai/xllamacpp#installation), or set runtime.device "
            "to auto"
        )
    return runtime.device


def _scratch(name: str, files: list[Path]) -> Path:
    """A path in `.scratch/` that `stage.remove_leftovers` knows for a leftover when this process is gone."""
    paths.SCRATCH.mkdir(exist_ok=True)
    files.append(paths.SCRATCH / f".{name}.gguf.{os.getpid()}.part")
    return files[-1]
