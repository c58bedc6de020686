"""Claims about the key-value cache, which grouped-query attention shrinks (Llama 2, arXiv 2307.09288, section 2.1).

Dimensions: R sequences, L tokens, C columns of the cache, D a head's size.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from claims import evidence, lab, timing
from claims.evidence import Evidence
from pipeline.core import records
from pipeline.core.records import Example
from pipeline.infer import scheduler
from pipeline.model import checkpoint, devices, fused
from pipeline.model.prompt import text_ids

TEXTS = 3
ROWS, CONTEXT = 8, 1024
"""Sequences decoded at once, and the tokens before the next one in each: a cache about as large as the model."""
ROUNDS = 20
SEED = 17


def grouped_query() -> Evidence:
    """The default base against the same model with as many key-value heads as query heads."""
    device = devices.choose(lab.experiment().runtime)
    grouped = checkpoint.pretrained(lab.BASE, device)
    expanded = expand(grouped)
    values: dict[str, evidence.Value] = {}
    for name, model in {"grouped": grouped, "expanded": expanded}.items():
        values[f"bytes_per_token_{name}"] = checkpoint.architecture(model).kv_bytes_per_token
        values[f"held_bytes_per_token_{name}"] = held_bytes(model)
        values[f"parameters_{name}"] = checkpoint.architecture(model).parameters
        model.float()
    tokenizer = checkpoint.tokenizer(lab.BASE)
    rows = records.read_rows(lab.data("default") / "test.jsonl", Example)
    texts = list(dict.fromkeys(row.source for row in rows))[:TEXTS]
    values["logit_difference"] = evidence.largest(
        logit_difference(grouped, expanded, torch.tensor([text_ids(tokenizer, text)], device=device)) for text in texts
    )
    for model in (grouped, expanded):
        fused.apply(model)
    calls = {name: step(model) for name, model in (("grouped", grouped), ("expanded", expanded))}
    taken = timing.seconds(calls, ROUNDS, SEED)
    values["expanded_over_grouped_time"] = timing.ratio(taken["expanded"], taken["grouped"], SEED)
    return Evidence(
        values,
        [
            f"Logits of {TEXTS} abstracts in float32. Time of one decoding step in float32: {ROWS} sequences with "
            f"{CONTEXT:,} tokens behind them, {ROUNDS} rounds by turns, on {devices.describe(device)}.",
            "held_bytes_per_token is what the cache of the pipeline's own decoding holds, in the base's 16-bit type.",
        ],
    )


def expand(model: Any) -> Any:
    """A copy in which each query head has its own key-value head: the head of each group is repeated."""
    expanded = copy.deepcopy(model)
    config = expanded.config
    groups = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    for layer in expanded.get_decoder().layers:
        attention = layer.self_attn
        attention.num_key_value_groups = 1
        for name in ("k_proj", "v_proj"):
            narrow = getattr(attention, name).weight.data
            by_head = narrow.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, 0)
            wide = torch.nn.Linear(by_head.shape[-1], by_head.shape[0] * by_head.shape[1], bias=False, device="meta")
            wide.weight = torch.nn.Parameter(by_head.flatten(0, 1), requires_grad=False)
            setattr(attention, name, wide)
    return expanded


def held_bytes(model: Any) -> float:
    """The measured bytes of one token in the cache."""
    slots = scheduler.Slots(1, scheduler.COLUMNS)
    _extend(model, slots, 0, torch.zeros(1, 1, dtype=torch.long), 0)
    return sum(held.nbytes for held in slots.held.values()) / scheduler.COLUMNS


@torch.inference_mode()
def logit_difference(one: Any, other: Any, ids_1xL: torch.Tensor) -> float:
    """The largest difference of a logit, over all tokens of a text and the whole vocabulary."""
    return float((one(ids_1xL, use_cache=False).logits - other(ids_1xL, use_cache=False).logits).abs().max())


@torch.inference_mode()
def step(model: Any) -> Callable[[], float]:
    """A call that decodes one token after each of `ROWS` sequences, which all hold the same text."""
    slots = scheduler.Slots(ROWS, CONTEXT + scheduler.COLUMNS)
    draw = torch.Generator().manual_seed(SEED)
    ids_1xL = torch.randint(3, model.config.vocab_size, (1, CONTEXT), generator=draw)
    _extend(model, slots, 0, ids_1xL, 0)
    for row in range(1, ROWS):
        slots.copy(0, row, CONTEXT)
    return lambda: float(_extend(model, slots, 0, ids_1xL[:, :1].expand(ROWS, 1), CONTEXT).logits[0, 0, 0])


@torch.inference_mode()
def _extend(model: Any, slots: scheduler.Slots, first: int, ids_RxL: torch.Tensor, start: int) -> Any:
    """Add tokens to slots, one row to each slot from `first` on, behind their first `start` tokens; the logits of the
    last token."""
    position_L = torch.arange(start, start + ids_RxL.shape[1], device=model.device)
    position_RxL = position_L.expand(ids_RxL.shape)
    visible = -(-(start + ids_RxL.shape[1]) // scheduler.COLUMNS) * scheduler.COLUMNS
    slots.write_at(first, position_RxL, visible)
    hidden_LxC = torch.arange(visible, device=model.device) > position_L[:, None]
    mask_LxC = torch.zeros(hidden_LxC.shape, dtype=model.dtype, device=model.device)
    return model(
        input_ids=ids_RxL.to(model.device),
        position_ids=position_RxL,
        attention_mask=mask_LxC.masked_fill_(hidden_LxC, float("-inf"))[None, None],
        past_key_values=slots,
        use_cache=True,
        logits_to_keep=1,
    )


if __name__ == "__main__":
    evidence.main({"gqa-cache": grouped_query})
