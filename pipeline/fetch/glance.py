"""What a model's files say of it at a glance: its family, context, chat template and sizes.

Configurations and the headers of files are read, no weights and no vocabulary, without torch and transformers. So it
takes a moment, and whatever can be refused by it is refused before anything else is read.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core import params
from pipeline.fetch import gguf_layout, hub_layout, meta_layout
from pipeline.fetch.unfit import UnfitError, require_content
from pipeline.model import adapted, prompt
from pipeline.model.shape import Shape

NOT_A_MODEL = "a model is a folder in the Hugging Face layout or a .gguf file"

BIASES = ("attention_bias", "mlp_bias")
"""The keys of a configuration that give linear layers biases."""
ALWAYS_BIASED = ("qwen2",)
"""Families whose queries, keys and values have biases, without a key for them."""


@dataclass(frozen=True, slots=True)
class Glance:
    """What is known without reading weights or building a tokenizer; None for what would need that.

    `family` is transformers' name. `context` is in tokens, and the one that `fetch` writes. `vocabulary` counts the
    token ids that the model embeds. A stored output head counts as one of its own in `shape`, also where its numbers
    are those of the embedding. `biases`: whether linear layers have any.
    """

    family: str
    context: int | None
    chat_template: bool | None
    vocabulary: int | None
    shape: Shape | None
    biases: bool | None = None


def glance(path: Path) -> Glance | None:
    """What the model in a local folder or file is; None if there is nothing at `path`.

    UnfitError for what `fetch` would refuse, as far as it is visible: it is then the same error.
    """
    if not path.exists():
        return None
    if path.is_dir():
        return _of_meta(path) if meta_layout.is_layout(path) else _of_hub(path)
    if path.suffix.lower() != ".gguf":
        raise UnfitError(NOT_A_MODEL)
    require_content([path])
    header = gguf_layout.checked(path)
    return _of(hub_layout.completed(gguf_layout.config(header)), bool(header.values.get("tokenizer.chat_template")))


def shape(path: Path) -> Shape | None:
    """The sizes of the model in a local folder or file, as `fetch` will write it; None if they are not known.

    As of `glance`, but where a head is stored that the configuration says is the embedding, the two are compared.
    """
    seen = glance(path)
    if seen is None or seen.shape is None:
        return None
    if not path.is_dir() or meta_layout.is_layout(path):
        return seen.shape
    return seen.shape.model_copy(update={"tied_embeddings": hub_layout.is_tied(path)})


def require_usable(seen: Glance, experiment: params.Params) -> None:
    """UserError for what a later stage would refuse in a model, as far as it is known at a glance."""
    prompt.require_model(experiment.prompt, seen.context, seen.chat_template)
    experiment.forget.require_model(seen.context, seen.chat_template)
    experiment.contamination.require_context(seen.context)
    require_adaptable(seen, experiment.lora)


def require_adaptable(seen: Glance, lora: params.Lora) -> None:
    """UserError for settings of the adapter that the model cannot honour, as far as it is known at a glance."""
    if seen.shape is not None:
        adapted.require_shape(lora, seen.shape, seen.biases)


def _of_hub(folder: Path) -> Glance:
    seen = hub_layout.seen(folder)
    return _of(seen.config, _has_template(folder))


def _of_meta(folder: Path) -> Glance:
    settings = meta_layout.seen(folder)
    vocabulary = None if settings.vocab_size == -1 else settings.vocab_size
    made = _of({"model_type": "llama", **settings.sizes, "vocab_size": vocabulary}, chat_template=False)
    return replace(made, context=settings.context)


def _of(config: dict[str, Any], chat_template: bool | None) -> Glance:
    try:
        shape = Shape.of(config)
    except (ValidationError, LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return Glance(str(config["model_type"]), None, chat_template, None, None)
    biases = shape.family in ALWAYS_BIASED or any(config.get(name) for name in BIASES)
    return Glance(shape.family, shape.context, chat_template, shape.vocabulary, shape, biases)


def _has_template(folder: Path) -> bool | None:
    """Whether a tokenizer in transformers' files has a chat template; None if a file cannot be understood here."""
    alone, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if any((folder / "additional_chat_templates").glob("*.jinja")):
        return True
    if alone.is_file():
        return alone.stat().st_size > 0
    if not settings.is_file():
        return False
    try:
        return bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    except (ValueError, RecursionError, AttributeError):
        return None
