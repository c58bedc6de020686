"""Inference: what base and tuned write for the test split, under one explicit decoding configuration.

Greedy decoding goes through the scheduler of `pipeline.decode`, beam search through `transformers.generate`. Which
examples are computed together follows from the prompts alone: they are taken in rounds, and a killed run goes on behind
its last whole round, so that it writes what an uninterrupted one would have written.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from pipeline import checkpoint, memory, params, paths, records
from pipeline import device as devices
from pipeline import model as models
from pipeline.progress import bar, say
from pipeline.prompt import Encoder
from pipeline.records import Decoding, Example, Prediction

ROUND = 4
"""Examples of a round, in multiples of `generation.batch_size`: few, and little is lost to a kill; many, and the batch
is seldom thinned out by the end of a round."""


class Adapter(Protocol):
    """What `pipeline.adapter.Saved` offers. A protocol, so that inference of the base depends on nothing of LoRA."""

    @property
    def sha256(self) -> str: ...

    @property
    def parameters(self) -> int: ...

    def load(self, model: Any, model_sha256: str) -> Any: ...


def infer(
    variant: str,
    prompt: params.Prompt,
    generation: params.Generation,
    runtime: params.Runtime,
    adapter: Adapter | None = None,
) -> None:
    """Write what the base, or the base with `adapter`, answers to every test prompt, and under which conditions.

    UserError for prompts that do not fit, and for an adapter that is of another base or does not act.
    """
    facts = records.read_json(paths.QUANTIZED_FACTS)
    tokenizer = models.tokenizer()
    encoder = Encoder(tokenizer, prompt, facts["context"])
    examples = records.read_rows(paths.split("test"), Example)
    prompts = {example.id: encoder.prompt(example) for example in examples}
    encoder.require_fit(prompts, "test", generation.max_new_tokens)

    device = devices.choose(runtime)
    devices.require(device, facts["dtype"])
    base = memory.base(paths.QUANTIZED, facts, keep_dequantized=runtime.keep_dequantized)
    longest, added = max(map(len, prompts.values())), 0 if adapter is None else adapter.parameters
    memory.require_inference(device, base, generation, longest, added)
    config = configuration(generation, sorted({encoder.end, *facts["stop_ids"]}), tokenizer)
    decoding = Decoding(
        variant=variant,
        prompts_sha256=records.sha256_ids(token for ids in prompts.values() for token in [*ids, -1]),
        model_sha256=facts["sha256"],
        adapter_sha256=None if adapter is None else adapter.sha256,
        generation={
            **config.to_dict(),
            "batch_size": generation.batch_size,
            "batch_tokens": generation.batch_tokens,
        },
        device=device.type,
        threads=devices.threads(device),
        dtype=facts["dtype"],
        recheck={},
    )
    identity = [asdict(decoding), runtime.model_dump(mode="json")]
    with checkpoint.folder(f"infer-{variant}", identity) as scratch:
        written = Written(scratch / "predictions.jsonl")
        model = models.load(device, runtime.keep_dequantized)
        if adapter is not None:
            model = adapter.load(model, facts["sha256"])
        with bar(f"infer {variant}", len(prompts), "examples") as advance:
            for families in rounds(examples, prompts, generation.batch_size):
                names = [name for family in families for name in family]
                if all(name in written.rows for name in names):
                    advance(len(names))
                    continue
                for name, ids in complete(model, config, [[(n, prompts[n]) for n in f] for f in families], generation):
                    written.add(
                        Prediction(
                            id=name,
                            prompt_sha256=records.sha256_ids(prompts[name]),
                            prompt_tokens=len(prompts[name]),
                            text=text(tokenizer, ids),
                            tokens=len(ids),
                            finish="stop" if ids[-1] in config.eos_token_id else "length",
                        )
                    )
                    advance(1)
        again = recheck(model, config, prompts, generation)
        same = sum(written.rows[name].text == text(tokenizer, ids) for name, ids in again.items())
        decoding = replace(decoding, recheck={"examples": len(again), "identical": same})
        records.write_rows(paths.predictions(variant), [written.rows[example.id] for example in examples])
        records.write_json(paths.decoding(variant), asdict(decoding))


def configuration(generation: params.Generation, stop_ids: list[int], tokenizer: Any) -> Any:
    """The whole GenerationConfig, so that a model's own defaults cannot fill what is left open."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        min_new_tokens=0,
        do_sample=False,
        num_beams=generation.num_beams,
        early_stopping=False,
        length_penalty=generation.length_penalty,
        repetition_penalty=generation.repetition_penalty,
        no_repeat_ngram_size=generation.no_repeat_ngram_size,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0] if pad is None else pad,
        bos_token_id=tokenizer.bos_token_id,
    )


def rounds(examples: Sequence[Example], prompts: Mapping[str, Sequence[int]], rows: int) -> list[list[list[str]]]:
    """Families of ids (the examples of one group) in rounds of at least `ROUND * rows` examples, longest first."""
    families = [[example.id for example in group] for _, group in groupby(examples, key=lambda example: example.group)]
    families.sort(key=lambda names: (-max(len(prompts[name]) for name in names), names))
    filled: list[list[list[str]]] = [[]]
    for family in families:
        if sum(map(len, filled[-1])) >= ROUND * rows:
            filled.append([])
        filled[-1].append(family)
    return filled


def complete(
    model: Any, config: Any, families: Sequence[Sequence[tuple[str, list[int]]]], generation: params.Generation
) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and the new token ids, the stop token included, of each (name, prompt), as they are finished."""
    if config.num_beams == 1:
        from pipeline import decode

        requests = [[decode.Request(name, prompt) for name, prompt in family] for family in families]
        for request in decode.greedy(model, config, requests, generation.batch_size, generation.batch_tokens):
            yield request.name, request.new
    else:
        named = [item for family in families for item in family]
        for batch in beam_batches(named, config, generation):
            outputs = beam_search(model, config, [prompt for _, prompt in batch])
            yield from zip((name for name, _ in batch), outputs, strict=True)


def beam_batches(
    named: Sequence[tuple[str, list[int]]], config: Any, generation: params.Generation
) -> list[list[tuple[str, list[int]]]]:
    """Batches of similar length, each within the limits on examples and on tokens, which every beam has of its own."""
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
    """New token ids for a batch of prompts by `transformers.generate`, the stop token included, nothing behind it."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # transformers fills what a configuration leaves open from the model's own: leave it nothing to fill from.
    base.generation_config = config
    width = max(map(len, prompts))
    padding = [width - len(ids) for ids in prompts]
    ids_BxL = torch.tensor([[config.pad_token_id] * n + list(ids) for n, ids in zip(padding, prompts, strict=True)])
    mask_BxL = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    with torch.inference_mode():
        output_BxT = base.generate(
            input_ids=ids_BxL.to(base.device), attention_mask=mask_BxL.to(base.device), generation_config=config
        )
    return [_until_stop(row, config.eos_token_id) for row in output_BxT[:, width:].tolist()]


def recheck(
    model: Any, config: Any, prompts: Mapping[str, list[int]], generation: params.Generation
) -> dict[str, list[int]]:
    """New token ids of `generation.recheck` prompts, evenly spread, each decoded alone."""
    count = generation.recheck
    names = list(prompts)[:: max(1, len(prompts) // count)][:count] if count else []
    alone = ([[(name, prompts[name])]] for name in names)
    return dict(answer for families in alone for answer in complete(model, config, families, generation))


def text(tokenizer: Any, ids: list[int]) -> str:
    """What new token ids say, without special tokens and surrounding white space."""
    decoded: str = tokenizer.decode(ids, skip_special_tokens=True)
    return decoded.strip()


def _until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    for at, token in enumerate(ids):
        if token in stop_ids:
            return ids[: at + 1]
    return ids


class Written:
    """Predictions on disk, one whole line each; a line cut off by a kill is dropped and computed again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, Prediction] = {}
        if file.is_file():
            *whole, _cut_off = file.read_bytes().split(b"\n")
            kept = [Prediction(**json.loads(line)) for line in whole]
            self.rows = {row.id: row for row in kept}
            records.write_rows(file, kept)
            say(f"infer: going on behind {len(kept)} examples")

    def add(self, row: Prediction) -> None:
        self.rows[row.id] = row
        with self.file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(records.json_line(row))
