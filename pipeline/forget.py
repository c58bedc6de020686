"""Forgetting: what the adapter does to text that has nothing to do with the task.

Base and tuned read the same text of each probe (`pipeline.probes`). The loss on the text shows how much worse the tuned
model predicts it. The cross-entropy against the base's distribution shows how far tuned has moved from the base in any
direction, as in arXiv 2401.05605. It is at least the base's entropy; the difference is the KL divergence from base to
tuned.

In style plain the text is read without a chat template, also if prompts have one, so it is unusual for a chat model:
for base and tuned alike. Its windows begin as the model's texts begin (`pipeline.model.windows`). In style chat a
conversation goes through the model's own chat template, and the tokens of its last answer count, with the EOS that
closes it. Base and tuned share one loaded model, with the adapter off and on. Losses are in nats per token.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import probes
from pipeline.core import contracts, params, paths
from pipeline.core.contracts import Forgetting, Probed, QuantizedFacts, Window
from pipeline.core.errors import UserError
from pipeline.core.progress import bar, say
from pipeline.core.text import opens_thought
from pipeline.lora import adapter
from pipeline.model import checkpoint, devices, load, loss, memory, pack, processes, prompt, shard, windows
from pipeline.model.prompt import Encoder, Row
from pipeline.sources.account import Account, listed

if TYPE_CHECKING:
    import torch

TOGETHER = 512
"""Tokens computed at once. The logits of all of them are held twice, in the model's dtype."""
POSITIONS = memory.PLACES
"""Places whose distributions are held in float32 at once."""
FEWEST = 2
"""Windows that resampling needs at least."""


def measure_seed(seed: int, forget: params.Forget, runtime: params.Runtime) -> None:
    """Write `out/forgetting/<seed>.json`: for each probe the sums of every window, and the means over all tokens.

    UserError for a source that cannot be read or has too little text, and for losses that are not finite.
    """
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    saved = adapter.Saved(paths.adapter(seed))
    found = Forgetting(seed, facts.sha256, saved.sha256, [])
    if forget.probes:
        found = replace(found, probes=_measured(found, facts, saved, forget, runtime))
    if processes.rank() > 0:
        return
    contracts.write(paths.forgetting(seed), found)
    if not found.probes:
        say("forget: not measured, forget.probes is empty")
    for one in found.probes:
        say(
            f"forget {seed}, {one.name}: loss on {one.tokens:,} tokens {one.base_loss:.3f} -> {one.tuned_loss:.3f}, "
            f"{one.kl:.3f} nats a token from the base's distribution; read {one.read}"
        )
        if one.left_out:
            say(f"forget {seed}, {one.name}: left out: {listed(one.left_out)}")


def _measured(
    found: Forgetting, facts: QuantizedFacts, saved: adapter.Saved, forget: params.Forget, runtime: params.Runtime
) -> list[Probed]:
    # 1. What is read, and whether it can be.
    tokenizer = checkpoint.tokenizer()
    forget.require_model(facts.context, bool(tokenizer.chat_template))
    accounts = [Account() for _ in forget.probes]
    chosen = [rows(tokenizer, facts.context, *pair) for pair in zip(forget.probes, accounts, strict=True)]
    device = devices.choose(runtime)
    devices.require(device, facts.dtype)
    base = memory.held(memory.Base.quantized(facts), runtime, device)
    longest = max(probe.window for probe in forget.probes)
    memory.require_reading(device, base, max(TOGETHER, longest), saved.parameters)
    conditions = [contracts.content(found), forget.model_dump(mode="json"), devices.threads(device)]
    processes.require_same(conditions, "experiment")
    # 2. The sums of every window, and what they come to.
    model = saved.load(load.quantized(device, runtime.keep_dequantized, runtime.sharding), facts.sha256)
    made = []
    for probe, some, account in zip(forget.probes, chosen, accounts, strict=True):
        sums = measure(model, some, f"forget {found.seed}, {probe.name}")
        bos = some[0].prompt[0] == tokenizer.bos_token_id
        made.append(_means(probe, sums, bos, device, account))
    return made


def _means(probe: params.Probe, sums: Sequence[Window], bos: bool, device: "torch.device", account: Account) -> Probed:
    """What the sums of a probe's windows come to, a token. UserError for losses that are not finite."""
    tokens = sum(one.tokens for one in sums)

    def mean(name: str) -> float:
        return float(sum(getattr(one, name) for one in sums) / tokens)

    base_loss, tuned_loss, cross_entropy, entropy = map(mean, ("base", "tuned", "cross_entropy", "entropy"))
    if not all(map(math.isfinite, (base_loss, tuned_loss, cross_entropy, entropy))):
        raise UserError(
            f"the losses on the probe {probe.name} are not finite (base {base_loss}, tuned {tuned_loss}, cross-entropy "
            f"{cross_entropy}, entropy {entropy}): lower train.learning_rate"
        )
    return Probed(
        name=probe.name,
        style=probe.style,
        source=probe.source,
        device=device.type,
        threads=devices.threads(device),
        tokens=tokens,
        window=probe.window,
        bos=bos,
        texts=len({one.place for one in sums}),
        base_loss=base_loss,
        tuned_loss=tuned_loss,
        base_perplexity=math.exp(base_loss),
        tuned_perplexity=math.exp(tuned_loss),
        cross_entropy=cross_entropy,
        base_entropy=entropy,
        kl=cross_entropy - entropy,
        windows=list(sums),
        left_out={why: count for why, count in account.left_out.items() if count} or None,
    )


def rows(tokenizer: Any, context: int, probe: params.Probe, account: Account) -> list[Row]:
    """What of a probe is read, as rows whose completions are predicted; the group of a row is its text's place.

    `context` is the model's, in tokens. `account` counts what of the source is not read because it is no text, repeats
    another, or is longer than the window. UserError for too little text.
    """
    if probe.style == "chat":
        encoder = Encoder(tokenizer, _through_the_template(tokenizer, context), context)
        chosen = _conversations(encoder, probe, account)
    else:
        chosen = [one.row() for one in windows.cut(tokenizer, probes.texts(probe, account), probe.tokens, probe.window)]
    if len(chosen) < FEWEST:
        raise UserError(
            f"{probe.at}.source = {probe.source!r} gives {len(chosen)} windows of text, too few for an interval: "
            "name more text, or change the probe's window"
        )
    return chosen


def _conversations(encoder: Encoder, probe: params.Probe, account: Account) -> list[Row]:
    """Whole conversations, until their answers have the probe's tokens."""
    chosen: list[Row] = []
    left = probe.tokens
    for example in probes.conversations(probe, account):
        if left <= 0:
            break
        row = encoder.row(example)
        if len(row.prompt) + len(row.completion) > probe.window:
            account.left_out["conversations longer than the window"] += 1
            continue
        chosen.append(replace(row, group=row.id))
        left -= len(row.completion)
    return chosen


def _through_the_template(tokenizer: Any, context: int) -> params.Prompt:
    """The settings of a prompt that is the conversation itself, whole; without a thought, if the template has that."""
    ask = [{"role": "user", "content": "a"}]
    thinking = False
    with contextlib.suppress(prompt.TemplateError):  # the encoder says what is wrong with the template
        thinking = opens_thought(prompt.rendered(tokenizer, ask, add_generation_prompt=True, enable_thinking=False))
    return params.Prompt(
        style="chat", template="{source}", instructions={}, thinking=thinking, max_tokens=context, truncate_source=False
    )


def measure(model: Any, chosen: Sequence[Row], label: str) -> list[Window]:
    """The sums over the completion of every row, in their order; `model` is the base with the adapter on it.

    Several processes divide the micro-batches of one process among them.
    """
    import torch

    trees = [pack.tree([row]) for row in chosen]
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
    return [Window(row.group, len(row.completion), *nats[number]) for number, row in enumerate(chosen)]


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
