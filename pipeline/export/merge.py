"""The adapter added into the weights of the base (LoRA, arXiv 2106.09685, section 4.1: W + BA), and what that changes.

It is added to the values that it was trained on. A 4-bit base is unpacked first, since the original weights would give
another model than the one that was scored. The sum is computed in float32 and rounded once, to `model.dtype`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import BaseFacts, QuantizedFacts
from pipeline.core.progress import bar
from pipeline.lora import adapter, train
from pipeline.model import checkpoint, devices, load, loss, pack, packed
from pipeline.model.prompt import Encoder

ROWS = 48
"""The most validation rows that are compared, evenly spread."""
TOGETHER = 512
"""Tokens that each of the two models computes at once."""


def base() -> tuple[Any, str]:
    """The base in plain layers on the CPU, and in words which values they hold."""
    import torch

    facts, cpu = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts), torch.device("cpu")
    devices.quieten()
    checkpoint.require_intact(paths.BASE, contracts.read(paths.BASE_FACTS, BaseFacts).sha256)
    model = checkpoint.pretrained(paths.BASE, cpu)
    method, dtype = facts.method, facts.dtype
    if method in params.FOUR_BITS:
        checkpoint.require_intact(paths.QUANTIZED, facts.sha256)
        quantized = checkpoint.pretrained(paths.QUANTIZED, cpu)
        packed.dequantize(quantized)
        model.load_state_dict(quantized.state_dict())
        return model, f"the {method} values that the adapter was trained on, unpacked to {dtype}"
    if method == "int8":
        return model, (
            f"the weights before quantization, in {dtype}: int8 layers quantize activations as well, which plain "
            "weights cannot hold"
        )
    return model, f"the weights that the adapter was trained on, in {dtype}"


def merged(model: Any, folder: Path) -> Any:
    """`model` with the adapter in `folder` added to its weights, in place."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    # PEFT keeps the adapter in float32, as it was saved.
    adapted = PeftModel.from_pretrained(model, folder)
    for layer in (layer for layer in adapted.modules() if isinstance(layer, LoraLayer)):
        [name] = layer.active_adapters
        change_OxI = layer.scaling[name] * layer.lora_B[name].weight.data @ layer.lora_A[name].weight.data
        weight = layer.get_base_layer().weight
        sum_OxI = weight.data.float() + change_OxI
        if layer.use_dora[name]:  # DoRA (arXiv 2402.09353, equation 5): every row gets the length that was trained
            length_O = layer.lora_magnitude_vector[name].weight.data
            sum_OxI *= (length_O / torch.linalg.vector_norm(sum_OxI, dim=1))[:, None]
        weight.data = sum_OxI.to(weight.dtype)
    return adapted.unload()


def rows(prompt: params.Prompt) -> list[pack.Tree]:
    """The validation rows that are compared, as training packs them."""
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    encoder = Encoder(checkpoint.tokenizer(), prompt, facts.context)
    examples = records.read_rows(paths.split("validation"), records.Example)
    return train.evenly(pack.trees([encoder.row(example) for example in examples]), ROWS)


def as_measured(seed: int, runtime: params.Runtime) -> Any:
    """The model that was scored: the quantized base, whole in this process, with the adapter beside it."""
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    model = load.quantized(devices.choose(runtime), runtime.keep_dequantized)
    return adapter.Saved(paths.adapter(seed)).load(model, facts.sha256)


@dataclass(frozen=True, slots=True)
class Difference:
    """How well exported files predict validation answers, compared with the model that was scored.

    Losses are in nats a token. `logit_max` and `logit_mean` are absolute differences; `same` is the share of tokens for
    which both models find the same token likeliest.
    """

    loss_measured: float
    loss: float
    logit_max: float
    logit_mean: float
    same: float
    tokens: int
    rows: int


def difference(measured: Any, other: Any, trees: Sequence[pack.Tree]) -> Difference:
    """Compare `other` with `measured`, the model that was scored, on the answers in `trees`."""
    import torch

    losses, mean, same, largest, tokens = [0.0, 0.0], 0.0, 0.0, 0.0, 0
    with torch.no_grad(), bar("compare", sum(tree.supervised for tree in trees), "tokens") as advance:
        for part in pack.micro_batches(trees, TOGETHER):
            packed, there = pack.pack(part, measured.device), pack.pack(part, other.device)
            one_NxV = loss.logits(measured, packed)[0].float().cpu()
            other_NxV = loss.logits(other, there)[0].float().cpu()
            target_N = packed.target_N.cpu()
            for i, logits_NxV in enumerate((one_NxV, other_NxV)):
                losses[i] += float(torch.nn.functional.cross_entropy(logits_NxV, target_N, reduction="sum"))
            apart_NxV = (one_NxV - other_NxV).abs()
            largest = max(largest, float(apart_NxV.max()))
            mean += float(apart_NxV.mean(dim=-1).sum())
            same += float((one_NxV.argmax(dim=-1) == other_NxV.argmax(dim=-1)).sum())
            tokens += len(target_N)
            advance(len(target_N))
    rows = sum(len(tree.branches) for tree in trees)
    return Difference(losses[0] / tokens, losses[1] / tokens, largest, mean / tokens, same / tokens, tokens, rows)
