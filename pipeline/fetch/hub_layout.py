"""A folder in the Hugging Face layout, checked before transformers reads it: its family, its weights, their sizes.

transformers builds a model by its configuration, at any size, before it reads a weight, and makes up weights that are
missing. So the configuration is compared with the headers of the weight files first.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pipeline.fetch import contradictions
from pipeline.fetch.unfit import UnfitError, require_content, require_few_layers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "smollm3", "phi3", "granite", "olmo2")
"""Decoder-only families whose layers are LLaMA's, or differ from them in details that are computed here too.

For each, tests/test_families.py makes a small random model and compares, in float32, with unchanged transformers and
PEFT: the loss and the adapter's gradients of a packed batch, the texts of greedy decoding, and the logits of the saved
adapter; with tied and untied embeddings, from one safetensors file and several, and after NF4 quantization. The context
ends at a sliding window (Mistral, Qwen, Gemma 3, Phi 3) and where longrope changes its frequencies (Phi 3).
"""

PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
"""transformers' names of several files. Copies of the weights under other names may lie beside them."""


TYPICAL: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma": {
        "max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "max_position_embeddings": 131_072, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
    "smollm3": {"max_position_embeddings": 32_768, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    "granite": {"max_position_embeddings": 2048},
    "olmo2": {"max_position_embeddings": 2048},
}  # fmt: skip
"""What transformers assumes where a config.json leaves it out. tests/fetch/test_glance.py compares each."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A folder's configuration, completed by what transformers assumes, and the shape and file of each tensor.

    In `config`, `tie_word_embeddings` says what the files hold: a stored head is one of its own.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, str]


def seen(folder: Path) -> Seen:
    """What the configuration and the headers of the weights say; UnfitError for a folder that must not be loaded."""
    require_content(path for path in sorted(folder.iterdir()) if path.is_file() and _is_read(path))
    config = _config(folder)
    listed: dict[str, set[str]] = {}
    files = _weight_files(folder, config, listed)
    require_content(folder / file for file in dict.fromkeys([*files, *listed]))
    held = {file: _shapes(folder, file) for file in dict.fromkeys([*files, *listed])}
    _require_indexed(folder, listed, held)
    shapes = {tensor: shape for tensors in held.values() for tensor, shape in tensors.items()}
    _require_its_layers(config, shapes)
    full = completed(config)
    contradictions.require_one_rotation(config)
    contradictions.require_announced_shapes(full, shapes)
    contradictions.require_head(full, shapes)
    full["tie_word_embeddings"] = contradictions.HEAD not in shapes or not contradictions.embedding(shapes)
    return Seen(full, shapes, {tensor: file for file, tensors in held.items() for tensor in tensors})


def is_tied(folder: Path) -> bool:
    """Whether `fetch` will write one tensor for the embedding and the head."""
    from safetensors import safe_open

    found = seen(folder)
    embedding, head = contradictions.embedding(found.shapes), contradictions.HEAD
    if found.config["tie_word_embeddings"]:
        return True
    if embedding is None or not completed(_config(folder)).get("tie_word_embeddings"):
        return False
    tensors = []
    for name in (embedding, head):
        with safe_open(folder / found.files[name], framework="pt") as opened:
            tensors.append(opened.get_tensor(name))
    return tensors[0].dtype == tensors[1].dtype and bool((tensors[0] == tensors[1]).all())


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what transformers assumes where it says nothing, and rope's settings by their newer names."""
    full = TYPICAL[config["model_type"]] | config
    rotation = full.get("rope_scaling") or full.get("rope_parameters") or {}
    full["rope_parameters"] = rotation
    if isinstance(rotation, dict):
        kind = rotation.get("rope_type", rotation.get("type"))
        first = rotation.get("original_max_position_embeddings", full["max_position_embeddings"])
        if full["model_type"] == "phi3" and kind is not None:
            kind = "default" if kind == "default" else "longrope"
            first = full["original_max_position_embeddings"]
        full["rope_parameters"] = rotation | {"rope_type": kind, "original_max_position_embeddings": first}
    return full


def _config(folder: Path) -> dict[str, Any]:
    """The configuration; UnfitError for a model that cannot be computed, or is not a whole unquantized model."""
    file = folder / "config.json"
    if not file.is_file():
        raise UnfitError(f"no config.json in this folder; it has {_listing(folder)}")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        family, architectures = config.get("model_type"), [str(one) for one in config.get("architectures") or []]
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise UnfitError(f"its config.json is not a configuration in JSON ({error})") from None
    if family not in FAMILIES or not all(kind.endswith("ForCausalLM") for kind in architectures):
        raise UnfitError(
            f"it is not a causal language model of a known family: model_type {family!r}, architectures "
            f"{architectures}; known: {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config"):
        raise UnfitError("it is quantized already: name the unquantized checkpoint instead")
    if config.get("use_bidirectional_attention") or not config.get("is_causal", True):
        raise UnfitError("its tokens attend to those that follow as well: it cannot write one by one")
    if (folder / "adapter_config.json").exists():
        raise UnfitError(
            "it holds an adapter beside the model (adapter_config.json): merge it into the model first, or remove it"
        )
    return config


def _weight_files(folder: Path, config: dict[str, Any], listed: dict[str, set[str]]) -> list[str]:
    """The files of the weights; `listed` is filled with the tensors of each file that an index names.

    UnfitError unless all are in safetensors and in this folder. Others are pickles, which can run code when read.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise UnfitError(
            f"it holds {single.name} and {index.name}, two sets of weights: remove the one that is not meant"
        )
    # A configuration may name its own weights file.
    files = [str(config["transformers_weights"])] if config.get("transformers_weights") else []
    files += [single.name] if single.is_file() else [index.name] if index.is_file() else []
    for each in [folder / file for file in files if file.endswith(".index.json") and _is_within(file)]:
        try:
            for tensor, file in json.loads(each.read_text(encoding="utf-8"))["weight_map"].items():
                listed.setdefault(str(file), set()).add(str(tensor))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UnfitError(f"its {each.name} lists no weights ({error!r})") from None
    files += sorted(listed)
    if not files and (parts := sorted(path.name for path in folder.iterdir() if PART.fullmatch(path.name))):
        raise UnfitError(f"it holds {parts[0]} and no {index.name}, which says what belongs together: add it")
    other = [file for file in files if not file.endswith((".safetensors", ".safetensors.index.json"))]
    if not files or other:
        raise UnfitError(
            f"it holds no weights in safetensors (it has {', '.join(other) or _listing(folder)}); pickled weights "
            "(.bin, .pt) can run code when they are read, so they never are. Where you trust them: "
            "AutoModelForCausalLM.from_pretrained(<folder>).save_pretrained(<new folder>), and copy the tokenizer"
        )
    if outside := [file for file in files if not _is_within(file)]:  # the pin covers this folder alone
        raise UnfitError(f"it takes weights from {outside[0]!r}, which leads out of its folder")
    if missing := [file for file in files if not (folder / file).is_file()]:
        of = f", one of the {len(listed)} files of its index" if missing[0] in listed else ""
        raise UnfitError(f"{missing[0]} is named as weights, and is not there{of}")
    return [file for file in files if not file.endswith(".index.json")]


def _shapes(folder: Path, file: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a file, by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / file, framework="numpy") as opened:  # without torch, which takes seconds to import
            return {tensor: tuple(opened.get_slice(tensor).get_shape()) for tensor in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UnfitError(f"{file} cannot be read ({error})") from None


def _require_indexed(folder: Path, listed: dict[str, set[str]], held: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """UnfitError unless each file holds what the index says, and no part of another model lies beside them.

    transformers reads whole files, whatever the index says about them.
    """
    for file, tensors in sorted(listed.items()):
        if differing := sorted(held[file].keys() ^ tensors):
            here, missing = ("index", "file") if differing[0] in tensors else ("file", "index")
            raise UnfitError(
                f"{file} is not what the index says of it: {differing[0]} is in the {here} and not in the {missing}"
                + (f", and {len(differing) - 1} more differ" if len(differing) > 1 else "")
            )
    parts = {path.name for path in folder.iterdir() if PART.fullmatch(path.name)}
    if listed and (superfluous := sorted(parts - listed.keys())):
        raise UnfitError(
            f"{superfluous[0]} is a part of a model that the index does not name: remove what belongs to another model"
        )


def _require_its_layers(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """UnfitError unless the files hold as many layers as the configuration says."""
    numbers = {match[1] for tensor in shapes if (match := re.search(r"(?:^|\.)layers\.(\d+)\.", tensor))}
    require_few_layers(len(numbers))
    said = config.get("num_hidden_layers", len(numbers))
    if said != len(numbers):
        raise UnfitError(
            f"its config.json says num_hidden_layers = {said!r:.50}, and its files hold {len(numbers)} layers: they "
            "are of two models, or not complete"
        )


def _is_within(file: str) -> bool:
    path = PurePath(file)
    return not path.is_absolute() and not any(part.startswith(".") for part in path.parts)


def _is_read(path: Path) -> bool:
    """Whether a file beside the weights enters the model or its tokenizer."""
    if path.suffix == ".model":  # sentencepiece's, which tokenizer.json replaces
        return not path.with_name("tokenizer.json").exists()
    return path.suffix in (".json", ".jinja", ".txt")


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
