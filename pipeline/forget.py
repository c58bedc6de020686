"""Forgetting: what the adapter does to text that has nothing to do with the task.

Base and tuned read the same windows of general text. The loss on the text shows how much worse the tuned model predicts
it. The cross-entropy against the base's distribution shows how far tuned has moved from the base in any direction, as
in arXiv 2401.05605. It is at least the base's entropy; the difference is the KL divergence from base to tuned.

The text is read without a chat template, also if prompts have one, so it is unusual for a chat model: for base and
tuned alike. Its windows begin as the model's texts begin (`pipeline.model.windows`). Base and tuned share one loaded
model, with the adapter off and on. Losses are in nats per token.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import Forgetting, GeneralText, QuantizedFacts, Window
from pipeline.core.errors import UserError
from pipeline.core.progress import bar, say
from pipeline.lora import adapter
from pipeline.model import checkpoint, devices, load, loss, memory, pack, processes, prompt, shard, windows
from pipeline.model.prompt import Row
from pipeline.model.windows import Text, Tokens
from pipeline.sources import source, tables
from pipeline.sources.account import Account, listed

TOGETHER = 512
"""Tokens computed at once. The logits of all of them are held twice, in the model's dtype."""
POSITIONS = memory.PLACES
"""Places whose distributions are held in float32 at once."""
PLAIN = (".txt", ".md")
FEWEST = 2
"""Windows that resampling needs at least."""


def measure_seed(seed: int, forget: params.Forget, runtime: params.Runtime) -> None:
    """Write `out/forgetting/<seed>.json`: the sums of every window, and the means over all tokens.

    UserError for a source that cannot be read or has too little text, and for losses that are not finite.
    """
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    saved = adapter.Saved(paths.adapter(seed))
    found = Forgetting(seed, forget.source, facts.sha256, saved.sha256)
    if forget.source is not None:
        found = replace(found, measured=_measured(found, facts, saved, forget, runtime))
    if processes.rank() > 0:
        return
    contracts.write(paths.forgetting(seed), found)
    if (measured := found.measured) is None:
        say("forget: not measured, forget.source is null")
    else:
        say(
            f"forget {seed}: loss on {measured.tokens:,} tokens of general text {measured.base_loss:.3f} -> "
            f"{measured.tuned_loss:.3f}, {measured.kl:.3f} nats a token from the base's distribution; "
            f"{contracts.windows_read(measured.window, measured.bos)}"
        )
        if measured.left_out:
            say(f"forget {seed}: left out: {listed(measured.left_out)}")


def _measured(
    found: Forgetting, facts: QuantizedFacts, saved: adapter.Saved, forget: params.Forget, runtime: params.Runtime
) -> GeneralText:
    # 1. What is read, and whether it can be.
    tokenizer = checkpoint.tokenizer()
    account = Account()
    chosen = _chosen(tokenizer, facts, forget, account)
    device = devices.choose(runtime)
    devices.require(device, facts.dtype)
    base = memory.held(memory.Base.quantized(facts), runtime, device)
    memory.require_reading(device, base, max(TOGETHER, forget.window), saved.parameters)
    conditions = [contracts.content(found), forget.model_dump(mode="json"), devices.threads(device)]
    processes.require_same(conditions, "experiment")
    # 2. The sums of every window.
    model = saved.load(load.quantized(device, runtime.keep_dequantized, runtime.sharding), facts.sha256)
    sums = measure(model, chosen, f"forget {found.seed}")
    # 3. What they come to, a token.
    tokens = sum(one.tokens for one in sums)

    def mean(name: str) -> float:
        return float(sum(getattr(one, name) for one in sums) / tokens)

    base_loss, tuned_loss, cross_entropy, entropy = map(mean, ("base", "tuned", "cross_entropy", "entropy"))
    if not all(map(math.isfinite, (base_loss, tuned_loss, cross_entropy, entropy))):
        raise UserError(
            f"the losses on general text are not finite (base {base_loss}, tuned {tuned_loss}, cross-entropy "
            f"{cross_entropy}, entropy {entropy}): lower train.learning_rate"
        )
    return GeneralText(
        device=device.type,
        threads=devices.threads(device),
        tokens=tokens,
        window=forget.window,
        bos=prompt.starts_with_bos(tokenizer),
        texts=len({one.place for one in sums}),
        base_loss=base_loss,
        tuned_loss=tuned_loss,
        base_perplexity=math.exp(base_loss),
        tuned_perplexity=math.exp(tuned_loss),
        cross_entropy=cross_entropy,
        base_entropy=entropy,
        kl=cross_entropy - entropy,
        windows=sums,
        left_out={why: count for why, count in account.left_out.items() if count} or None,
    )


def _chosen(tokenizer: Any, facts: QuantizedFacts, forget: params.Forget, account: Account) -> list[Tokens]:
    """The windows that are read; UserError for a window that the model cannot read, and for too little text.

    `account` counts what holds no text of its own.
    """
    assert forget.source is not None
    forget.require_context(facts.context)
    found = texts(forget, forget.source, account)
    chosen = windows.cut(tokenizer, found, forget.tokens, forget.window)
    if len(chosen) < FEWEST:
        raise UserError(
            f"forget.source = {forget.source!r} gives {len(chosen)} windows of text, too few for an interval: "
            "name more text, or lower forget.window"
        )
    return chosen


def texts(forget: params.Forget, name: str, account: Account | None = None) -> list[Text]:
    """The documents of the source, each content once, ordered by digest: a text's place or file does not matter.

    A file of plain text is one document, and so is a record of a table. `account` counts records without a text, and
    texts that repeat another. UserError if `forget.column` does not fit.
    """
    counts = Account() if account is None else account
    found: list[Text] = []
    with source.mounted([(name, forget.sha256)], kind="dataset", key="forget") as places:
        for file in tables.select(tables.files(places, several=False), forget.files, "forget.files"):
            if file.path.suffix.lower() in PLAIN:
                if forget.column is not None:
                    raise UserError(f"forget.column = {forget.column!r}, but {file.name} is plain text: set it to null")
                found.append(Text(file.name, tables.plain(file, forget.encoding, "forget")))
            else:
                found += _column(file, forget, counts)
    if forget.html:
        found = [Text(text.place, without_tags(text.content)) for text in found]
    given = [text for text in found if text.content.strip()]
    by_digest = {records.sha256_text(text.content): text for text in given}
    counts.left_out["empty texts"] += len(found) - len(given)
    counts.left_out["repeated texts"] += len(given) - len(by_digest)
    return [by_digest[digest] for digest in sorted(by_digest)]


def _column(file: tables.File, forget: params.Forget, account: Account) -> list[Text]:
    """The texts in one column of a table; `account` counts the records without a text there."""
    if forget.column is None:
        raise UserError(f"forget.column is null, but {file.name} holds records: name the column of the text")
    located = list(tables.records(file, forget.encoding, "forget", account))
    values = [(where, tables.value(record, forget.column)) for where, record in located]
    if located and all(value is tables.ABSENT for _, value in values):
        there = [column for column in tables.columns(located) if column not in tables.BUILT_IN]
        shape = tables.shape(located)
        raise UserError(
            f"forget.column = {forget.column!r}: {file.name} has no such column; it has "
            f"{', '.join(there[: tables.SHOWN])}{', ...' if len(there) > tables.SHOWN else ''}"
            + (f"; {shape}" if shape else "")
        )
    for where, value in values:
        if value is not tables.ABSENT and not isinstance(value, str | None):
            raise UserError(f"forget.column = {forget.column!r}: at {where} it is {type(value).__name__}, not text")
    found = [Text(where, value) for where, value in values if isinstance(value, str)]
    account.left_out["records without a text"] += len(values) - len(found)
    return found


def without_tags(text: str) -> str:
    """HTML as plain text: line breaks for paragraphs and breaks, no other tags, and characters for entities."""
    text = _tags(r"(?i)<(?:br|/?p)\b[^>]*>", "\n", text)
    text = _tags(r"</?[A-Za-z][^>]*>", "", text)
    # `html.unescape` fails at thousands of digits. A number of more than eight is not a character.
    text = html.unescape(re.sub(r"&#0*([0-9]{8})[0-9]*", r"&#\1", text))
    text = re.sub(r"[ \t\xa0]+", " ", text)
    return re.sub(r"\s{2,}", lambda found: "\n" if "\n" in found[0] else found[0], text).strip()


def _tags(pattern: str, instead: str, text: str) -> str:
    """`text` with its tags replaced. What follows the last ">" holds no tag, and each "<" there would cost a search."""
    before, last, rest = text.rpartition(">")
    return re.sub(pattern, instead, before + last) + rest


def measure(model: Any, chosen: Sequence[Tokens], label: str) -> list[Window]:
    """The sums of every window of `chosen`, in their order; `model` is the base with the adapter on it.

    Several processes divide the micro-batches of one process among them.
    """
    import torch

    trees = [pack.tree([Row("", "", window.ids[:1], window.ids[1:])]) for window in chosen]
    number_of = {id(tree): number for number, tree in enumerate(trees)}
    parts = pack.micro_batches(trees, TOGETHER)
    own = processes.share(parts, lambda part: sum(tree.tokens for tree in part))
    progress = bar(label, sum(tree.supervised for part in own for tree in part), "tokens")
    measured: dict[str, list[float]] = {}  # by the window's number, as text for JSON
    with torch.no_grad(), shard.together(model), progress as advance:
        for part in own:
            packed = pack.pack(part, model.device)
            tuned_NxV = loss.logits(model, packed)[0]
            with adapter.off(model):
                base_NxV = loss.logits(model, packed)[0]
            nats_4xN = torch.cat(
                [_nats(base_NxV[at], tuned_NxV[at], packed.target_N[at]) for at in _chunks(len(base_NxV))], dim=1
            )
            start = 0
            for tree in part:
                end = start + tree.supervised
                measured[str(number_of[id(tree)])] = nats_4xN[:, start:end].sum(dim=1).tolist()
                start = end
                advance(tree.supervised)
    nats = {int(number): sums for one in processes.gather(measured) for number, sums in one.items()}
    return [Window(window.place, len(window.ids) - 1, *nats[number]) for number, window in enumerate(chosen)]


def _nats(base_NxV: Any, tuned_NxV: Any, target_N: Any) -> Any:
    """4xN, in float64: at each place the losses of base and tuned, the cross-entropy, and the base's entropy."""
    import torch

    base_NxV, tuned_NxV = (torch.log_softmax(logits.float(), dim=-1) for logits in (base_NxV, tuned_NxV))
    losses = [-log_NxV.gather(1, target_N[:, None])[:, 0] for log_NxV in (base_NxV, tuned_NxV)]
    weight_NxV = base_NxV.exp()
    entropies = [-(weight_NxV * log_NxV).sum(dim=-1) for log_NxV in (tuned_NxV, base_NxV)]
    return torch.stack([*losses, *entropies]).cpu().double()


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + POSITIONS) for start in range(0, count, POSITIONS)]
