"""Claims about bits per parameter: in QLoRA's 4-bit blocks (arXiv 2305.14314, section 3), and in llama.cpp's types."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from claims import evidence, lab, resampling
from claims.evidence import Evidence
from pipeline.core import params, records
from pipeline.core.progress import bar
from pipeline.core.records import Example
from pipeline.model import checkpoint, devices, fused, loss, pack
from pipeline.model.prompt import Row, plain_ids
from pipeline.score.significance import Floats, Interval

BLOCK = 64
"""Values that share a constant in QLoRA (section 3)."""
TABLES = ("quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4")
"""Tables whose size does not depend on the layer: the levels of the code, and the kind of the layer, as text."""
GGUF_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_0")
LLAMA_65B = {"layers": 80, "width": 8192, "feed_forward": 22_016, "words": 32_000}
FULL_BYTES = 2 + 2 + 8
"""Bytes per parameter in full fine-tuning: 16-bit weight and gradient, two 32-bit moments (QLoRA, section 1)."""
ADAPTER_RANK = 64
SEED = 17


def nf4() -> Evidence:
    """The bits in the quantized base's file, and in the same layers without double quantization."""
    double = lab.quantized("nf4") / "model.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder) / "single.safetensors"
        base, layers = lab.BASE / "model.safetensors", quantized_layers(double)
        write_single(base, layers, single)
        parameters = count(base, layers)
        values: dict[str, evidence.Value] = {}
        for name, file in (("nf4", single), ("nf4_double", double)):
            values |= {f"{name}_{part}": bits for part, bits in stored(file, parameters).items()}
    values["saved_bits"] = values["nf4_bits"] - values["nf4_double_bits"]  # type: ignore[operator]
    values |= memory_65b(values["nf4_double_bits"])  # type: ignore[arg-type]
    return Evidence(
        values,
        [
            "Bits a parameter of the quantized layers, as serialized: packed values and blocks' constants. Beside them "
            "a layer stores tables of a fixed size (..._tables_bits), which its number of parameters does not enter.",
            "llama_65b_...: weights, gradients and optimizer's states in GB of 10^9 bytes, computed from shapes. Full: "
            "12 bytes a parameter. QLoRA: linear layers by the bits measured here, embeddings in 16 bits, and "
            f"12 bytes a parameter of an adapter of rank {ADAPTER_RANK} on all linear layers. Activations are left out "
            "of both.",
        ],
    )


def quantized_layers(file: Path) -> list[str]:
    """The names of the weights that a file holds in 4 bits."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        return sorted(name.removesuffix(".absmax") for name in content.keys() if name.endswith("weight.absmax"))  # noqa: SIM118


def write_single(base: Path, layers: Sequence[str], file: Path) -> None:
    """Write some of a base's weights in NF4 to `file` as bitsandbytes does, without quantizing their constants."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    with safe_open(base, framework="pt") as content:
        for name in layers:
            packed, state = quantize_4bit(
                content.get_tensor(name), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
            )
            tensors |= {name: packed} | {
                f"{name}.{part}": part_of for part, part_of in state.as_dict(packed=True).items()
            }
    save_file(tensors, file)


def count(base: Path, layers: Sequence[str]) -> int:
    """The number of parameters in some of a base's weights, before they are packed."""
    from safetensors import safe_open

    with safe_open(base, framework="pt") as content:
        return sum(math.prod(content.get_slice(name).get_shape()) for name in layers)


def stored(file: Path, parameters: int) -> dict[str, float]:
    """Bits per parameter in a file's 4-bit layers: without the tables, of the blocks' constants, and of the tables."""
    from safetensors import safe_open

    layers = quantized_layers(file)
    sizes = {"values": 0, "constants": 0, "tables": 0}
    with safe_open(file, framework="pt") as content:
        for name in content.keys():  # noqa: SIM118
            layer = next((one for one in (name, name.rpartition(".weight.")[0] + ".weight") if one in layers), None)
            if layer is not None:
                tensor = content.get_tensor(name)
                part = name.removeprefix(f"{layer}.")
                kind = "values" if name == layer else "tables" if part in TABLES else "constants"
                sizes[kind] += tensor.nbytes
    bits = {kind: 8 * size / parameters for kind, size in sizes.items()}
    return {
        "bits": bits["values"] + bits["constants"],
        "constants_bits": bits["constants"],
        "tables_bits": bits["tables"],
    }


def memory_65b(bits: float) -> dict[str, float]:
    """Memory in GB of fine-tuning the largest LLaMA, in full and by QLoRA, with `bits` per quantized parameter."""
    layers, width, wide = LLAMA_65B["layers"], LLAMA_65B["width"], LLAMA_65B["feed_forward"]
    linear = layers * (4 * width * width + 3 * width * wide)
    embedded = 2 * LLAMA_65B["words"] * width
    adapter = layers * ADAPTER_RANK * (4 * (width + width) + 3 * (width + wide))
    return {
        "llama_65b_full_gb": FULL_BYTES * (linear + embedded) / 1e9,
        "llama_65b_qlora_gb": (bits / 8 * linear + 2 * embedded + FULL_BYTES * adapter) / 1e9,
    }


def gguf() -> Evidence:
    """The base's linear layers in each of llama.cpp's types: bits per parameter, errors, and perplexity."""
    from gguf import GGMLQuantizationType, quants

    experiment = lab.experiment()
    device = devices.choose(experiment.runtime)
    model = checkpoint.pretrained(lab.BASE, device)
    linear = checkpoint.linear_layers(model)
    exact = {
        name: layer.weight.data.float().cpu().numpy().copy()
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in linear
    }
    parameters = sum(weight.size for weight in exact.values())
    fused.apply(model)
    tokenizer = checkpoint.tokenizer(lab.BASE)
    rows = records.read_rows(lab.data("default") / "validation.jsonl", Example)
    texts = [plain_ids(tokenizer, text) for text in dict.fromkeys(row.source for row in rows)]
    counts_n = np.array([len(text) - 1 for text in texts], np.float64)
    losses = {"base": text_losses(model, texts, "base")}
    values: dict[str, evidence.Value] = {"base_perplexity": perplexity(losses["base"], counts_n)}
    for name, better in zip(GGUF_TYPES, ("base", *GGUF_TYPES), strict=False):
        kind, label, size, sums_3 = GGMLQuantizationType[name], name.lower(), 0, np.zeros(3)
        for layer, weight in exact.items():
            blocks = quants.quantize(weight, kind)
            restored = quants.dequantize(blocks, kind)
            size += blocks.nbytes
            sums_3 += products(weight, restored)
            # In place, since a fused layer holds the weights of several layers in one tensor.
            model.get_submodule(layer).weight.data.copy_(torch.from_numpy(restored))
        losses[name] = text_losses(model, texts, name)
        values[f"{label}_bits"] = 8 * size / parameters
        values |= errors(label, sums_3)
        values[f"{label}_perplexity"] = perplexity(losses[name], counts_n)
        values[f"{label}_over_{better.lower()}_percent"] = rise(
            losses[name] - losses[better], counts_n, experiment.compare
        )
    draw = np.random.Generator(np.random.PCG64(SEED))
    blurs = {layer: blurred(weight, draw) for layer, weight in exact.items()}
    for name in ("Q5_1", "Q5_0"):
        kind, sums_3 = GGMLQuantizationType[name], np.zeros(3)
        for weight in blurs.values():
            sums_3 += products(weight, quants.dequantize(quants.quantize(weight, kind), kind))
        values |= errors(f"{name.lower()}_blurred", sums_3)
    return Evidence(
        values,
        [
            f"{len(texts)} abstracts, {int(counts_n.sum()):,} tokens. ..._over_..._percent: by how much perplexity is "
            "higher than under the type before, with its interval by a paired bootstrap over abstracts.",
            "..._error_percent: what is lost of the weights, relative to them (Frobenius); ..._gain_percent: by how "
            "much they grow on the whole. Q5_1 has 31 steps a block where the base, Q4_1, has 15: two and a fifteenth "
            "for one, so that rounding pushes values outward, the more the smaller they are, and errors do not cancel. "
            "With the base's steps blurred (..._blurred_...: each value moved by up to half a step) Q5_1 loses less "
            "than Q5_0.",
        ],
    )


def products(weight: Any, restored: Any) -> Floats:
    """The dot products w w, e e and e w of a layer's weights w and their error e by quantization."""
    exact, error = weight.ravel().astype(np.float64), (restored - weight).ravel().astype(np.float64)
    return np.array([exact @ exact, error @ error, error @ exact])


def errors(label: str, sums_3: Floats) -> dict[str, float]:
    """The relative error and the growth of the weights in percent, from the sums of `products`."""
    squares, lost, gained = sums_3.tolist()
    return {f"{label}_error_percent": 100 * (lost / squares) ** 0.5, f"{label}_gain_percent": 100 * gained / squares}


def blurred(weight: Any, draw: np.random.Generator) -> Any:
    """Values moved at random by up to half a step of Q4_1, which has 15 between the ends of a block of 32."""
    blocks_nx32 = weight.reshape(-1, 32)
    step_nx1 = np.ptp(blocks_nx32, axis=1, keepdims=True) / 15
    return (blocks_nx32 + step_nx1 * (draw.random(blocks_nx32.shape, np.float32) - 0.5)).reshape(weight.shape)


def text_losses(model: Any, texts: Sequence[list[int]], label: str) -> Floats:
    """The negative log-likelihood of each text, summed over all tokens but the first, in nats."""
    found = []
    with torch.no_grad(), bar(f"perplexity, {label}", sum(map(len, texts)), "tokens") as advance:
        for text in texts:
            packed = pack.pack([pack.tree([Row("", "", text[:1], text[1:])])], model.device)
            found.append(float(loss.summed(model, packed)))
            advance(len(text))
    return np.array(found)


def perplexity(losses_n: Floats, counts_n: Floats) -> float:
    return math.exp(losses_n.sum() / counts_n.sum())


def rise(differences_n: Floats, counts_n: Floats, given: params.Compare) -> Interval:
    """The rise of perplexity in percent, with its interval, if the texts' losses differ by `differences_n`."""
    value = 100 * math.expm1(differences_n.sum() / counts_n.sum())
    columns_nx2 = np.column_stack([differences_n, counts_n])
    texts = range(len(counts_n))
    return resampling.over_texts(
        value, columns_nx2, texts, lambda sums_bx2, _: 100 * np.expm1(sums_bx2[:, 0] / sums_bx2[:, 1]), given
    )


if __name__ == "__main__":
    evidence.main({"nf4-bits": nf4, "gguf-bits": gguf})
