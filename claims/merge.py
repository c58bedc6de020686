"""Claims about merging: LoRA's update, added to the weights, costs no time (arXiv 2106.09685, section 4.1).

Dimensions: L tokens, V vocabulary.
"""

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from claims import evidence, lab, timing
from claims.evidence import Evidence
from pipeline.core import contracts, params, records
from pipeline.core.contracts import BaseFacts
from pipeline.core.records import Example
from pipeline.infer import backend_transformers, infer
from pipeline.lora import start
from pipeline.model import checkpoint, devices, fused, packed
from pipeline.model.prompt import Encoder

SPREAD = 0.0044
"""Standard deviation of B's values after training in the default experiment, with rank 16 and alpha 32."""
PAPERS = 4
"""How many papers of the test split are used, each with a prompt for every aspect."""
NEW_TOKENS = 16
TIMED_PROMPT, TIMED_TOKENS = 16, 4
ROUNDS = 15
SEED = 17


class Models(NamedTuple):
    """The base alone, with the adapter beside it, and with the adapter merged in."""

    base: Any
    beside: Any
    within: Any


def merged() -> Evidence:
    """The float32 base alone, with an adapter of the default experiment's form beside it, and with that merged in."""
    experiment = lab.experiment()
    device = devices.choose(experiment.runtime)
    base = checkpoint.pretrained(lab.BASE, device, dtype=torch.float32)
    tokenizer, facts = checkpoint.tokenizer(lab.BASE), contracts.read(lab.BASE_FACTS, BaseFacts)
    encoder = Encoder(tokenizer, experiment.prompt, facts.context)
    families = _families(encoder)
    # The aspects of a paper share its text: the logits of one prompt are enough, and answers to all cost little more.
    texts = [family[0][1] for family in families]
    models = Models(base, *twins(base, experiment.lora))
    fused.apply(base)
    values = _logits_apart(models, texts)

    given = experiment.generation.model_copy(update={"max_new_tokens": NEW_TOKENS, "num_beams": 1})
    config = infer.configuration(given, sorted({encoder.end, *facts.stop_ids}), tokenizer)
    values |= _answers_apart([dict(_answers(model, config, families, given)) for model in models])

    given = given.model_copy(update={"max_new_tokens": TIMED_TOKENS})
    config = infer.configuration(given, [], tokenizer)  # nothing stops it
    values |= _times_apart(models, config, texts[0][:TIMED_PROMPT], given)

    rounded = logits(base, texts[0])
    del base, models  # before the next ones are loaded
    values |= _in_float64(checkpoint.pretrained(lab.BASE, device, dtype=torch.float64), experiment, texts[0], rounded)
    values |= into_4bit(checkpoint.pretrained(lab.quantized("nf4"), device), experiment.lora, texts)
    return Evidence(values, _notes(len(texts), sum(map(len, families)), device))


def _families(encoder: Encoder) -> list[list[tuple[str, list[int]]]]:
    """The prompts of the first papers of the test split, by paper: id and token ids."""
    rows = records.read_rows(lab.data("default") / "test.jsonl", Example)
    papers = list(dict.fromkeys(row.group for row in rows))[:PAPERS]
    return [[(row.id, encoder.prompt(row)) for row in rows if row.group == paper] for paper in papers]


def _logits_apart(models: Models, texts: Sequence[Sequence[int]]) -> dict[str, evidence.Value]:
    """How far the merged model's logits are from those of the adapter beside the base, and from the base's."""
    within = [logits(models.within, ids) for ids in texts]
    return {
        "logit_difference": evidence.largest(
            difference(logits(models.beside, ids), merged) for ids, merged in zip(texts, within, strict=True)
        ),
        "logit_change_from_base": evidence.least(
            difference(logits(models.base, ids), merged) for ids, merged in zip(texts, within, strict=True)
        ),
    }


def _answers_apart(answers: Sequence[dict[str, list[int]]]) -> dict[str, evidence.Value]:
    """How many answers are equal; `answers` in the order of `Models`."""
    base, beside, within = answers
    return {
        "answers": len(within),
        "equal_answers": sum(beside[name] == within[name] for name in within),
        "answers_changed_from_base": sum(base[name] != within[name] for name in within),
    }


def _times_apart(
    models: Models, config: Any, prompt: Sequence[int], given: params.Generation
) -> dict[str, evidence.Value]:
    """The time of both adapted models, as ratios to that of the base."""
    timed = {"base": models.base, "merged": models.within, "unmerged": models.beside}
    calls = {name: partial(_answers, model, config, [[("timed", prompt)]], given) for name, model in timed.items()}
    taken = timing.seconds(calls, ROUNDS, SEED)
    return {f"{name}_over_base_time": timing.ratio(taken[name], taken["base"], SEED) for name in ("merged", "unmerged")}


def _in_float64(
    exact: Any, experiment: params.Params, ids: Sequence[int], rounded: torch.Tensor
) -> dict[str, evidence.Value]:
    """The difference of the logits in float64, and how far `rounded`, the base's logits in float32, are from exact."""
    pair = twins(exact, experiment.lora)
    return {
        "logit_difference_float64": difference(*(logits(model, ids) for model in pair)),
        "logit_rounding_of_base": difference(rounded, logits(exact, ids)),
    }


def _notes(texts: int, prompts: int, device: torch.device) -> list[str]:
    return [
        f"The adapter is random, of the default experiment's rank, alpha and layers, with B of the spread that "
        f"training leaves ({SPREAD}). Logits of all tokens of {texts} prompts of the test split, and greedy "
        f"answers of up to {NEW_TOKENS} tokens to {prompts}, in float32. answers_changed_from_base: "
        "how many of them merging changes at all; the others would be equal without it.",
        "Of the first prompt alone: logit_difference_float64, the same difference in float64 (where norms, taken "
        "in float32, may wipe out what is left of it), and logit_rounding_of_base, how far the base's own logits "
        "in float32 are from those in float64. A difference of that size is rounding, not merging.",
        f"Time of {TIMED_TOKENS} tokens behind a prompt of {TIMED_PROMPT}, one sequence alone, {ROUNDS} rounds by "
        f"turns, on {devices.describe(device)}.",
        "nf4_...: the same adapter merged into the 4-bit weights, which are quantized again afterwards: what is "
        "lost of the update, relative to the update, and the largest change of a next-token logit by merging, "
        "beside the largest by the adapter itself.",
    ]


def twins(base: Any, lora: params.Lora) -> tuple[Any, Any]:
    """Copies of the base, one with the adapter beside it, one with the same adapter merged in."""
    return adapt(copy.deepcopy(base), lora), adapt(copy.deepcopy(base), lora).merge_and_unload()


def adapt(model: Any, lora: params.Lora) -> Any:
    """The model with an adapter that changes it: A as training starts, B random, of the size that training leaves."""
    adapted = start.attach(model, lora, SEED).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(SEED)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            tensor.data.copy_(SPREAD * torch.randn(tensor.shape, generator=draw))
    return adapted


@torch.no_grad()
def into_4bit(model: Any, lora: params.Lora, texts: Sequence[Sequence[int]]) -> dict[str, evidence.Value]:
    """The loss by merging into a 4-bit base, whose sum with the update is quantized again."""
    packed.keep_unpacked(model)
    adapted = adapt(model, lora)
    before = [logits(adapted, ids, 1) for ids in texts]
    with adapted.disable_adapter():
        without = [logits(adapted, ids, 1) for ids in texts]
    lost = updates = 0.0
    with warnings.catch_warnings():
        # PEFT warns of the very loss that is measured here.
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
    """Logits, 1xLxV; with `last`, of so many tokens at the end."""
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
