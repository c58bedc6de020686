"""The backend `transformers`: greedy decoding and sampling by `pipeline.infer.scheduler`, beam search by `generate`."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pipeline.core import params
from pipeline.infer.backend import Families, Setup, until_stop
from pipeline.model import devices, memory, processes, shard
from pipeline.model.load import base as load_base


@dataclass(frozen=True)
class Engine:
    """A loaded model, with or without an adapter.

    `conditions` holds the number of processes that share its heads, which changes rounding. The GenerationConfig holds
    the versions.
    """

    model: Any
    config: Any
    generation: params.Generation
    device: str
    threads: int
    conditions: dict[str, Any]

    def together(self) -> AbstractContextManager[None]:
        return shard.together(self.model)


def load(setup: Setup) -> Engine:
    """Load the base, and the adapter with the proof that it acts; as `pipeline.infer.backend.Backend`."""
    device = devices.choose(setup.runtime)
    devices.require(device, setup.facts.dtype)
    base = memory.held(memory.Base.stored(setup.folder, setup.facts), setup.runtime, device)
    added = 0 if setup.adapter is None else setup.adapter.parameters
    memory.require_inference(device, base, setup.generation, setup.tokens - setup.generation.max_new_tokens, added)
    processes.gather(None)  # wait until all processes have measured the free memory
    model = load_base(setup.folder, setup.facts, device, setup.runtime.keep_dequantized, setup.runtime.sharding)
    if setup.adapter is not None:
        model = setup.adapter.load(model, setup.facts.sha256)
    rounding = {"tensor_parallel": processes.count()} if setup.runtime.sharding == "tensor" else {}
    return Engine(model, setup.config, setup.generation, device.type, devices.threads(device), rounding)


def complete(engine: Engine, families: Families) -> Iterator[tuple[str, list[int]]]:
    """As `pipeline.infer.backend.Backend`."""
    config, generation = engine.config, engine.generation
    if config.num_beams == 1:
        from pipeline.infer import scheduler

        requests = [[scheduler.Request(name, prompt) for name, prompt in family] for family in families]
        for request in scheduler.decode(
            engine.model, config, requests, generation.batch_size, generation.batch_tokens, generation.sampling
        ):
            yield request.name, request.new
    else:
        named = [item for family in families for item in family]
        for batch in beam_batches(named, config, generation):
            outputs = beam_search(engine.model, config, [prompt for _, prompt in batch])
            yield from zip((name for name, _ in batch), outputs, strict=True)


def beam_batches(
    named: Sequence[tuple[str, list[int]]], config: Any, generation: params.Generation
) -> list[list[tuple[str, list[int]]]]:
    """Batches of prompts of similar length, within the limits on examples and tokens. Each beam has its own tokens."""
    batches: list[list[tuple[str, list[int]]]] = []
    rows = 0
    for name, prompt in sorted(named, key=lambda item: (-len(item[1]), item[0])):
        if not batches or len(batches[-1]) == rows:
            beam_tokens = config.num_beams * (len(prompt) + config.max_new_tokens)
            rows = max(1, min(generation.batch_size, generation.batch_tokens // beam_tokens))
            batches.append([])
        batches[-1].append((name, prompt))
    return batches


def beam_search(model: Any, config: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """New token ids for each prompt by `transformers.generate`, up to the stop token, which is kept."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # transformers fills gaps in `config` from the model's own configuration, so that is replaced.
    base.generation_config = config
    width = max(map(len, prompts))
    padding = [width - len(ids) for ids in prompts]
    ids_BxL = torch.tensor([[config.pad_token_id] * n + list(ids) for n, ids in zip(padding, prompts, strict=True)])
    mask_BxL = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    with torch.inference_mode():
        output_BxT = base.generate(
            input_ids=ids_BxL.to(base.device), attention_mask=mask_BxL.to(base.device), generation_config=config
        )
    return [until_stop(row, config.eos_token_id) for row in output_BxT[:, width:].tolist()]
