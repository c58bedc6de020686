"""The backend `llama.cpp`, through xllamacpp. Base and adapter become GGUF files; the adapter is applied at run time.

Prompts are sent as token ids, many in one request, and llama.cpp must report the same tokens as read. The members of a
family follow one another in waves, so all but the first find the family's beginning in the prefix cache. llama.cpp also
stops at tokens whose names look like end markers; if one is not ours, we resume after it. If llama.cpp does not stop at
one of ours, we cut the answer there.

llama.cpp takes a request's prompts in order, each when a slot is free, so on one machine the same files give the same
tokens. Its sums have another order than in transformers, and its activations stay in float32, where transformers rounds
them to the model's type. So the texts may differ from those of transformers; `pipeline.export.parity` measures by how
much.
"""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from pipeline import gguf
from pipeline.core import params, paths
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.infer.backend import PROBE, Adapter, Families, Setup, until_stop
from pipeline.model import checkpoint, devices

WEEK = 7 * 24 * 3600
"""Seconds that a request may take. The server is in this process, and a large request is not an error."""

CACHE_MB = 2048
"""Main memory in MiB for the prefixes of prompts that have lost their slot to another."""

KEY = secrets.token_hex(16)
"""The key that the server asks for: it listens on this machine, which other people may use."""

ACCELERATORS = {"cuda": ("CUDA",), "mps": ("Metal", "MTL")}
"""The beginnings of llama.cpp's names of devices."""


@dataclass(frozen=True)
class Engine:
    """A running llama.cpp. `stops` are our stop tokens, `new_tokens` the most tokens of an answer."""

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
    """Write base and adapter as GGUF, load them with llama.cpp, and prove that the adapter acts.

    With `merged` the adapter is merged into the base's file, whose type rounds both together, and is not proven to act.

    UserError if the files cannot be written as GGUF, if this build of llama.cpp does not offer the device, if the base
    is not as its stage wrote it, or if the adapter belongs to another base or has no effect.
    """
    devices.quieten()
    gguf.refuse(setup.folder)
    device = _device(setup.runtime)
    if setup.adapter is not None:
        setup.adapter.require_of(setup.facts.sha256)
    checkpoint.require_intact(setup.folder, setup.facts.sha256)
    kind = setup.generation.gguf_type
    threads = setup.runtime.threads or os.cpu_count() or 1
    with _files(setup.folder, setup.adapter, merged, kind) as (base, adapter):
        server = serve(base, adapter, kind, setup.slots, setup.tokens, threads, device)
    say(f"device: {device} of llama.cpp, {threads} threads, {setup.slots} slots, {kind}")
    engine = Engine(
        server=server,
        stops=frozenset(setup.config.eos_token_id),
        new_tokens=setup.generation.max_new_tokens,
        tokenizer=checkpoint.tokenizer(setup.folder),
        device=device,
        threads=threads if device == "cpu" else 0,
        conditions={"gguf_type": kind, "xllamacpp": version("xllamacpp")},
    )
    if setup.adapter is not None and not merged and _probed(engine, 1.0) == _probed(engine, 0.0):
        raise UserError(f"{setup.adapter.folder} does not change what llama.cpp computes: it is not applied")
    return engine


@contextmanager
def _files(folder: Path, adapter: Adapter | None, merged: bool, kind: str) -> Iterator[tuple[Path, Path | None]]:
    """Yield GGUF files of the base and of the adapter, unless that is merged. They are removed after the block.

    llama.cpp has read them into memory by then. The next stage removes those of a killed run
    (`stage.remove_leftovers`).
    """
    paths.SCRATCH.mkdir(exist_ok=True)
    base_file, adapter_file = (paths.SCRATCH / f".{name}.gguf.{os.getpid()}.part" for name in ("base", "adapter"))
    try:
        if adapter is None:
            gguf.write_base(folder, base_file, kind)
            yield base_file, None
        elif merged:
            gguf.write_merged(folder, adapter.folder, base_file, kind)
            yield base_file, None
        else:
            gguf.write_base(folder, base_file, kind)
            gguf.write_adapter(adapter.folder, folder, adapter_file, "F32")
            yield base_file, adapter_file
    finally:
        base_file.unlink(missing_ok=True)
        adapter_file.unlink(missing_ok=True)


def serve(base: Path, adapter: Path | None, kind: str, slots: int, tokens: int, threads: int, device: str) -> Any:
    """A running `xllamacpp.Server` with `slots` slots of `tokens` tokens. It ends when it is garbage-collected.

    Keys and values are float32 if the weights (`kind`) are F32; otherwise float16, which is llama.cpp's default.

    UserError if llama.cpp cannot load the files.
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
    # llama.cpp would lower the context, or move layers, depending on the free memory of the moment.
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
    """As `pipeline.infer.backend.Backend`, in waves: every family's first prompt, then every second, and so on."""
    for place in range(max(map(len, families))):
        wave = {family[place][0]: family[place][1] for family in families if len(family) > place}
        new: dict[str, list[int]] = {name: [] for name in wave}
        while wave:
            left = {name: engine.new_tokens - len(new[name]) for name in wave}
            answers = _ask(engine, [wave[name] + new[name] for name in wave], max(left.values()))
            going_on = {}
            for name, (written, ended) in zip(list(wave), answers, strict=True):
                new[name] += until_stop(written[: left[name]], engine.stops)
                if ended and new[name][-1] not in engine.stops and len(new[name]) < engine.new_tokens:
                    going_on[name] = wave[name]
                else:
                    yield name, new[name]
            wave = going_on


def losses(engine: Engine, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
    """The negative log-likelihood of each token of `completion` after `prompt`, in nats.

    llama.cpp's server reports the probabilities, before any bias, of the tokens that it writes. So a bias forces it to
    write each token in turn. The prefix cache holds nearly all of each request's prompt.

    UserError if llama.cpp does not report a probability.
    """
    found = []
    for at, token in enumerate(completion):
        behind = [*prompt, *completion[:at]]
        told = _forced(engine, behind, token, 1)
        if told is None:  # half of a character, which it reports only in a list of all tokens
            everything = _forced(engine, behind, min(engine.stops), len(engine.tokenizer)) or {"top_logprobs": []}
            told = next((one for one in everything["top_logprobs"] if one["id"] == token), None)
        if told is None or told["id"] != token:
            raise UserError(f"llama.cpp does not report the probability of token {token} after {len(behind)} others")
        found.append(-float(told["logprob"]))
    return found


def _forced(engine: Engine, prompt: list[int], token: int, count: int, **options: Any) -> dict[str, Any] | None:
    """llama.cpp's report on `token`, forced to follow `prompt`, and on the `count` likeliest tokens there."""
    body = _greedy(1) | {"prompt": prompt, "n_probs": count, "logit_bias": [[token, 1e6]]} | options
    told: list[dict[str, Any]] | None = post(engine.server, "completion", body).get("completion_probabilities")
    return told[0] if told else None


def _ask(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[tuple[list[int], bool]]:
    """Each prompt's new tokens, with the one that ended the answer, and whether llama.cpp took that for an end."""
    answers = post(engine.server, "completion", _greedy(new_tokens) | {"prompt": prompts})
    answers = sorted([answers] if isinstance(answers, dict) else answers, key=lambda answer: answer["index"])
    for prompt, answer in zip(prompts, answers, strict=True):
        require_read(engine.tokenizer, prompt, answer)
        if not answer["tokens"]:
            raise UserError(f"llama.cpp wrote nothing behind {len(prompt)} tokens: {answer['stop_type']}")
    return [(answer["tokens"], answer["stop_type"] == "eos") for answer in answers]


def require_read(tokenizer: Any, prompt: Sequence[int], answer: dict[str, Any]) -> None:
    """UserError unless llama.cpp read `prompt`: the same number of tokens, and the same text by its own vocabulary."""
    sent = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Halves of characters are shown differently, and both remove spaces; llama.cpp removes those before punctuation.
    same = _bare(sent) == _bare(answer["prompt"])
    if answer["tokens_evaluated"] != len(prompt) or not same or answer["truncated"]:
        raise UserError(
            f"llama.cpp read {answer['tokens_evaluated']} tokens, {answer['prompt'][:80]!r}..., where {len(prompt)} "
            f"were sent, {sent[:80]!r}...: its vocabulary is another one; set generation.backend to transformers"
        )


def _bare(text: str) -> str:
    return "".join(text.replace("\ufffd", "").split())


def _greedy(new_tokens: int) -> dict[str, Any]:
    """The settings of a request that always writes the likeliest token."""
    return {
        "n_predict": new_tokens,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": True,
        "return_tokens": True,
    }


def post(server: Any, what: str, body: dict[str, Any]) -> Any:
    """The answer of the server in this process to a request `body` at the path `what`.

    Unlike xllamacpp's Python method, it has the tokens and prompts also if there are several.
    """
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = Request(f"{server.listening_address}/{what}", json.dumps(body).encode(), headers)
    with build_opener(ProxyHandler({})).open(request, timeout=WEEK) as answer:
        return json.load(answer)


def _probed(engine: Engine, scale: float) -> Any:
    """The likeliest tokens after a fixed prompt, with the adapter at this scale."""
    size = len(engine.tokenizer)
    options = {"cache_prompt": False, "lora": [{"id": 0, "scale": scale}]}
    return _forced(engine, [one % size for one in PROBE], min(engine.stops), 5, **options)


def _device(runtime: params.Runtime) -> str:
    """`runtime.device`, for `auto` a device of this build of llama.cpp. UserError if it does not offer the device."""
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
