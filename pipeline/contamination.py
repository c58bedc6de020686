"""Whether the base has seen the test references in pretraining, as far as their order can tell.

The method is that of Oren et al. 2023 (Proving test set contamination in black box language models, arXiv 2310.17623,
sections 3 and 4): if a model has not seen a data set, no order of its examples is more likely to it than another,
unless the files are sorted. A model that was trained on the files may find their own order more likely. So the
likelihood of the references in the order of the files is compared with that in shuffled orders. The split is cut into
shards, each of which the model reads at once. Groups, such as the references of one paper, are shuffled whole.

The paper takes Student's t over shards. Here p comes from the orders themselves: without contamination, the order of
the files and the shuffled ones are exchangeable in each shard, so that each is the first with equal chance (Hemerik and
Goeman 2018, Exact testing with random permutations, TEST 27). This needs no assumption about the likelihoods.

The base is the one without quantization. Nothing here depends on an adapter.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import BaseFacts, Contamination, OrderTest, ShardOrders
from pipeline.core.errors import UserError
from pipeline.core.progress import bar, say
from pipeline.core.records import Example
from pipeline.model import checkpoint, devices, load, loss, memory, pack, prompt
from pipeline.model.prompt import Row

if TYPE_CHECKING:
    pass

FEWEST = 3
"""Groups of a shard: two have but one other order."""
DRAWS = 100_000
"""Random choices of one order in each shard, of which p is the share."""
AT_ONCE = 1_000_000
"""Random numbers held at once."""
SEED = 17


@dataclass(frozen=True, slots=True)
class Block:
    """The token ids of the references of one group, in the order of the files, each with a line feed behind it."""

    ids: list[int]
    rows: int


def write_tested(asked: params.Contamination, runtime: params.Runtime) -> None:
    """Write `out/contamination.json`: the test, or why it was not made.

    UserError if the base has changed since it was fetched or does not fit into memory, and for likelihoods that are not
    finite.
    """
    facts = contracts.read(paths.BASE_FACTS, BaseFacts)
    if not asked.shards:
        return _write(Contamination(facts.sha256, not_tested="contamination.shards is 0"))
    asked.require_context(facts.context)
    tokenizer = checkpoint.tokenizer(paths.BASE)
    found = blocks(tokenizer, records.read_rows(paths.split("test"), Example))
    chosen = shards(found, asked)
    if (why := too_few(len(found), len(chosen), asked)) is not None:
        return _write(Contamination(facts.sha256, not_tested=why))
    device = devices.choose(runtime)
    devices.require(device, facts.dtype)
    memory.require_likelihoods(device, memory.Base.stored(paths.BASE, facts), asked.tokens)
    model = load.base(paths.BASE, facts, device, keep_dequantized=True)
    return _write(Contamination(facts.sha256, tested=tested(model, tokenizer, chosen, asked.permutations)))


def _write(made: Contamination) -> None:
    contracts.write(paths.CONTAMINATION, made)
    if made.tested is None:
        say(f"contamination: not tested, {made.not_tested}")
    else:
        say(
            "contamination: log-likelihood of the test references in the order of the files, minus that shuffled: "
            f"{made.tested.difference:+.4f} nats a token, p {made.tested.p:.4f}, over {len(made.tested.shards)} shards"
        )


def blocks(tokenizer: Any, test: Sequence[Example]) -> list[Block]:
    """The references of each group of the test split, in the order in which the groups begin.

    Each reference is tokenized alone, so that every order has the same tokens. Of several right answers the first is
    read.
    """
    groups: dict[str, list[list[int]]] = {}
    for example in test:
        groups.setdefault(example.group, []).append(prompt.plain_ids(tokenizer, f"{example.target}\n"))
    return [Block([token for ids in some for token in ids], len(some)) for some in groups.values()]


def shards(found: Sequence[Block], asked: params.Contamination) -> list[list[Block]]:
    """At most `asked.shards` runs of consecutive groups, evenly spread, each of at most `asked.tokens` tokens.

    The groups are cut into as many parts, of which each shard is the beginning. One of fewer than `FEWEST` groups is
    left out. Which groups a shard has does not depend on their order within it.
    """
    chosen = []
    for at in range(asked.shards):
        part = found[at * len(found) // asked.shards : (at + 1) * len(found) // asked.shards]
        lengths = np.cumsum([len(block.ids) for block in part])
        shard = part[: int(np.searchsorted(lengths, asked.tokens, side="right"))]
        if len(shard) >= FEWEST:
            chosen.append(list(shard))
    return chosen


def too_few(groups: int, left: int, asked: params.Contamination) -> str | None:
    """Why no test is made of `left` shards, of `groups` groups in the split; None if one is."""
    if groups < FEWEST * asked.shards:
        return (
            f"the test split has {groups:,} groups of references, too few for {asked.shards} shards of {FEWEST} "
            "(contamination.shards)"
        )
    if asked.smallest(left) > asked.SMALLEST:
        return (
            f"only {left} of {asked.shards} shards hold {FEWEST} groups of references within {asked.tokens} tokens "
            "(contamination.tokens)"
        )
    return None


def tested(model: Any, tokenizer: Any, chosen: Sequence[Sequence[Block]], permutations: int) -> OrderTest:
    """The likelihood of each shard in the order of the files and in `permutations` shuffled orders, and the test.

    `model` is in evaluation mode. UserError for likelihoods that are not finite.
    """
    start = prompt.beginning(tokenizer) or prompt.plain_ids(tokenizer, "\n")
    draw = random.Random(SEED)
    made = []
    whole = sum(len(block.ids) for shard in chosen for block in shard)
    with bar("contamination", whole * (1 + permutations), "tokens") as advance:
        for shard in chosen:
            tokens = sum(len(block.ids) for block in shard)
            orders = [list(range(len(shard)))]
            orders += [draw.sample(orders[0], len(shard)) for _ in range(permutations)]
            found = []
            for order in orders:
                found.append(log_likelihood(model, start, [token for at in order for token in shard[at].ids]))
                advance(tokens)
            made.append(ShardOrders(len(shard), sum(block.rows for block in shard), tokens, found[0], found[1:]))
    likelihoods_sxo = np.array([[one.in_order, *one.shuffled] for one in made])
    if not np.isfinite(likelihoods_sxo).all():
        raise UserError(
            "the likelihoods of the test references are not finite: the weights are damaged, or model.dtype is too "
            "narrow for them"
        )
    gains_s = likelihoods_sxo[:, 0] - likelihoods_sxo[:, 1:].mean(axis=1)
    return OrderTest(
        device=model.device.type,
        threads=devices.threads(model.device),
        permutations=permutations,
        groups=sum(one.groups for one in made),
        rows=sum(one.rows for one in made),
        tokens=whole,
        difference=float(gains_s.sum() / whole),
        p=p_value(likelihoods_sxo),
        shards=made,
    )


def log_likelihood(model: Any, start: list[int], ids: list[int]) -> float:
    """The log-likelihood of the tokens `ids` behind the tokens `start`, in nats."""
    import torch

    with torch.no_grad():
        return -float(loss.summed(model, pack.pack([pack.tree([Row("", "", start, ids)])], model.device)))


def p_value(likelihoods_sxo: "np.typing.NDArray[np.float64]") -> float:
    """The one-sided p-value of s shards' log-likelihoods in o orders, of which the first is that of the files.

    Without contamination, each order of a shard is the first with equal chance. p is the share of `DRAWS` random
    choices, and of the one at hand, in which the sum over shards is as large as it is for the first orders.
    """
    shards, orders = likelihoods_sxo.shape
    centred = likelihoods_sxo - likelihoods_sxo.mean(axis=1, keepdims=True)
    seen = centred[:, 0].sum()
    tie = 1e-9 * max(1.0, float(np.abs(centred).sum()))  # sums of the same numbers in another order
    generator = np.random.Generator(np.random.PCG64(SEED))
    size = max(1, AT_ONCE // shards)
    hits, left = 1, DRAWS
    while left:
        count = min(size, left)
        drawn = generator.integers(orders, size=(count, shards))
        hits += int((centred[np.arange(shards), drawn].sum(axis=1) >= seen - tie).sum())
        left -= count
    return hits / (DRAWS + 1)
