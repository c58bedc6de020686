"""A fresh adapter on a loaded base, through PEFT: its layers, where its matrices start, and which of them are trained.

LoRA (arXiv 2106.09685) adds s B A to a weight W. PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start at a part
of W, which PEFT takes out of the base: W - s B0 A0 + s B A. Here W stays as it is, and a second, frozen adapter holds
A0 and -B0. The sum is the same, but the base remains the one that all variants share, it is not rounded again, and the
two adapters together are plain LoRA of twice the rank on it (`adapter.save`).
"""

import copy
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core import contracts, params, paths
from pipeline.core.contracts import BaseFacts
from pipeline.core.errors import UserError
from pipeline.lora import adapter
from pipeline.model import adapted, checkpoint, shard
from pipeline.model.prompt import Row

if TYPE_CHECKING:
    import torch


TOGETHER = 1024
"""Tokens that are read at once for EVA, at least."""
PASSES = 50
"""Passes over the training rows after which EVA's directions must have settled."""


def attach(model: Any, lora: params.Lora, seed: int, rows: Sequence[Row] = ()) -> Any:
    """Put a fresh adapter on a loaded base: what is random in its start is drawn from `seed`.

    `rows` are those of training, which EVA alone reads. Returns PEFT's model. UserError for settings that the base
    cannot have: layers, modules or biases that it lacks, and patterns that match nothing.
    """
    import torch
    from peft import get_peft_model

    from pipeline.model import fused

    require_fitting(model, lora)
    config, biases = configuration(model, lora), adapter.base_biases(model, lora.bias)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = get_peft_model(model, config)
        if lora.decomposes:
            _decompose(tuned, lora.init)
        elif lora.init == "loftq":
            _make_up(tuned)
        elif lora.init == "eva":
            _explain(tuned, rows)
    tuned.base_biases = biases
    if shard.kind(tuned) == "tensor":
        shard.fit(tuned)
        shard.draw(tuned, seed)
    if lora.train_only:
        _freeze(tuned, "lora_B" if lora.train_only == "A" else "lora_A")
    fused.apply(tuned)
    return tuned


def configuration(model: Any, lora: params.Lora) -> Any:
    """PEFT's configuration. Starts that read weights are computed after it, so for PEFT they are the default one."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora),
        layers_to_transform=lora.layers,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_dora=lora.dora,
        init_lora_weights=lora.init if lora.init in ("gaussian", "orthogonal") else True,
        modules_to_save=list(lora.modules_to_save) or None,
        bias=lora.bias,
        task_type="CAUSAL_LM",
    )


def targets(model: Any, lora: params.Lora) -> list[str]:
    """The names of the layers to adapt. UserError for a name that the model does not have."""
    known = checkpoint.linear_layers(model)
    adapted.require_targets(lora, known)
    return known if lora.target_modules == "all-linear" else sorted(set(lora.target_modules))


def require_fitting(model: Any, lora: params.Lora) -> None:
    """UserError for settings that would have no effect on this model, or none that is sound."""
    names, blocks = targets(model, lora), model.config.num_hidden_layers
    adapted.require_blocks(lora, blocks)
    layers = {}
    for name, layer in model.named_modules():
        block = re.match(r"(?:.*\.)?layers\.(\d+)\.", name)
        last = name.rpartition(".")[2]
        if block and last in names and adapted.adapts(lora, int(block[1]), last):
            layers[name] = layer
    adapted.require_layers(lora, {name: (layer.in_features, layer.out_features) for name, layer in layers.items()})
    adapted.require_untied(lora, model.config.get_text_config().tie_word_embeddings)
    if lora.bias == "all" and not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise UserError("lora.bias = 'all', but this model has no biases: set it to none")
    if lora.bias == "lora_only" and all(layer.bias is None for layer in layers.values()):
        raise UserError("lora.bias = 'lora_only', but no layer that is adapted has a bias: set it to none")


def _decompose(tuned: Any, init: str) -> None:
    """Start at a part of the weights, as PEFT computes it, and put its negative into a second, frozen adapter."""
    import torch

    config = copy.deepcopy(tuned.peft_config[adapter.NAME])
    config.lora_dropout, config.modules_to_save = 0.0, None
    tuned.add_adapter(adapter.START, config)
    for layer in shard.adapters(tuned):
        weight = layer.get_base_layer().weight
        place, values = weight.data, weight.data.clone()
        with torch.no_grad():
            if init == "olora":
                layer.olora_init(adapter.NAME)
            else:
                layer.pissa_init(adapter.NAME, init)
            weight.data = place.copy_(values)  # PEFT took the part out
            for matrices, sign in ((layer.lora_A, 1), (layer.lora_B, -1)):
                # Rounded alike, so that the two adapters cancel each other before the first step.
                trained, frozen = matrices[adapter.NAME].weight, matrices[adapter.START].weight
                rounded = trained.data.to(weight.dtype).contiguous()
                trained.data, frozen.data = rounded.float(), sign * rounded
    tuned.base_model.set_adapter([adapter.NAME, adapter.START])
    for name, tensor in tuned.named_parameters():
        if f".{adapter.START}." in name:
            tensor.requires_grad = False


def _make_up(tuned: Any) -> None:
    """LoftQ (arXiv 2310.08659) on a base that is quantized already: s B A is the best approximation of what was lost.

    That is one iteration of its algorithm 1, as PEFT's `replace_lora_weights_loftq` makes it on CUDA. PEFT leaves the
    scale s out, so that for s = 2 the start is as far from the original weights as the quantized ones are.
    """
    import torch

    from pipeline.model import fused

    checkpoint.require_intact(paths.BASE, contracts.read(paths.BASE_FACTS, BaseFacts).sha256)
    original = dict(_named(tuned))
    with torch.no_grad():
        for name, tensor in checkpoint.stored(paths.BASE, [f"{name}.weight" for name in original]):
            layer = original[name.removesuffix(".weight")]
            dense = fused.dense(layer.get_base_layer())
            lost = tensor.to(dense.device).float() - dense.float()
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            rank, scale = layer.r[adapter.NAME], layer.scaling[adapter.NAME]
            root = s[:rank].sqrt()
            layer.lora_A[adapter.NAME].weight.data = (root[:, None] * v[:rank]).contiguous()
            layer.lora_B[adapter.NAME].weight.data = (u[:, :rank] * root / scale).contiguous()


def _explain(tuned: Any, rows: Sequence[Row]) -> None:
    """EVA (arXiv 2410.07170): the rows of A are the directions in which a layer's inputs vary most, by PEFT.

    Every layer keeps its rank, so PEFT's `rho` is 1. All tokens of the training rows are read: answers are few of them.
    UserError if the directions do not settle.
    """
    from peft import EvaConfig, initialize_lora_eva_weights

    from pipeline.model import fused

    config = tuned.peft_config[adapter.NAME]
    asked = copy.deepcopy(config)
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0, use_label_mask=False)
    batches = list(padded(rows, max(TOGETHER, 2 * asked.r), tuned.device))
    passes = iter(range(PASSES * len(batches)))

    def compute(model: Any, inputs: dict[str, Any]) -> None:
        if next(passes, None) is None:
            raise UserError(
                f"lora.init = 'eva' does not settle in {PASSES} passes over the training rows: take more rows, lower "
                "lora.r, or set lora.init to default"
            )
        model(**inputs, logits_to_keep=1, use_cache=False)

    with fused.apart(tuned):
        initialize_lora_eva_weights(
            tuned, batches, forward_fn=compute, gather_distributed_inputs=False, show_progress_bar=False
        )
    # PEFT has written every layer into the patterns; in a saved configuration `eva` would ask for rows.
    tuned.peft_config[adapter.NAME] = asked


def padded(rows: Sequence[Row], tokens: int, device: "torch.device") -> Iterator[dict[str, "torch.Tensor"]]:
    """The rows, prompt and completion, in batches of so many tokens or a little more, padded on the right."""
    import torch

    batch: list[list[int]] = []
    for at, row in enumerate(rows, start=1):
        batch.append([*row.prompt, *row.completion])
        if at == len(rows) or sum(map(len, batch)) >= tokens:
            width = max(map(len, batch))
            ids = [ids + [0] * (width - len(ids)) for ids in batch]
            mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in batch]
            yield {
                "input_ids": torch.tensor(ids, device=device),
                "attention_mask": torch.tensor(mask, device=device),
            }
            batch = []


def _named(tuned: Any) -> Iterator[tuple[str, Any]]:
    """The adapted layers by the names that they have in the base."""
    for name, layer in tuned.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            yield name, layer


def _freeze(tuned: Any, matrices: str) -> None:
    """Leave all A, or all B, as they are, in the model's dtype, in which they are multiplied."""
    for name, tensor in tuned.named_parameters():
        if f".{matrices}.{adapter.NAME}." in name:
            tensor.requires_grad = False
            tensor.data = tensor.data.to(tuned.dtype)
