"""The cost of quantization in perplexity, on text that the model is not tuned for: the first plain probe of forgetting.

All forms of the model read the same windows, which are whole, so that none is padded. Two forms are compared by the
ratio of their perplexities: exp of the mean difference of their losses. Its interval is a paired bootstrap over texts:
a resample takes all windows of a text, in both forms. Nothing is trained, so there are no seeds.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from claims import evidence, lab, resampling
from claims.evidence import Evidence
from pipeline import probes
from pipeline.commands import use
from pipeline.core import contracts, params
from pipeline.core.errors import UserError
from pipeline.core.progress import bar
from pipeline.model import checkpoint, devices, prompt, windows
from pipeline.score.significance import Floats, Interval

if TYPE_CHECKING:
    import torch

WINDOW = 128
WINDOWS = 128
TOGETHER = 4
"""Windows computed at once. LLM.int8() finds outliers, and absmax the largest value, among all their tokens."""
BLOCK = 64
"""Weights that share one constant (QLoRA, section 3)."""
INT8 = 127
NO_OUTLIERS = (
    "no activation of a linear layer reaches the threshold of outliers ({threshold:g}), so that LLM.int8() leaves "
    "nothing in 16 bits and is one constant a row and a column"
)
INT4 = [code / 7 for code in range(-7, 8)]
"""Symmetric integers, as fractions of the largest one."""
E2M1 = sorted({sign * code / 6 for code in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (-1, 1)})
"""Floating point with two bits of exponent and one of mantissa; bitsandbytes' fp4 has 0.0052 in place of 0.0833."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Windows of text, and the losses of each form of the model that has read them, in nats per window."""

    ids_nxW: "torch.Tensor"
    texts: list[str]
    losses: dict[str, Floats]
    compare: params.Compare
    bos: bool

    def read(self, name: str, model: Any) -> None:
        """Measure the losses of a form of the model."""
        import torch

        losses: list[float] = []
        with torch.no_grad(), bar(name, len(self.ids_nxW), "windows") as advance:
            for ids_BxW in self.ids_nxW.split(TOGETHER):
                logits_NxV = model(ids_BxW, use_cache=False).logits[:, :-1].flatten(0, 1)
                targets_N = ids_BxW[:, 1:].flatten()
                nats_N = torch.nn.functional.cross_entropy(logits_NxV.float(), targets_N, reduction="none")
                losses += nats_N.double().unflatten(0, (len(ids_BxW), -1)).sum(-1).tolist()
                advance(len(ids_BxW))
        self.losses[name] = np.array(losses)

    def ratio(self, here: str, there: str | None = None) -> Interval:
        """The perplexity of a form, or its ratio to that of another, with its interval."""
        nats_n = self.losses[here] - (self.losses[there] if there else 0.0)
        tokens = self.ids_nxW.shape[1] - 1
        return resampling.over_texts(
            math.exp(nats_n.mean() / tokens),
            nats_n[:, None],
            self.texts,
            lambda sums_bx1, windows_b: np.exp(sums_bx1[:, 0] / (windows_b * tokens)),
            self.compare,
        )

    @property
    def note(self) -> str:
        return (
            f"{self.ids_nxW.shape[0]} {contracts.windows_read(self.ids_nxW.shape[1], self.bos)}, of "
            f"{len(set(self.texts))} texts; "
            f"intervals of {self.compare.confidence:.0%}: paired bootstrap over texts."
        )


def _reading(experiment: params.Params, device: "torch.device") -> Reading:
    import torch

    probe = lab.general_text(experiment)
    tokenizer, texts = checkpoint.tokenizer(lab.BASE), probes.texts(probe)
    enough = 4 * WINDOWS * WINDOW  # more than needed: windows at the ends of texts are shorter, and left out
    whole = [one for one in windows.cut(tokenizer, texts, enough, WINDOW) if len(one.ids) == WINDOW][:WINDOWS]
    if len(whole) < WINDOWS:
        raise UserError(
            f"{probe.at}.source = {probe.source!r} holds {len(whole):,} whole windows of {WINDOW} tokens, not "
            f"{WINDOWS:,}: name more text in {use.DEFAULT}"
        )
    ids_nxW = torch.tensor([one.ids for one in whole], device=device)
    bos = prompt.starts_with_bos(tokenizer)
    return Reading(ids_nxW, [one.place for one in whole], {}, experiment.compare, bos)


def llm_int8() -> Evidence:
    """Weights and activations in 8 bits, with one constant for a tensor, for each row of activations, or for each row
    and each column; and the last with outlier columns left unquantized (LLM.int8(), arXiv 2208.07339, sections 2.1
    and 3)."""
    from transformers import BitsAndBytesConfig

    experiment = lab.experiment()
    device, threshold = devices.choose(experiment.runtime), experiment.quantize.int8_threshold
    reading = _reading(experiment, device)
    model = checkpoint.pretrained(lab.BASE, device)
    reading.read("float", model)
    for name, row, column in (("absmax", False, False), ("row_wise", True, False), ("vector_wise", True, True)):
        for layer in _layers(model):
            layer.forward = int8_forward(layer.weight, row, column)
        reading.read(name, model)
    del model
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    model = checkpoint.pretrained(lab.BASE, device, quantization_config=config)
    seen = count_outliers(_layers(model), threshold)
    reading.read("llm_int8", model)
    return Evidence(
        {
            **{f"{name}_ppl": reading.ratio(name) for name in reading.losses},
            "outlier_columns_percent": 100 * seen["outliers"] / seen["columns"],
            "absmax_over_float": reading.ratio("absmax", "float"),
            "absmax_over_row_wise": reading.ratio("absmax", "row_wise"),
            "absmax_over_vector_wise": reading.ratio("absmax", "vector_wise"),
            "row_wise_over_llm_int8": reading.ratio("row_wise", "llm_int8"),
            "vector_wise_over_llm_int8": reading.ratio("vector_wise", "llm_int8"),
            "llm_int8_over_float": reading.ratio("llm_int8", "float"),
        },
        [
            reading.note,
            "outlier_columns_percent: of the columns of activations that linear layers were given, those that "
            f"LLM.int8() left in 16 bits, since a value in them reached {threshold:g}.",
        ],
        not_comparable=None if seen["outliers"] else NO_OUTLIERS.format(threshold=threshold),
    )


def count_outliers(layers: "Iterable[Any]", threshold: float) -> dict[str, int]:
    """Count, from now on, the columns of activations, and those that bitsandbytes leaves unquantized: a value among
    the tokens computed together reaches the threshold (LLM.int8(), section 3.2). With threshold 0 it leaves none."""
    seen = {"outliers": 0, "columns": 0}

    def count(_layer: Any, given: "tuple[torch.Tensor, ...]") -> None:
        largest_C = given[0].flatten(0, -2).abs().amax(0)
        seen["outliers"] += int((largest_C >= (threshold or math.inf)).sum())
        seen["columns"] += len(largest_C)

    for layer in layers:
        layer.register_forward_pre_hook(count)
    return seen


def int8_forward(weight_OxC: "torch.Tensor", row: bool, column: bool) -> "Callable[[torch.Tensor], torch.Tensor]":
    """A linear layer in 8 bits (absmax, LLM.int8(), section 2.1), rounded and multiplied as integers. With `row`, each
    token's activations have their own constant, and with `column`, each output's weights; else all share one."""
    from bitsandbytes.functional import int8_linear_matmul

    weight, weight_scale = _int8(weight_OxC, column)

    def forward(x: "torch.Tensor") -> "torch.Tensor":
        rounded, scale = _int8(x.flatten(0, -2), row)
        product = int8_linear_matmul(rounded, weight).float() * scale * weight_scale.T
        output: torch.Tensor = product.to(x.dtype).unflatten(0, x.shape[:-1])
        return output

    return forward


def _int8(values: "torch.Tensor", by_row: bool) -> "tuple[torch.Tensor, torch.Tensor]":
    """The values as integers, and the scale of each row (a column of numbers), or one scale for all."""
    import torch

    values = values.float()
    largest = values.abs().amax(-1, keepdim=True) if by_row else values.abs().max().reshape(1, 1)
    scale = largest.clamp_min(torch.finfo(torch.float32).tiny) / INT8
    return (values / scale).round().to(torch.int8), scale


def nf4_beats_fp4() -> Evidence:
    """Weights in 4 bits, in blocks of 64: NF4 with and without double quantization, FP4, and symmetric integers."""
    import torch

    experiment = lab.experiment()
    device = devices.choose(experiment.runtime)
    reading = _reading(experiment, device)
    model = checkpoint.pretrained(lab.BASE, device)
    reading.read("float", model)
    exact = {layer: layer.weight.data for layer in _layers(model)}
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nf4": lambda weight: bitsandbytes_4bit(weight, "nf4", double=False),
        "nf4_double": lambda weight: bitsandbytes_4bit(weight, "nf4", double=True),
        "fp4": lambda weight: bitsandbytes_4bit(weight, "fp4", double=False),
        "fp4_e2m1": lambda weight: nearest(weight, E2M1),
        "int4": lambda weight: nearest(weight, INT4),
    }
    for name, rounded in forms.items():
        for layer, weight in exact.items():
            layer.weight.data = rounded(weight).to(weight.dtype)
        reading.read(name, model)
    return Evidence(
        {
            **{f"{name}_ppl": reading.ratio(name) for name in reading.losses},
            "nf4_over_fp4": reading.ratio("nf4", "fp4"),
            "nf4_over_fp4_e2m1": reading.ratio("nf4", "fp4_e2m1"),
            "nf4_over_int4": reading.ratio("nf4", "int4"),
            "double_over_nf4": reading.ratio("nf4_double", "nf4"),
        },
        [
            reading.note,
            "The base is a dequantized Q4_1 file: each block of 32 weights lies on 16 evenly spaced values, which "
            "favours evenly spaced codes (int4) over those of NF4 and FP4.",
            "fp4 is bitsandbytes' table; fp4_e2m1 is the paper's type, which differs from it in the smallest value.",
        ],
    )


def bitsandbytes_4bit(weight: "torch.Tensor", kind: str, double: bool) -> "torch.Tensor":
    """A layer's weights after quantization by bitsandbytes, as in the stage `quantize`."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double, quant_type=kind)
    found: torch.Tensor = dequantize_4bit(packed, state)
    return found


def nearest(weight: "torch.Tensor", codes: list[float]) -> "torch.Tensor":
    """Each weight rounded to the nearest of `codes` (in ascending order) times the largest magnitude in its block."""
    import torch

    blocks = weight.float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    table = torch.tensor(codes, device=weight.device)
    index = torch.bucketize(blocks / largest, (table[1:] + table[:-1]) / 2)
    return (table[index] * largest).reshape(weight.shape)


def _layers(model: Any) -> Iterable[Any]:
    """The linear layers that quantization changes: all except the head."""
    names = checkpoint.linear_layers(model)
    return [layer for name, layer in model.named_modules() if name.rpartition(".")[2] in names]


if __name__ == "__main__":
    evidence.main({"llm-int8": llm_int8, "nf4-beats-fp4": nf4_beats_fp4})
