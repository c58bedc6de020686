"""What a checkpoint says twice, and differently: its configuration against its tensors, its tokenizer, and itself.

transformers resolves some of it in silence, by rules that other readers do not share: they would compute another model
from what is written here. So a contradiction is settled by the files' content and said, or it is refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core import records
from pipeline.core.progress import say
from pipeline.fetch.unfit import UnfitError
from pipeline.model.shape import Shape

HEAD = "lm_head.weight"
PARTIAL = "partial_rotary_factor"

Shapes = dict[str, tuple[int, ...]]


# Before the weights are read


def embedding(shapes: Shapes) -> str | None:
    """The name of the embedding among the tensors."""
    return next((name for name in shapes if name.rpartition("embed_tokens.")[2] == "weight" and "embed" in name), None)


def require_head(config: dict[str, Any], shapes: Shapes) -> None:
    """UnfitError for a head of its own that the files lack: it would be random."""
    if not config.get("tie_word_embeddings") and HEAD not in shapes and embedding(shapes):
        raise UnfitError(
            f"it lacks 1 of the model's tensors, such as {HEAD}, and its config.json does not say that its head is the "
            "embedding: set tie_word_embeddings to true there if it is, else name a complete checkpoint"
        )


def require_announced_shapes(config: dict[str, Any], shapes: Shapes) -> None:
    """UnfitError unless the embedding and the first layer's projections have the sizes in the configuration.

    A configuration that describes no `Shape` is left to transformers.
    """
    try:
        shape = Shape.of(config)
    except (ValidationError, LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return
    if shape.attention_heads % shape.key_value_heads:
        raise UnfitError(
            f"its config.json says num_attention_heads = {shape.attention_heads} and num_key_value_heads = "
            f"{shape.key_value_heads}, which does not divide them"
        )
    expected = {name: (outputs, inputs) for name, (inputs, outputs) in shape.linears.items()}
    expected |= {
        "embed_tokens": (shape.vocabulary, shape.hidden_size),
        "lm_head": (shape.vocabulary, shape.hidden_size),
    }
    of = {
        "embed_tokens": "vocab_size and hidden_size", "lm_head": "vocab_size and hidden_size",
        "q_proj": "num_attention_heads, head_dim and hidden_size",
        "k_proj": "num_key_value_heads, head_dim and hidden_size",
        "v_proj": "num_key_value_heads, head_dim and hidden_size",
        "o_proj": "num_attention_heads, head_dim and hidden_size",
        "qkv_proj": "num_attention_heads, num_key_value_heads and hidden_size",
    }  # fmt: skip
    for tensor, held in shapes.items():
        layer = tensor.removesuffix(".weight").rpartition(".")[2]
        first = ".layers." not in f".{tensor}" or ".layers.0." in f".{tensor}"
        if first and tensor.endswith(".weight") and layer in expected and held != expected[layer]:
            raise UnfitError(
                f"its weights do not fit its configuration: {tensor} is {_by(held)}, and {_by(expected[layer])} by "
                f"{of.get(layer, 'intermediate_size and hidden_size')} in config.json; name a sound checkpoint"
            )
    if isinstance(pad := config.get("pad_token_id"), int) and not -shape.vocabulary <= pad < shape.vocabulary:
        raise UnfitError(
            f"its config.json says pad_token_id = {pad}, and the model embeds {shape.vocabulary:,} tokens: set it to "
            "null there"
        )


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes)) or "a single number"


def require_one_rotation(config: dict[str, Any]) -> None:
    """UnfitError for a configuration that says in two places, and differently, how positions are rotated."""
    older, newer = _table(config.get("rope_scaling")), _table(config.get("rope_parameters"))
    whole = _table(newer.get("full_attention")) or newer  # Gemma 3 has one for each kind of layer
    said = [
        ("rope_scaling.type", older.get("type"), "rope_scaling.rope_type", older.get("rope_type")),
        ("rope_parameters.type", newer.get("type"), "rope_parameters.rope_type", newer.get("rope_type")),
        *((key, config.get(key), f"rope_parameters.{key}", whole.get(key)) for key in ("rope_theta", PARTIAL)),
    ]
    if older and newer:
        said.append(("rope_scaling's type", _kind(older), "rope_parameters' type", _kind(newer)))
        # transformers reads rope_scaling alone then, so that what only the other one says would be lost.
        for key in sorted(newer.keys() - {"type", "rope_type"}):
            one = older.get(key, config.get(key, "(nothing)"))
            said.append((f"rope_scaling.{key}", one, f"rope_parameters.{key}", newer[key]))
    for here, one, there, other in said:
        if None not in (one, other) and _name(one) != _name(other):
            raise UnfitError(
                f"its config.json says {here} = {one!r:.50} and {there} = {other!r:.50}: remove the one that is not "
                "meant"
            )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _name(value: Any) -> Any:
    return "longrope" if value == "su" else value


def _kind(rotation: dict[str, Any]) -> Any:
    return rotation.get("rope_type", rotation.get("type", "default"))


# Once the model is loaded


def settle(model: Any) -> None:
    """Let the configurations of a loaded model say what it is: whether its head is its embedding, and only token ids
    that it embeds. What changes is said."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and head is not embedding:
        model.config.tie_word_embeddings = False
        say(
            "fetch: its config.json says tie_word_embeddings = true, and its files hold a head that differs from the "
            "embedding: the head is kept, and tie_word_embeddings is now false"
        )
    for place, config in (("config.json", model.config), ("generation_config.json", model.generation_config)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, key, None)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            kept = [one for one in ids if 0 <= one < len(embedding)]
            if kept != ids:
                setattr(config, key, kept if isinstance(value, list) and kept else None)
                say(
                    f"fetch: its {place} says {key} = {value}, and the model embeds {len(embedding):,} tokens: it is "
                    f"now {getattr(config, key)}"
                )


def unembedded(tokenizer: Any, embedded: int) -> list[str]:
    """The control tokens that were added to a tokenizer, that nothing uses, and that the model does not embed.

    A token for padding often is one: Llama 2's in many copies. UnfitError for tokens that are used: any text may hold
    an added word, BOS and EOS stand in every row.
    """
    added = tokenizer.added_tokens_decoder
    beyond = {number: added[number] for number in sorted(added) if number >= embedded}
    if not beyond or not tokenizer.is_fast:
        return []
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    used = {tokenizer.bos_token, tokenizer.eos_token, parts["model"].get("unk_token")}
    behind = json.dumps([parts["post_processor"], tokenizer.chat_template], ensure_ascii=False)
    for number, token in beyond.items():
        if not token.special or token.content in used or token.content in behind:
            raise UnfitError(
                f"its tokenizer has the token {token.content!r} with the id {number}, and the model embeds "
                f"{embedded:,} tokens: name a checkpoint whose embedding has a row for it, or remove the token from "
                "the tokenizer"
            )
    return [token.content for token in beyond.values()]


def leave_out(tokens: Sequence[str], folder: Path) -> None:
    """Take tokens that are not embedded out of a saved tokenizer, and say so."""
    if not tokens:
        return
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = records.read_json(file), records.read_json(settings)
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in tokens]
    config = {key: value for key, value in config.items() if not (key.endswith("_token") and value in tokens)}
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = [one for one in value if one not in tokens]
    records.write_json(file, content)
    records.write_json(settings, config)
    say(f"fetch: its tokenizer has {', '.join(map(repr, tokens))}, which the model does not embed: left out")
