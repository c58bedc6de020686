"""The base as every stage that computes loads it: quantized or not, frozen, unpacked or shared as `runtime` says."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import contracts, paths
from pipeline.core.contracts import Loadable, QuantizedFacts
from pipeline.model import checkpoint, packed

if TYPE_CHECKING:
    import torch


def quantized(device: "torch.device", keep_dequantized: bool, sharding: str = "none") -> Any:
    """Load the base as `quantize` left it; otherwise as `base`."""
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    return base(paths.QUANTIZED, facts, device, keep_dequantized, sharding)


def base(folder: Path, facts: Loadable, device: "torch.device", keep_dequantized: bool, sharding: str = "none") -> Any:
    """Load the checkpoint in `folder`: frozen, in evaluation mode, on `device`; with `sharding` a part of it.

    With `keep_dequantized`, 4-bit layers are unpacked once into plain ones; without it, in every forward pass. Both
    give the same numbers. 8-bit layers stay as they are. The base's own dropout is switched off, since it is frozen.
    UserError when the checkpoint is not what was written, or not what its facts say.
    """
    import torch

    from pipeline.model import fused, shard

    checkpoint.require_intact(folder, facts.sha256)

    def prepared(model: Any) -> Any:
        packed.require_effective(model, facts)
        if keep_dequantized:
            packed.dequantize(model)
        else:
            packed.keep_unpacked(model)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        return model.requires_grad_(False).eval()

    if sharding == "fsdp":
        mesh = shard.mesh(device)
        with shard.in_turn():
            model = prepared(checkpoint.pretrained(folder, torch.device("cpu")))
            shard.apply(model, device, mesh)
        shard.rehearse(model)
    elif sharding == "tensor":
        model = prepared(shard.split(folder, device))
    else:
        model = prepared(checkpoint.pretrained(folder, device))
    fused.apply(model)
    return model
