"""Full fine-tuning: every weight of the unquantized base is trained, beside a copy of it that stays what it was.

For `pipeline.lora.train.Trainer`, which trains what requires a gradient: masters, gradients' sums and AdamW's moments
in
float32, forward and backward pass in the model's dtype. The layers are transformers' own: those of
`pipeline.model.fused`
give no gradient to weights.
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
    """The tuned model and its base, in the form of an adapted one: within `disable_adapter()` it is the base."""

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
    """The unquantized base twice, all weights of one trainable; UserError when it is not what was written."""
    checkpoint.require_intact(paths.QUANTIZED, contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts).sha256)
    tuned, base = (checkpoint.pretrained(paths.QUANTIZED, device).eval() for _ in range(2))
    base.requires_grad_(False)
    return Both(tuned.requires_grad_(True), base)
