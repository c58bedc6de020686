"""Quantization of the frozen base, through bitsandbytes: 4 bits (QLoRA, arXiv 2305.14314, section 3), or 8 bits for
weights and activations (LLM.int8(), arXiv 2208.07339).

The result is a checkpoint that transformers loads as it is. The cost of quantization is measured: bits per parameter,
the error of each layer's weights, and perplexity before and after. On a CPU, bitsandbytes quantizes activations only in
evaluation; in training, int8 layers compute with their weights' values and plain activations.
"""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import BaseFacts, QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.model import checkpoint, devices, loss, memory, packed, prompt, windows
from pipeline.model.memory import WINDOW
from pipeline.model.windows import Text, Tokens

if TYPE_CHECKING:
    import torch


def write_quantized(quantize: params.Quantize, runtime: params.Runtime) -> None:
    """Write `out/models/quantized` and its facts; with method none, the base as it is.

    UserError if the base has changed since it was fetched, or does not fit into memory.
    """
    device = devices.choose(runtime)
    facts = contracts.read(paths.BASE_FACTS, BaseFacts)
    checkpoint.require_intact(paths.BASE, facts.sha256)
    devices.require(device, facts.dtype)
    home = memory.require_quantizing(
        device, memory.Base.of(paths.BASE, facts.dtype, quantize.method, quantize.double_quantization)
    )
    if home != device:
        say(f"quantize: the base does not fit beside its quantized form on {device.type}: {home.type} computes it")
    tokenizer, length = checkpoint.tokenizer(paths.BASE), min(WINDOW, facts.context)
    ids = [window.ids for window in _windows(tokenizer, quantize.perplexity_tokens, length)]
    base = checkpoint.pretrained(paths.BASE, home)
    before = loss.perplexity(base, ids, "perplexity before")
    errors: dict[str, float] = {}
    if quantize.method == "none":
        shutil.copytree(paths.BASE, paths.QUANTIZED, dirs_exist_ok=True)
        after, bits = before, 8.0 * base.dtype.itemsize
    else:
        quantized = checkpoint.pretrained(paths.BASE, device, quantization_config=_config(quantize, base.dtype))
        errors, bits = _reconstruction(base, quantized)
        quantized.save_pretrained(paths.QUANTIZED)
        checkpoint.tokenizer(paths.BASE).save_pretrained(paths.QUANTIZED)
        packed.keep_unpacked(quantized)
        after = loss.perplexity(quantized, ids, "perplexity after")
    made = QuantizedFacts(
        method=quantize.method,
        double_quantization=quantize.double_quantization,
        bits_per_parameter=bits,
        quantized_layers=len(errors),
        layers=errors,
        perplexity_before=before,
        perplexity_after=after,
        perplexity_tokens=sum(len(window) - 1 for window in ids),
        perplexity_window=length,
        perplexity_bos=prompt.starts_with_bos(tokenizer),
        bytes=sum(path.stat().st_size for path in paths.QUANTIZED.glob("*.safetensors")),
        sha256=records.sha256_tree(paths.QUANTIZED),
        context=facts.context,
        dtype=facts.dtype,
        stop_ids=facts.stop_ids,
        int8_threshold=quantize.int8_threshold if quantize.method == "int8" else None,
        base_on=None if home == device else home.type,
    )
    contracts.write(paths.QUANTIZED_FACTS, made)
    say(
        f"quantize: {made.method}, {made.bits_per_parameter:.3f} bits a parameter in {made.quantized_layers} layers, "
        f"perplexity {before:.3f} -> {after:.3f}: {made.perplexity_read}"
    )


def _config(quantize: params.Quantize, dtype: "torch.dtype") -> Any:
    from transformers import BitsAndBytesConfig

    if quantize.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantize.int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize.method,
        bnb_4bit_use_double_quant=quantize.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _reconstruction(base: Any, quantized: Any) -> tuple[dict[str, float], float]:
    """Relative error |W - Q(W)| / |W| (Frobenius) of each layer, and the stored bits a parameter with the constants."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    def layers() -> Iterator[tuple[str, list["torch.Tensor"], "torch.Tensor"]]:
        """The name of each layer, what is stored of it, and its restored weight."""
        for name, layer in packed.linear4bit(quantized):
            weight, state = layer.weight.data, layer.weight.quant_state
            yield name, [weight, *_block_constants(state)], dequantize_4bit(weight, state)
        for name, layer in packed.linear8bit(quantized):
            # One constant for each row. The first forward pass moves them to the layer's state.
            weight, scale = layer.weight.data, layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
            yield name, [weight, scale], int8_vectorwise_dequant(weight, scale)

    errors: dict[str, float] = {}
    bits = parameters = 0
    for name, stored, restored in layers():
        exact = base.get_submodule(name).weight.data.float()
        errors[name] = float((exact - restored.float().to(exact.device)).norm() / exact.norm())
        bits += sum(8 * tensor.numel() * tensor.itemsize for tensor in stored)
        parameters += exact.numel()
    return errors, bits / parameters


def _block_constants(state: Any) -> list["torch.Tensor"]:
    """The constants of a 4-bit layer: one for each block of 64, quantized in blocks of 256 or not."""
    return [state.absmax, state.state2.absmax, state.offset] if state.nested else [state.absmax]


def _windows(tokenizer: Any, tokens: int, length: int) -> list[Tokens]:
    """Windows of the validation sources, each source once, with `tokens` to predict, or fewer if there is less text.

    Sources of a single token predict nothing. If all are, they are read as the lines of one text. UserError if even
    these are one token.
    """
    rows = records.read_rows(paths.split("validation"), records.Example)
    sources = list(dict.fromkeys(row.source for row in rows))
    texts = [Text(str(number), source) for number, source in enumerate(sources)]
    lines = [Text("", "".join(f"{source}\n" for source in sources))]
    if found := windows.cut(tokenizer, texts, tokens, length) or windows.cut(tokenizer, lines, tokens, length):
        return found
    raise UserError(
        f"the sources in {paths.split('validation')} are one token in all, too few to measure perplexity: name more "
        "validation rows"
    )
