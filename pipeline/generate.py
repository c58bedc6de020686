"""Inference: what base and tuned write for the test split, under one explicit decoding configuration.

Batches are fixed by the prompts' lengths and `generation.batch_size`, and each is written to disk as soon as it is
done, so a killed run goes on behind the last whole batch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from pipeline import checkpoint, params, paths, records
from pipeline import device as devices
from pipeline import model as models
from pipeline.progress import bar, say
from pipeline.prompt import Encoder
from pipeline.records import Decoding, Example, Prediction


class Adapter(Protocol):
    """What `pipeline.adapter.Saved` offers. A protocol, so that inference of the base depends on nothing of LoRA."""

    @property
    def sha256(self) -> str: ...

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
    config = configuration(generation, sorted({encoder.end, *facts["stop_ids"]}), tokenizer)
    decoding = Decoding(
        variant=variant,
        prompts_sha256=records.sha256_ids(token for ids in prompts.values() for token in [*ids, -1]),
        model_sha256=facts["sha256"],
        adapter_sha256=None if adapter is None else adapter.sha256,
        generation={**config.to_dict(), "batch_size": generation.batch_size},
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
            for names in batches(prompts, generation.batch_size):
                if not all(name in written.rows for name in names):
                    outputs = complete(model, config, [prompts[name] for name in names])
                    written.add(
                        Prediction(
                            id=name,
                            prompt_sha256=records.sha256_ids(prompts[name]),
                            prompt_tokens=len(prompts[name]),
                            text=text(tokenizer, ids),
                            tokens=len(ids),
                            finish="stop" if ids[-1] in config.eos_token_id else "length",
                        )
                        for name, ids in zip(names, outputs, strict=True)
                    )
                advance(len(names))
        again = recheck(model, config, prompts, generation.recheck)
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


def batches(prompts: Mapping[str, Sequence[int]], size: int) -> list[list[str]]:
    """Ids of the prompts in batches of `size`, longest first: little padding, and memory runs out at once or never."""
    order = sorted(prompts, key=lambda name: (-len(prompts[name]), name))
    return [order[start : start + size] for start in range(0, len(order), size)]


def complete(model: Any, config: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """New token ids for a batch of prompts, the stop token included, nothing behind it."""
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


def recheck(model: Any, config: Any, prompts: Mapping[str, Sequence[int]], count: int) -> dict[str, list[int]]:
    """New token ids of `count` prompts, evenly spread, each decoded alone."""
    names = list(prompts)[:: max(1, len(prompts) // count)][:count] if count else []
    return {name: complete(model, config, [prompts[name]])[0] for name in names}


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

    def add(self, rows: Iterable[Prediction]) -> None:
        with self.file.open("a", encoding="utf-8", newline="\n") as file:
            for row in rows:
                self.rows[row.id] = row
                file.write(records.json_line(row))
