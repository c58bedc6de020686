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

GGUF_FAMILIES = ("llama", "qwen2", "qwen3")
"""Families that are read from GGUF: of the others transformers reads none, or leaves out what changes their results."""

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
"""Decoder-only families whose layers are the ones of LLaMA, or differ from them in details that are computed here too.

Of each, tests/test_families.py makes a small random model and compares, in float32, with transformers and PEFT as they
come: the loss and the adapter's gradients of a packed batch, the texts of greedy decoding, and the logits of the saved
adapter; with tied embeddings and untied ones, from safetensors in one file or several, after NF4 quantization as well.
A sliding window (Mistral, Qwen, Gemma 3, Phi 3) and the change of frequencies of longrope (Phi 3) end the context.
"""


def fetch(model: params.Model) -> None:
    """Bring the model to `out/models/base` as safetensors in `model.dtype`, and its facts beside it.

    UserError when the source is not a causal language model of a known family, or has no usable tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    devices.quieten()
    with source.resolved(model.source, model.sha256, kind="model", key="model") as found, _gguf_read_once():
        where, weights = _load_options(found, model.source)
        say(f"fetch: reading {model.source}")
        try:
            loaded, reading = AutoModelForCausalLM.from_pretrained(
                dtype=getattr(torch, model.dtype), output_loading_info=True, **where, **weights
            )
        except RuntimeError:  # transformers has printed which of its tensors
            raise UserError(
                f"model.source = {model.source!r}: its weights do not fit its configuration; name a sound checkpoint"
            ) from None
        if found.is_file():
            _check_gguf_is_whole(found, loaded, model.source)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    if absent := sorted(reading["missing_keys"]):
        raise UserError(
            f"model.source = {model.source!r} lacks {len(absent)} of the model's tensors, such as {absent[0]}: they "
            f"would be random; name a complete checkpoint"
        )
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


def _load_options(found: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `from_pretrained` for a GGUF file or a folder: where it is, and how its weights are read.

    UserError for what cannot be loaded, or would compute other numbers than it is meant to.
    """
    from transformers import GgufConfig

    if found.is_file():
        if found.suffix.lower() != ".gguf":
            raise UserError(f"model.source = {name!r}: a model is a folder in the Hugging Face layout or a .gguf file")
        _check_gguf(found, name)
        # dequantize: without it the weights stay packed, and cannot be saved as safetensors.
        return (
            {"pretrained_model_name_or_path": found.parent, "gguf_file": found.name},
            {"quantization_config": GgufConfig(dequantize=True)},
        )
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
    if config.get("use_bidirectional_attention") or not config.get("is_causal", True):
        raise UserError(f"model.source = {name!r} attends to what follows a token as well: it cannot write one by one")
    if (found / "adapter_config.json").exists():
        raise UserError(
            f"model.source = {name!r} holds an adapter beside the model (adapter_config.json): merge it into the model "
            f"first, or remove it"
        )
    _check_weights(found, config, name)
    return {"pretrained_model_name_or_path": found, "local_files_only": True}, {"use_safetensors": True}


def _check_weights(found: Path, config: dict[str, Any], name: str) -> None:
    """UserError unless all weights are in safetensors: other formats are pickles, which can run code when read."""
    single, index = found / "model.safetensors", found / "model.safetensors.index.json"
    files = [single.name] if single.is_file() else []
    if not files and index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"model.source = {name!r}: its {index.name} lists no weights ({error!r})") from None
    # A configuration may name a weights file of its own.
    files += filter(None, [config.get("transformers_weights")])
    other = [file for file in files if not file.endswith((".safetensors", ".safetensors.index.json"))]
    if not files or other:
        raise UserError(
            f"model.source = {name!r} holds no weights in safetensors (it has {', '.join(other) or _listing(found)}); "
            f"pickled weights (.bin, .pt) can run code when they are read, so they never are. Where you trust them: "
            f"AutoModelForCausalLM.from_pretrained(<folder>).save_pretrained(<new folder>), and copy the tokenizer"
        )
    missing = [file for file in files if not (found / file).is_file()]
    if missing:
        raise UserError(f"model.source = {name!r}: {index.name} lists {missing[0]}, which is not there")


def _check_gguf(found: Path, name: str) -> None:
    """UserError for a GGUF file that is damaged, of another family, or says what transformers does not read."""
    import gguf

    try:
        reader = gguf.GGUFReader(str(found))
        family = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"model.source = {name!r} is not a sound GGUF file ({error!r})") from None
    instead = "name the checkpoint in the Hugging Face layout instead"
    if family not in GGUF_FAMILIES:
        raise UserError(
            f"model.source = {name!r}: a GGUF file of architecture {family!r} cannot be read faithfully, only of "
            f"{', '.join(GGUF_FAMILIES)}; {instead}"
        )
    scaling = reader.fields.get(f"{family}.rope.scaling.type")
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if factors or (scaling and scaling.contents() != "none"):
        raise UserError(
            f"model.source = {name!r} scales its rotary embedding ({', '.join(factors) or scaling.contents()}), which "
            f"transformers does not read from GGUF files; {instead}"
        )


def _check_gguf_is_whole(found: Path, loaded: Any, name: str) -> None:
    """UserError unless the model has as many numbers as the file: transformers skips tensors that it does not know."""
    import gguf

    held = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(found)).tensors)
    taken = sum(parameter.numel() for parameter in loaded.parameters())
    if held != taken:
        raise UserError(
            f"model.source = {name!r} holds {held:,} numbers, of which transformers makes a model of {taken:,}: name "
            f"the checkpoint in the Hugging Face layout instead"
        )


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
