"""Inference: what base and tuned write for the test split, under one explicit decoding configuration.

One of the backends computes (`pipeline.infer.backend`). Which examples are computed together follows from the prompts
alone: they are taken in rounds. A killed run goes on after its last whole round, so it writes what an uninterrupted one
would have written. Several processes (`pipeline.model.processes`) take whole rounds each, so their number changes no
prediction.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.progress import bar, say
from pipeline.core.records import Decoding, Example, Prediction
from pipeline.infer import choice
from pipeline.infer.backend import Adapter, Backend, Setup
from pipeline.model import checkpoint, processes, resume
from pipeline.model.prompt import Encoder

ROUND = 4
"""Examples of a round, in multiples of `generation.batch_size`. With fewer, a kill loses less; with more, the end of a
round thins out the batch less often."""


def decode(
    variant: str,
    prompt: params.Prompt,
    generation: params.Generation,
    runtime: params.Runtime,
    adapter: Adapter | None = None,
) -> None:
    """Write what the base, or the base with `adapter`, answers to every test prompt, and the conditions (`Decoding`).

    UserError for prompts that do not fit, and for an adapter that is of another base or does not act.
    """
    # 1. The prompts, and whether they fit.
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    tokenizer = checkpoint.tokenizer()
    encoder = Encoder(tokenizer, prompt, facts.context)
    examples = records.read_rows(paths.split("test"), Example)
    prompts = {example.id: encoder.prompt(example) for example in examples}
    encoder.require_fit(prompts, "test", generation.max_new_tokens)
    # 2. The model, and the conditions under which it decodes.
    config = configuration(generation, sorted({encoder.end, *facts.stop_ids}), tokenizer)
    tokens = max(map(len, prompts.values())) + generation.max_new_tokens
    backend = choice.chosen(generation.backend)
    engine = backend.load(Setup(facts, config, generation, runtime, adapter, tokens))
    conditions = _conditions(variant, prompts, facts, adapter, generation, config, engine)
    identity = [asdict(conditions), runtime.model_dump(mode="json")]
    processes.require_same(resume.key("infer", identity), "experiment")
    # 3. This process's share of the rounds, each written as it is finished.
    planned = rounds(examples, prompts, generation.batch_size)
    if len(planned) < processes.shares():
        say(
            f"infer {variant}: {len(planned)} rounds for {processes.shares()} processes, so some of them have nothing "
            "to do; a smaller generation.batch_size gives more rounds"
        )
    own = processes.share(planned, lambda families: sum(len(prompts[name]) for names in families for name in names))
    with resume.folder(f"infer-{variant}", identity) as scratch:
        written = Written(scratch / f"predictions-{processes.rank()}.jsonl")
        done = processes.done_by_all(set(written.rows))
        progress = bar(f"infer {variant}", sum(len(names) for families in own for names in families), "examples")
        with engine.together(), progress as advance:
            for families in own:
                names = [name for family in families for name in family]
                if done.issuperset(names):
                    advance(len(names))
                    continue
                for name, ids in backend.complete(engine, [[(n, prompts[n]) for n in f] for f in families]):
                    written.add(_prediction(name, prompts[name], ids, tokenizer, config))
                    advance(1)
        # 4. Some examples again, each alone; then what all processes wrote, in the order of the test split.
        alone = recheck(backend, engine, prompts, generation.recheck)
        again = {name: text(tokenizer, ids) for name, ids in alone.items()}
        held: dict[str, Any] = {"rows": [asdict(row) for row in written.rows.values()], "again": again}
        everything = processes.gather(held)[: processes.shares()]
        if processes.rank() > 0:
            return
        predicted = {row["id"]: Prediction(**row) for one in everything for row in one["rows"]}
        same = [predicted[name].text == said for one in everything for name, said in one["again"].items()]
        conditions = replace(conditions, recheck={"examples": len(same), "identical": sum(same)})
        records.write_rows(paths.predictions(variant), [predicted[example.id] for example in examples])
        contracts.write(paths.decoding(variant), conditions)


def _conditions(
    variant: str,
    prompts: Mapping[str, Sequence[int]],
    facts: QuantizedFacts,
    adapter: Adapter | None,
    generation: params.Generation,
    config: Any,
    engine: Any,
) -> Decoding:
    """The conditions of a variant's predictions, before any was checked again."""
    return Decoding(
        variant=variant,
        prompts_sha256=records.sha256_ids(token for ids in prompts.values() for token in [*ids, -1]),
        model_sha256=facts.sha256,
        adapter_sha256=None if adapter is None else adapter.sha256,
        generation={
            **config.to_dict(),
            "batch_size": generation.batch_size,
            "batch_tokens": generation.batch_tokens,
            "backend": generation.backend,
            **engine.conditions,
        },
        device=engine.device,
        threads=engine.threads,
        dtype=facts.dtype,
        recheck={},
    )


def _prediction(name: str, prompt: Sequence[int], new: list[int], tokenizer: Any, config: Any) -> Prediction:
    return Prediction(
        id=name,
        prompt_sha256=records.sha256_ids(prompt),
        prompt_tokens=len(prompt),
        text=text(tokenizer, new),
        tokens=len(new),
        finish="stop" if new[-1] in config.eos_token_id else "length",
    )


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


def recheck(backend: Backend, engine: Any, prompts: Mapping[str, list[int]], count: int) -> dict[str, list[int]]:
    """New token ids of `count` prompts, evenly spread, each decoded alone; of those, this process's."""
    names = list(prompts)[:: max(1, len(prompts) // count)][:count] if count else []
    own = processes.share(names, lambda name: len(prompts[name]))
    alone = ([[(name, prompts[name])]] for name in own)
    with engine.together():
        return dict(answer for families in alone for answer in backend.complete(engine, families))


def text(tokenizer: Any, ids: list[int]) -> str:
    """The text of new token ids, without special tokens and surrounding white space."""
    decoded: str = tokenizer.decode(ids, skip_special_tokens=True)
    return decoded.strip()


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
