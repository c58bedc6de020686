"""Inference: the answers of base and tuned to the split that is scored, under one explicit decoding configuration; and
what the base answers without quantization, or with demonstrations in its prompt.

One of the backends computes them (`pipeline.infer.backend`), in rounds. The prompts alone decide which examples share a
round. A killed run continues after its last whole round, so it writes the same as an uninterrupted one. Several
processes (`pipeline.model.processes`) share whole rounds, so their number changes no prediction.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.core import baseline, contracts, params, paths, records
from pipeline.core.contracts import BaseFacts, Loadable, QuantizedFacts, Skipped
from pipeline.core.progress import bar, say
from pipeline.core.records import Decoding, Demonstrations, Encoded, Example, Prediction
from pipeline.core.text import holds_thought
from pipeline.infer import choice, sampling
from pipeline.infer.backend import Adapter, Backend, Setup
from pipeline.model import checkpoint, demonstrations, processes, resume
from pipeline.model.prompt import Encoder, notices

ROUND = 4
"""Examples of a round, in multiples of `generation.batch_size`. In a small round a kill loses little; in a large one
the batch is full most of the time."""


@dataclass(frozen=True)
class Task:
    """What a variant decodes: prompts by the ids of their examples, with the checkpoint in `folder`.

    `rows` and `demonstrations` are as in `Decoding`.
    """

    variant: str
    split: params.Split
    folder: Path
    facts: Loadable
    encoder: Encoder
    examples: list[Example]
    prompts: dict[str, list[int]]
    encoded: Encoded
    rows: list[int] | None = None
    demonstrations: Demonstrations | None = None
    share: int = 1
    """One row in so many is answered, and of `generation.recheck` one in so many decoded again."""


def decode(
    variant: str,
    prompt: params.Prompt,
    generation: params.Generation,
    runtime: params.Runtime,
    adapter: Adapter | None = None,
    split: params.Split = "test",
) -> None:
    """Write the answers of the base, or of the base with `adapter`, to every prompt of `split`, and how they were made.

    UserError if prompts do not fit, if the backend cannot honour a setting, or if the adapter belongs to another base
    or does not act.
    """
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    examples = records.read_rows(paths.split(split), Example)
    task = _plain(variant, split, paths.QUANTIZED, facts, examples, prompt, generation)
    _decode(task, prompt, generation, runtime, adapter)


def decode_unquantized(
    off: str | None,
    most: int | None,
    prompt: params.Prompt,
    generation: params.Generation,
    runtime: params.Runtime,
    split: params.Split = "test",
) -> None:
    """Write what the base without quantization answers to the rows of `split` that `baseline.rows` (`most`) leaves.

    With `off`, which says why there is no such variant, that is written instead. UserError as of `decode`.
    """
    if off is not None:
        return _skip(paths.UNQUANTIZED, off)
    facts = contracts.read(paths.BASE_FACTS, BaseFacts)
    everything = records.read_rows(paths.split(split), Example)
    rows = baseline.rows(everything, most)
    task = _plain(paths.UNQUANTIZED, split, paths.BASE, facts, [everything[row] for row in rows], prompt, generation)
    return _decode(replace(task, rows=rows, share=len(everything) // len(rows)), prompt, generation, runtime)


def decode_shots(
    asked: params.Baseline,
    prompt: params.Prompt,
    generation: params.Generation,
    runtime: params.Runtime,
    split: params.Split = "test",
) -> None:
    """Write what the base answers to the same rows with demonstrations in its prompts.

    With `baseline.shots` 0 that is written instead. UserError as of `decode`, and if no demonstrations fit.
    """
    if (off := baseline.shots_off(asked.shots)) is not None:
        return _skip(paths.SHOTS, off)
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    everything = records.read_rows(paths.split(split), Example)
    rows = baseline.rows(everything, asked.rows)
    examples = [everything[row] for row in rows]
    task = _plain(paths.SHOTS, split, paths.QUANTIZED, facts, examples, prompt, generation)
    pool = demonstrations.Pool(records.read_rows(paths.split("train"), Example), everything)
    made = [task.encoder.made(example) for example in examples]
    prompts, shown = demonstrations.prompts(task.encoder, examples, made, pool, asked, generation.max_new_tokens)
    task = replace(task, prompts=prompts, rows=rows, demonstrations=shown, share=len(everything) // len(rows))
    if processes.rank() == 0:
        say(
            f"infer {task.variant}: {shown.most} demonstrations, which add up to {max(shown.tokens):,} tokens to a "
            "prompt"
        )
    return _decode(task, prompt, generation, runtime)


def _skip(variant: str, off: str) -> None:
    """Write that a variant is not computed."""
    if processes.rank() == 0:
        say(f"infer {variant}: left out, {off}")
        records.write_rows(paths.predictions(variant), [])
        contracts.write(paths.decoding(variant), Skipped(variant, off))


def _plain(
    variant: str,
    split: params.Split,
    folder: Path,
    facts: Loadable,
    examples: list[Example],
    prompt: params.Prompt,
    generation: params.Generation,
) -> Task:
    """The task of answering `examples` without demonstrations. UserError if a prompt does not fit."""
    encoder = Encoder(checkpoint.tokenizer(folder), prompt, facts.context)
    prompts, encoded = encoder.prompts(examples)
    encoder.require_fit(prompts, split, generation.max_new_tokens)
    if processes.rank() == 0:
        for notice in notices(split, encoded):
            say(f"infer {variant}: {notice}")
    return Task(variant, split, folder, facts, encoder, examples, prompts, encoded)


def _decode(
    task: Task,
    prompt: params.Prompt,
    generation: params.Generation,
    runtime: params.Runtime,
    adapter: Adapter | None = None,
) -> None:
    """Decode a task, and write its predictions and how they were made. UserError as of `decode`."""
    # 1. Load the model.
    variant, facts, prompts, tokenizer = task.variant, task.facts, task.prompts, task.encoder.tokenizer
    config = configuration(generation, sorted({task.encoder.end, *facts.stop_ids}), tokenizer)
    tokens = max(map(len, prompts.values())) + generation.max_new_tokens
    backend = choice.chosen(generation.backend)
    engine = backend.load(Setup(facts, config, generation, runtime, adapter, tokens, task.folder))
    loaded = Loaded(backend, engine, tokenizer, frozenset(config.eos_token_id), prompts, generation.sampling)

    # 2. Plan the rounds of this process.
    decoding = Decoding(
        variant=variant,
        prompts_sha256=records.sha256_ids(token for ids in prompts.values() for token in [*ids, -1]),
        model_sha256=facts.sha256,
        adapter_sha256=None if adapter is None else adapter.sha256,
        generation={
            **config.to_dict(),
            "batch_size": generation.batch_size,
            "batch_tokens": generation.batch_tokens,
            "backend": generation.backend,
            **({} if generation.sampling is None else {"sampling": generation.sampling.model_dump()}),
            **engine.conditions,
        },
        device=engine.device,
        threads=engine.threads,
        dtype=facts.dtype,
        recheck={},
        thinking=prompt.thinking,
        encoded=task.encoded,
        rows=task.rows,
        demonstrations=task.demonstrations,
        split=task.split,
    )
    identity = [asdict(decoding), runtime.model_dump(mode="json")]
    processes.require_same(resume.key("infer", identity), "experiment")
    own = _own_rounds(f"infer {variant}", rounds(task.examples, prompts, generation.batch_size), prompts)

    with resume.folder(f"infer-{variant}", identity) as scratch:
        # 3. Decode them, and some examples again alone.
        written = Written(scratch / f"predictions-{processes.rank()}.jsonl")
        _decode_rounds(f"infer {variant}", own, loaded, written)
        again = _recheck(loaded, generation.recheck // task.share)
        # 4. Gather what all processes have, and write it.
        held: dict[str, Any] = {"rows": [asdict(row) for row in written.rows.values()], "again": again}
        everything = processes.gather(held)[: processes.shares()]
        if processes.rank() > 0:
            return
        predicted = {row["id"]: Prediction(**row) for one in everything for row in one["rows"]}
        same = [predicted[name].text == said for one in everything for name, said in one["again"].items()]
        decoding = replace(decoding, recheck={"examples": len(same), "identical": sum(same)})
        records.write_rows(paths.predictions(variant), [predicted[example.id] for example in task.examples])
        contracts.write(paths.decoding(variant), decoding)


@dataclass(frozen=True)
class Loaded:
    """A loaded backend, the prompts by the ids of their examples, and what turns token ids into predictions."""

    backend: Backend
    engine: Any
    tokenizer: Any
    stops: frozenset[int]
    prompts: Mapping[str, list[int]]
    drawing: params.Sampling | None = None

    def predictions(self, families: Sequence[Sequence[str]]) -> Iterator[Prediction]:
        """Decode families of examples, given by their ids. Yields each prediction when all its answers are finished."""
        wanted = [
            [(label, self.prompts[name]) for name in family for label in sampling.labels(name, self.drawing)]
            for family in families
        ]
        answers: dict[str, dict[int, dict[str, Any]]] = {}
        for label, ids in self.backend.complete(self.engine, wanted):
            name, number = sampling.example(label, self.drawing)
            finish = "stop" if ids[-1] in self.stops else "length"
            own = answers.setdefault(name, {})
            own[number] = {"text": text(self.tokenizer, ids), "tokens": len(ids), "finish": finish}
            if len(own) == len(sampling.labels(name, self.drawing)):
                first, *more = (one for _, one in sorted(answers.pop(name).items()))
                prompt = self.prompts[name]
                yield Prediction(name, records.sha256_ids(prompt), len(prompt), **first, more=more or None)


def _own_rounds(
    label: str, planned: list[list[list[str]]], prompts: Mapping[str, Sequence[int]]
) -> list[list[list[str]]]:
    """This process's share of the rounds."""
    if len(planned) < processes.shares():
        say(
            f"{label}: {len(planned)} rounds for {processes.shares()} processes, some of which have nothing to do; "
            "a smaller generation.batch_size gives more rounds"
        )
    return processes.share(planned, lambda families: sum(len(prompts[name]) for names in families for name in names))


def _decode_rounds(label: str, own: list[list[list[str]]], loaded: Loaded, written: "Written") -> None:
    """Decode the rounds that `written` does not hold yet."""
    done = processes.done_by_all(set(written.rows))
    progress = bar(label, sum(len(names) for families in own for names in families), "examples")
    with loaded.engine.together(), progress as advance:
        for families in own:
            names = [name for family in families for name in family]
            if done.issuperset(names):
                advance(len(names))
                continue
            for prediction in loaded.predictions(families):
                written.add(prediction)
                advance(1)


def _recheck(loaded: Loaded, count: int) -> dict[str, str]:
    """The texts of `count` examples, evenly spread, each decoded alone; of these, this process's share."""
    names = list(loaded.prompts)
    chosen = names[:: max(1, len(names) // count)][:count] if count else []
    own = processes.share(chosen, lambda name: len(loaded.prompts[name]))
    with loaded.engine.together():
        return {prediction.id: prediction.text for name in own for prediction in loaded.predictions([[name]])}


def configuration(generation: params.Generation, stop_ids: list[int], tokenizer: Any) -> Any:
    """A complete GenerationConfig, so that no default of the model applies."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        min_new_tokens=0,
        **_drawing(generation.sampling),
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


def _drawing(drawing: params.Sampling | None) -> dict[str, Any]:
    """The part of a GenerationConfig that says how a token is chosen."""
    if drawing is None:
        return {"do_sample": False}
    return {"do_sample": True, **drawing.model_dump(exclude={"samples", "seed"})}


def rounds(examples: Sequence[Example], prompts: Mapping[str, Sequence[int]], rows: int) -> list[list[list[str]]]:
    """Rounds of at least `ROUND * rows` examples, longest first: each a list of families, the ids of one group."""
    families = [[example.id for example in group] for _, group in groupby(examples, key=lambda example: example.group)]
    families.sort(key=lambda names: (-max(len(prompts[name]) for name in names), names))
    filled: list[list[list[str]]] = [[]]
    for family in families:
        if sum(map(len, filled[-1])) >= ROUND * rows:
            filled.append([])
        filled[-1].append(family)
    return filled


def text(tokenizer: Any, ids: list[int]) -> str:
    """The text of new token ids, without special tokens and surrounding white space.

    Special tokens that mark thoughts stay, as those stay that are not special: reports count outputs with thoughts.
    """
    kept = ids if (marks := _marks(tokenizer)).isdisjoint(ids) else _without_specials(tokenizer, ids, marks)
    decoded: str = tokenizer.decode(kept, skip_special_tokens=kept is ids)
    return decoded.strip()


@lru_cache(maxsize=1)
def _marks(tokenizer: Any) -> frozenset[int]:
    """The special tokens that begin or end a thought; a channel's name comes behind its mark."""
    added = tokenizer.added_tokens_decoder
    return frozenset(at for at, one in added.items() if one.special and holds_thought(f"{one.content}analysis"))


def _without_specials(tokenizer: Any, ids: Sequence[int], kept: frozenset[int]) -> list[int]:
    special = {at for at, one in tokenizer.added_tokens_decoder.items() if one.special}
    return [one for one in ids if one in kept or one not in special]


class Written:
    """Predictions in a file, one line each. A line that a kill cut off is dropped and computed again."""

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
