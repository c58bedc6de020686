"""Full fine-tuning: every weight of the unquantized base is trained, beside an unchanged copy of the base.

`pipeline.lora.train.Trainer` trains every tensor that requires a gradient. Master weights, sums of gradients and
AdamW's moments are in float32, forward and backward pass in the model's dtype. The layers are transformers' own, since
those of `pipeline.model.fused` compute no gradient for weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.core import contracts, paths
from pipeline.core.contracts import QuantizedFacts
from pipeline.model import checkpoint

if TYPE_CHECKING:
    import torch


class Both:
    """The tuned model and its base, with the interface of an adapted model: in `disable_adapter()` it is the base."""

    def __init__(self, tuned: Any, base: Any) -> None:
        self.tuned, self.base = tuned, base
        self.active = tuned

    @property
    def device(self) -> "torch.device":
        device: torch.device = self.tuned.device
        return device

    def get_decoder(self) -> Any:
        return self.active.get_decoder()

    def __call__(self, **inputs: Any) -> Any:
        return self.active(**inputs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.active = self.base
        try:
            yield
        finally:
            self.active = self.tuned


def load(device: "torch.device") -> Both:
    """Load the unquantized base twice, one of them with trainable weights; UserError if its files were changed."""
    checkpoint.require_intact(paths.QUANTIZED, contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts).sha256)
    tuned, base = (checkpoint.pretrained(paths.QUANTIZED, device).eval() for _ in range(2))
    base.requires_grad_(False)
    return Both(tuned.requires_grad_(True), base)
