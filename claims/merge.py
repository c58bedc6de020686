"""Claims about merging: LoRA's update, added to the weights, costs no time (arXiv 2106.09685, section 4.1).

Dimensions: L tokens, V vocabulary.
"""

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from claims import evidence, lab, timing
from claims.evidence import Evidence
from pipeline.core import contracts, params, records
from pipeline.core.contracts import BaseFacts
from pipeline.core.records import Example
from pipeline.infer import backend_transformers
from pipeline.infer import infer as generate
from pipeline.lora import adapter
from pipeline.model import checkpoint, devices, fused, packed
from pipeline.model.prompt import Encoder

SPREAD = 0.0044
"""Standard deviation of B's values: what training leaves in the default experiment, with rank 16 and alpha 32."""
PAPERS = 4
"""Papers of the test split, each with a prompt for every aspect."""
NEW_TOKENS = 16
TIMED_PROMPT, TIMED_TOKENS = 16, 4
ROUNDS = 15
SEED = 17


def merged() -> Evidence:
    """The float32 base alone, with an adapter of the default experiment's form beside it, and with that merged in."""
    experiment = lab.experiment()
    device = devices.choose(experiment.runtime)
    base = checkpoint.pretrained(lab.BASE, device, dtype=torch.float32)
    tokenizer, facts = checkpoint.tokenizer(lab.BASE), contracts.read(lab.BASE_FACTS, BaseFacts)
    encoder = Encoder(tokenizer, experiment.prompt, facts.context)
    rows = records.read_rows(lab.data("default") / "test.jsonl", Example)
    papers = list(dict.fromkeys(row.group for row in rows))[:PAPERS]
    prompts = {row.id: encoder.prompt(row) for row in rows if row.group in papers}

    beside, within = twins(base, experiment.lora)
    fused.apply(base)
    # Aspects of a paper share its text, so that logits of one of them say enough, and answers to all cost little more.
    families = [[(row.id, prompts[row.id]) for row in rows if row.group == paper] for paper in papers]
    texts = [family[0][1] for family in families]
    merged_logits = [logits(within, ids) for ids in texts]
    values: dict[str, evidence.Value] = {
        "logit_difference": evidence.largest(map(difference, (logits(beside, ids) for ids in texts), merged_logits)),
        "logit_change_from_base": evidence.least(map(difference, (logits(base, ids) for ids in texts), merged_logits)),
    }
    del merged_logits

    given = experiment.generation.model_copy(update={"max_new_tokens": NEW_TOKENS, "num_beams": 1})
    config = generate.configuration(given, sorted({encoder.end, *facts.stop_ids}), tokenizer)
    alone, one, other = (dict(_answers(model, config, families, given)) for model in (base, beside, within))
    values |= {
        "answers": len(prompts),
        "equal_answers": sum(one[name] == other[name] for name in prompts),
        "answers_changed_from_base": sum(alone[name] != other[name] for name in prompts),
    }

    given = given.model_copy(update={"max_new_tokens": TIMED_TOKENS})
    config = generate.configuration(given, [], tokenizer)  # nothing stops it
    short = [[("timed", texts[0][:TIMED_PROMPT])]]
    calls = {
        name: partial(_answers, model, config, short, given)
        for name, model in (("base", base), ("merged", within), ("unmerged", beside))
    }
    taken = timing.seconds(calls, ROUNDS, SEED)
    for name in ("merged", "unmerged"):
        values[f"{name}_over_base_time"] = timing.ratio(taken[name], taken["base"], SEED)
    rounded = logits(base, texts[0])
    del base, beside, within, calls
    exact = checkpoint.pretrained(lab.BASE, device, dtype=torch.float64)
    pair = twins(exact, experiment.lora)
    values["logit_difference_float64"] = difference(*(logits(model, texts[0]) for model in pair))
    values["logit_rounding_of_base"] = difference(rounded, logits(exact, texts[0]))
    del exact, pair
    values |= into_4bit(checkpoint.pretrained(lab.quantized("nf4"), device), experiment.lora, texts)
    return Evidence(
        values,
        [
            f"The adapter is random, of the default experiment's rank, alpha and layers, with B of the spread that "
            f"training leaves ({SPREAD}). Logits of all tokens of {len(texts)} prompts of the test split, and greedy "
            f"answers of up to {NEW_TOKENS} tokens to {len(prompts)}, in float32. answers_changed_from_base: "
            "how many of them merging changes at all; the others would be equal without it.",
            "Of the first prompt alone: logit_difference_float64, the same difference in float64 (where norms, taken "
            "in float32, may wipe out what is left of it), and logit_rounding_of_base, how far the base's own logits "
            "in float32 are from those in float64. A difference of that size is rounding, not merging.",
            f"Time of {TIMED_TOKENS} tokens behind a prompt of {TIMED_PROMPT}, one sequence alone, {ROUNDS} rounds by "
            f"turns, on {devices.describe(device)}.",
            "nf4_...: the same adapter merged into the 4-bit weights, which are quantized again afterwards: what is "
            "lost of the update, relative to the update, and the largest change of a next-token logit by merging, "
            "beside the largest by the adapter itself.",
        ],
    )


def twins(base: Any, lora: params.Lora) -> tuple[Any, Any]:
    """Copies of the base, one with the adapter beside it, one with the same adapter merged in."""
    return adapt(copy.deepcopy(base), lora), adapt(copy.deepcopy(base), lora).merge_and_unload()


def adapt(model: Any, lora: params.Lora) -> Any:
    """The model with an adapter that acts: A as training starts, B as random as training leaves it."""
    adapted = adapter.attach(model, lora, SEED).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(SEED)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            tensor.data.copy_(SPREAD * torch.randn(tensor.shape, generator=draw))
    return adapted


@torch.no_grad()
def into_4bit(model: Any, lora: params.Lora, texts: Sequence[Sequence[int]]) -> dict[str, evidence.Value]:
    """What merging into a 4-bit base loses, since the sum is quantized again."""
    packed.keep_unpacked(model)
    adapted = adapt(model, lora)
    before = [logits(adapted, ids, 1) for ids in texts]
    with adapted.disable_adapter():
        without = [logits(adapted, ids, 1) for ids in texts]
    lost = updates = 0.0
    with warnings.catch_warnings():
        # PEFT warns of what is measured here.
        warnings.filterwarnings("ignore", message="Merge lora module to 4-bit linear", category=UserWarning)
        for layer in adapted.modules():
            if hasattr(layer, "get_delta_weight") and hasattr(layer, "merge"):
                update = layer.get_delta_weight("default").float()
                wanted = _unpacked(layer) + update
                layer.merge()
                lost += float((_unpacked(layer) - wanted).square().sum())
                updates += float(update.square().sum())
    packed.keep_unpacked(model)
    after = [logits(adapted, ids, 1) for ids in texts]
    return {
        "nf4_update_lost": (lost / updates) ** 0.5,
        "nf4_logit_change_by_merging": evidence.largest(map(difference, before, after)),
        "nf4_logit_change_by_adapter": evidence.largest(map(difference, before, without)),
    }


@torch.inference_mode()
def logits(model: Any, ids: Sequence[int], last: int = 0) -> torch.Tensor:
    """1xLxV; of the `last` tokens alone, where given."""
    ids_1xL = torch.tensor([ids], device=model.device)
    logits_1xLxV: torch.Tensor = model(input_ids=ids_1xL, use_cache=False, logits_to_keep=last).logits
    return logits_1xLxV


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _unpacked(layer: Any) -> torch.Tensor:
    """The weights of the 4-bit layer below an adapter."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.base_layer.weight
    unpacked: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return unpacked.float()


def _answers(model: Any, config: Any, families: Any, given: params.Generation) -> list[tuple[str, list[int]]]:
    engine = backend_transformers.Engine(model, config, given, model.device.type, devices.threads(model.device), {})
    return list(backend_transformers.complete(engine, families))


if __name__ == "__main__":
    evidence.main({"merge": merged})
