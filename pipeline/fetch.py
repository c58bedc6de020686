"""Fetching the base model: any source becomes one checkpoint, in safetensors, with its tokenizer and its facts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import device as devices
from pipeline import model as models
from pipeline import params, paths, records, source
from pipeline.errors import UserError
from pipeline.progress import say

# Decoder-only families whose layers are the ones of LLaMA, or differ from them in details that PEFT knows.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma3_text",
    "smollm3",
    "phi3",
    "granite",
    "olmo2",
)


def fetch(model: params.Model) -> None:
    """Bring the model to `out/models/base` as safetensors in `model.dtype`, and its facts beside it.

    UserError when the source is not a causal language model of a known family, or has no usable tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    devices.quieten()
    with source.resolved(model.source, model.sha256, kind="model", key="model") as found:
        options = _load_options(found, model.source)
        say(f"fetch: reading {model.source}")
        with _gguf_read_once():
            loaded = AutoModelForCausalLM.from_pretrained(dtype=getattr(torch, model.dtype), **options)
            options.pop("quantization_config", None)
            tokenizer = AutoTokenizer.from_pretrained(**options)
    loaded.to(getattr(torch, model.dtype))
    _check_tokenizer(tokenizer, loaded)
    # Where it was read from is in the facts; in the checkpoint it would be a path of this machine.
    loaded.config._name_or_path = tokenizer.name_or_path = ""
    loaded.save_pretrained(paths.BASE)
    tokenizer.save_pretrained(paths.BASE)
    facts = {**models.architecture(loaded), "source": model.source, "sha256": records.sha256_tree(paths.BASE)}
    records.write_json(paths.BASE_FACTS, facts)
    cache = f"{facts['kv_bytes_per_token']:,} bytes of keys and values a token"
    say(f"fetch: {facts['family']}, {facts['parameters']:,} parameters, {cache}")


def _load_options(found: Path, name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a GGUF file or a folder; UserError for what cannot be loaded."""
    from transformers import GgufConfig

    if found.is_file():
        if found.suffix.lower() != ".gguf":
            raise UserError(f"model.source = {name!r}: a model is a folder in the Hugging Face layout or a .gguf file")
        # dequantize: without it the weights stay packed, and cannot be saved as safetensors.
        return {
            "pretrained_model_name_or_path": found.parent,
            "gguf_file": found.name,
            "quantization_config": GgufConfig(dequantize=True),
        }
    config_file = found / "config.json"
    if not config_file.is_file():
        raise UserError(f"model.source = {name!r}: no config.json in this folder; it has {_listing(found)}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.source = {name!r}: its config.json is not JSON ({error})") from None
    family, architectures = config.get("model_type"), config.get("architectures") or []
    if family not in FAMILIES or not all(kind.endswith("ForCausalLM") for kind in architectures):
        raise UserError(
            f"model.source = {name!r} is not a causal language model of a known family: model_type {family!r}, "
            f"architectures {architectures}; known: {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config"):
        raise UserError(f"model.source = {name!r} is quantized already: name the unquantized checkpoint instead")
    return {"pretrained_model_name_or_path": found, "local_files_only": True}


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers parses a GGUF file's header three times, and asks for the table of names once a module: seconds."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def _check_tokenizer(tokenizer: Any, model: Any) -> None:
    # Tokens that were added to the vocabulary do not count: reading a GGUF file may add one that is never used.
    embedded = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > embedded:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model embeds only {embedded}: "
            f"model.source mixes two models"
        )


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
