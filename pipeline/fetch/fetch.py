"""Fetching the base model: any source becomes one checkpoint, in safetensors, with its tokenizer and its facts."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import BaseFacts
from pipeline.core.errors import UserError, panics_told
from pipeline.core.progress import say
from pipeline.fetch import gguf_header as header
from pipeline.fetch import meta_layout as meta
from pipeline.model import checkpoint, devices, prompt
from pipeline.sources import source

if TYPE_CHECKING:
    import torch

GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
"""Families that are read from GGUF: of the others transformers reads none, or leaves out what changes their results."""

GGUF_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K",
    "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
)  # fmt: skip
"""Types of weights read from GGUF; tests/fetch/test_fetch.py compares each with what the gguf library reads."""

UNREAD = (
    "expert_count",
    "attention.scale",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
)
"""Header fields of a family that change what is computed, and that transformers does not read for those above."""

HEAD = {"qwen3": 128, "gemma3": 256}
"""Of these families transformers takes the width of a head, or (Gemma 3) what scores are scaled by, from nothing in the
file: it is the one of most of their models, and others are refused. Gemma 3's 27B scales by another number besides."""

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

Of each, tests/fetch/test_families.py makes a small random model and compares, in float32, with transformers and PEFT as
they come: the loss and the adapter's gradients of a packed batch, the texts of greedy decoding, and the logits of the
saved adapter; with tied embeddings and untied ones, from safetensors in one file or several, after NF4 quantization as
well. A sliding window (Mistral, Qwen, Gemma 3, Phi 3) and the change of frequencies of longrope (Phi 3) end the
context.
"""

PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
"""What transformers names one of several files; there may be other copies of the weights beside them."""

OURS_ALONE = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is looked for elsewhere, and Python code beside a checkpoint is not run, nor asked about."""


def fetch(model: params.Model, experiment: params.Params | None = None) -> None:
    """Bring the model to `out/models/base` as safetensors in `model.dtype`, and its facts beside it.

    UserError when the source is not a causal language model of a known family, or has no usable tokenizer; and when a
    later stage of `experiment` would refuse it. Nothing of the experiment enters what is written.
    """
    import torch

    def check(empty: Any, tokenizer: Any) -> None:
        if experiment is not None:
            _require_usable(empty, tokenizer, experiment)

    devices.quieten()
    dtype = getattr(torch, model.dtype)
    with panics_told(), source.resolved(model.source, model.sha256, kind="model", key="model") as found:
        if meta.is_layout(found):
            say(f"fetch: converting {model.source}")
            loaded, tokenizer = meta.load(found, model.source, dtype, check)
        else:
            loaded, tokenizer = _load(found, model.source, dtype, check)
        loaded.to(dtype)
        # Weights may still be in their files, to be read when they are used: the files are watched up to here alone.
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.data = tensor.data.clone()
    _check_tokenizer(tokenizer, loaded)
    # Where it was read from is in the facts; in the checkpoint it would be a path of this machine.
    loaded.config._name_or_path = tokenizer.name_or_path = ""
    loaded.save_pretrained(paths.BASE)
    tokenizer.save_pretrained(paths.BASE)
    architecture = asdict(checkpoint.architecture(loaded))
    facts = BaseFacts(**architecture, source=model.source, sha256=records.sha256_tree(paths.BASE))
    contracts.write(paths.BASE_FACTS, facts)
    cache = f"{facts.kv_bytes_per_token:,} bytes of keys and values a token"
    say(f"fetch: {facts.family}, {facts.parameters:,} parameters, {cache}")


def _require_usable(empty: Any, tokenizer: Any, experiment: params.Params) -> None:
    """UserError for what a later stage would refuse of a model (here without weights) or its tokenizer, some of them
    after hours of training: said before the weights are read."""
    from pipeline import gguf as gguf_file
    from pipeline.model import shard

    context = checkpoint.architecture(empty).context
    if context < empty.config.max_position_embeddings:
        say(f"fetch: the context ends at {context} tokens, with the model's sliding window or longrope's first length")
    prompt.Encoder(tokenizer, experiment.prompt, context)
    forget = experiment.forget
    if forget.source is not None and forget.window > context:
        raise UserError(f"forget.window = {forget.window}, but the model's context is {context} tokens")
    if experiment.runtime.sharding == "tensor":
        shard.require_divisible(empty.config, experiment.runtime.processes)
    if experiment.generation.backend == "llama.cpp":
        with TemporaryDirectory(prefix="lora-repro-") as name:
            empty.config.save_pretrained(name)
            tokenizer.save_pretrained(name)
            gguf_file.refuse(Path(name))


def _load(found: Path, name: str, dtype: "torch.dtype", check: Callable[[Any, Any], None]) -> tuple[Any, Any]:
    """A GGUF file or a folder in the Hugging Face layout as transformers reads it; UserError as of `fetch`.

    `check` is given the model without weights and the tokenizer before the weights are read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, weights, held = _load_options(found, name)
    say(f"fetch: reading {name}")
    try:
        with _gguf_read_once():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where))
            if held:
                _require_no_larger(empty, held, name)
            check(empty, tokenizer)
            loaded, reading = AutoModelForCausalLM.from_pretrained(
                dtype=dtype, output_loading_info=True, **where, **weights
            )
    except UserError:
        raise
    except RuntimeError:  # transformers has printed which of its tensors
        raise UserError(
            f"model.source = {name!r}: its weights do not fit its configuration; name a sound checkpoint"
        ) from None
    except Exception as error:  # whatever a configuration or a header that makes no sense brings about
        told = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise UserError(
            f"model.source = {name!r}: transformers cannot load it ({told}); name a sound checkpoint. Code "
            "that comes with a model is never run"
        ) from error
    if found.is_file():
        _check_gguf_is_whole(found, loaded, name)
    if absent := sorted(reading["missing_keys"]):
        raise _incomplete(absent, name)
    return loaded, tokenizer


def _incomplete(absent: list[str], name: str) -> UserError:
    return UserError(
        f"model.source = {name!r} lacks {len(absent)} of the model's tensors, such as {absent[0]}: they would be "
        "random; name a complete checkpoint"
    )


def _require_no_larger(empty: Any, held: dict[str, int], name: str) -> None:
    """UserError for a model of more numbers than the files hold: what is not there is made up, at any size."""
    numbers, buffers = (sum(one.numel() for one in some) for some in (empty.parameters(), empty.buffers()))
    total = sum(held.values())
    if max(numbers, buffers) > total:
        if absent := sorted(key for key, _ in empty.named_parameters() if key not in held):
            raise _incomplete(absent, name)
        raise UserError(
            f"model.source = {name!r}: its weights do not fit its configuration, which describes a model of "
            f"{max(numbers, buffers):,} numbers where the files hold {total:,}; name a sound checkpoint"
        )


def gguf(file: Path) -> Any:
    """The model that a GGUF file holds, in float32, with the attention that packed sequences rely on."""
    import torch

    from pipeline.model import attention

    # In a folder of its own: transformers would read a chat template or stop tokens that lie beside it.
    with TemporaryDirectory(prefix="lora-repro-") as alone:
        link = Path(alone) / file.name
        link.symlink_to(file.resolve())
        model, _ = _load(link, file.name, torch.float32, lambda *_: None)
    model.set_attn_implementation(attention.NAME)
    return model.eval()


def _load_options(found: Path, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """Arguments of `from_pretrained` for a GGUF file or a folder: where it is, and how its weights are read; and of a
    folder how many numbers each tensor has.

    UserError for what cannot be loaded, or would compute other numbers than it is meant to.
    """
    from transformers import GgufConfig

    if found.is_file():
        if found.suffix.lower() != ".gguf":
            raise UserError(f"model.source = {name!r}: a model is a folder in the Hugging Face layout or a .gguf file")
        _check_gguf(found, name)
        # dequantize: without it the weights stay packed, and cannot be saved as safetensors.
        return (
            {"pretrained_model_name_or_path": found.parent, "gguf_file": found.name, **OURS_ALONE},
            {"quantization_config": GgufConfig(dequantize=True)},
            {},
        )
    config_file = found / "config.json"
    if not config_file.is_file():
        raise UserError(f"model.source = {name!r}: no config.json in this folder; it has {_listing(found)}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        family, architectures = config.get("model_type"), [str(one) for one in config.get("architectures") or []]
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise UserError(f"model.source = {name!r}: its config.json is no configuration in JSON ({error})") from None
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
    held = _held(found, _check_weights(found, config, name), name)
    _require_its_layers(config, held, name)
    if (found / "tokenizer.json").is_file():
        prompt.require_readable(found / "tokenizer.json")
    return {"pretrained_model_name_or_path": found, **OURS_ALONE}, {"use_safetensors": True}, held


def _held(found: Path, files: list[str], name: str) -> dict[str, int]:
    """How many numbers each tensor has, by the headers of the files."""
    from safetensors import SafetensorError, safe_open

    held: dict[str, int] = {}
    for file in files:
        try:
            with safe_open(found / file, framework="pt") as opened:
                held |= {tensor: math.prod(opened.get_slice(tensor).get_shape()) for tensor in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.source = {name!r}: {file} cannot be read ({error})") from None
    return held


def _require_its_layers(config: dict[str, Any], held: dict[str, int], name: str) -> None:
    """UserError unless there are as many layers as the configuration says: one after the other they are built by it,
    before any weight is read."""
    numbers = {match[1] for tensor in held if (match := re.search(r"(?:^|\.)layers\.(\d+)\.", tensor))}
    if len(numbers) > checkpoint.MOST_LAYERS:
        raise UserError(f"model.source = {name!r} has {len(numbers):,} layers: {checkpoint.MOST_LAYERS:,} are the most")
    told = config.get("num_hidden_layers", len(numbers))
    if told != len(numbers):
        raise UserError(
            f"model.source = {name!r}: its config.json says num_hidden_layers = {told!r:.50}, and its files hold "
            f"{len(numbers)} layers: they are of two models, or not complete"
        )


def _check_weights(found: Path, config: dict[str, Any], name: str) -> list[str]:
    """The files of the weights. UserError unless all are in safetensors, other formats being pickles, which can run
    code when read, and are where the index of several files says."""
    single, index = found / "model.safetensors", found / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise UserError(
            f"model.source = {name!r} holds {single.name} and {index.name}, two sets of weights: remove the one "
            "that is not meant"
        )
    # A configuration may name a weights file of its own.
    files = [str(config["transformers_weights"])] if config.get("transformers_weights") else []
    files += [single.name] if single.is_file() else [index.name] if index.is_file() else []
    listed: dict[str, set[str]] = {}
    for each in [found / file for file in files if file.endswith(".index.json") and _within(file)]:
        try:
            for tensor, file in json.loads(each.read_text(encoding="utf-8"))["weight_map"].items():
                listed.setdefault(str(file), set()).add(str(tensor))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"model.source = {name!r}: its {each.name} lists no weights ({error!r})") from None
    files += sorted(listed)
    if not files and (parts := sorted(path.name for path in found.iterdir() if PART.fullmatch(path.name))):
        raise UserError(
            f"model.source = {name!r} holds {parts[0]} and no {index.name}, which says what belongs together: add it"
        )
    other = [file for file in files if not file.endswith((".safetensors", ".safetensors.index.json"))]
    if not files or other:
        raise UserError(
            f"model.source = {name!r} holds no weights in safetensors (it has {', '.join(other) or _listing(found)}); "
            f"pickled weights (.bin, .pt) can run code when they are read, so they never are. Where you trust them: "
            f"AutoModelForCausalLM.from_pretrained(<folder>).save_pretrained(<new folder>), and copy the tokenizer"
        )
    # The pin is over what lies in the folder.
    if outside := [file for file in files if not _within(file)]:
        raise UserError(f"model.source = {name!r} takes weights from {outside[0]!r}, which leads out of its folder")
    missing = [file for file in files if not (found / file).is_file()]
    if missing:
        of = f", one of the {len(listed)} files of its index" if missing[0] in listed else ""
        raise UserError(f"model.source = {name!r}: {missing[0]} is named as weights, and is not there{of}")
    if listed:
        _check_index(found, listed, name)
    return [file for file in files if not file.endswith(".index.json")]


def _check_index(found: Path, listed: dict[str, set[str]], name: str) -> None:
    """UserError unless each of several files holds what the index says, and there is no other part of a model."""
    from safetensors import SafetensorError, safe_open

    # transformers reads the files as a whole, whatever the index says of them.
    for file, tensors in sorted(listed.items()):
        try:
            with safe_open(found / file, framework="pt") as opened:
                held = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.source = {name!r}: {file} cannot be read ({error})") from None
        if differing := sorted(held ^ tensors):
            where = "in the file and not in the index" if differing[0] in held else "in the index and not in the file"
            raise UserError(
                f"model.source = {name!r}: {file} is not what the index says of it: {differing[0]} is {where}"
                + (f", and {len(differing) - 1} more differ" if len(differing) > 1 else "")
            )
    parts = {path.name for path in found.iterdir() if PART.fullmatch(path.name)}
    if superfluous := sorted(parts - listed.keys()):
        raise UserError(
            f"model.source = {name!r}: {superfluous[0]} is a part of a model that the index does not name: remove "
            "what belongs to another model"
        )


def _within(file: str) -> bool:
    path = PurePath(file)
    return not path.is_absolute() and not any(part.startswith(".") for part in path.parts)


def _check_gguf(found: Path, name: str) -> None:
    """UserError for a GGUF file that is damaged, of another family, or says what transformers does not read."""
    import gguf

    try:
        header.check(found)
        reader = gguf.GGUFReader(str(found))
        family = reader.fields["general.architecture"].contents()
        if family in GGUF_FAMILIES:
            _require_announced_sizes(reader, family)
    except Exception as error:  # whatever numbers that lead nowhere bring about
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"model.source = {name!r} is not a sound GGUF file, or not the whole of one ({why})") from None
    instead = "name the checkpoint in the Hugging Face layout instead"
    if family not in GGUF_FAMILIES:
        raise UserError(
            f"model.source = {name!r}: a GGUF file of architecture {family!r} cannot be read faithfully, only of "
            f"{', '.join(GGUF_FAMILIES)}; {instead}"
        )
    if unread := sorted({tensor.tensor_type.name for tensor in reader.tensors} - set(GGUF_TYPES)):
        raise UserError(
            f"model.source = {name!r} holds weights of type {unread[0]}; of GGUF files these are read: "
            f"{', '.join(GGUF_TYPES)}; {instead}"
        )
    told = {
        name: reader.fields[f"{family}.{name}"].contents() for name in UNREAD if f"{family}.{name}" in reader.fields
    }
    if changing := [name for name, value in told.items() if value]:
        raise UserError(
            f"model.source = {name!r} says {family}.{changing[0]} = {told[changing[0]]}, which transformers does not "
            f"read from GGUF files; {instead}"
        )
    if family in HEAD and (width := _head(reader, family)) != HEAD[family]:
        raise UserError(
            f"model.source = {name!r} has attention heads of {width} numbers; of {family} transformers reads GGUF "
            f"files with {HEAD[family]} alone; {instead}"
        )
    scaling = reader.fields.get(f"{family}.rope.scaling.type")
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if factors or (scaling and scaling.contents() != "none"):
        raise UserError(
            f"model.source = {name!r} scales its rotary embedding ({', '.join(factors) or scaling.contents()}), which "
            f"transformers does not read from GGUF files; {instead}"
        )


def _require_announced_sizes(reader: Any, family: str) -> None:
    """ValueError unless the tensors have the sizes in the header: transformers builds the model by it, at any size."""
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    own = [name for name in reader.fields if name.startswith(f"{family}.")]
    told = {name.removeprefix(f"{family}."): reader.fields[name].contents() for name in own}
    heads = told["attention.head_count"]
    has = {
        "block_count": len({name.split(".")[1] for name in shapes if name.startswith("blk.")}),
        "embedding_length": shapes["token_embd.weight"][0],
        "vocab_size": shapes["token_embd.weight"][1],
        "feed_forward_length": shapes["blk.0.ffn_up.weight"][1],
        "attention.key_length": shapes["blk.0.attn_q.weight"][1] // heads,
    }
    wrong = [
        f"{name} is {told[name]}, of the tensors {size}" for name, size in has.items() if told.get(name, size) != size
    ]
    if wrong:
        raise ValueError(", ".join(wrong))
    if has["block_count"] > checkpoint.MOST_LAYERS:
        raise ValueError(f"it has {has['block_count']:,} layers: {checkpoint.MOST_LAYERS:,} are the most")


def _head(reader: Any, family: str) -> int:
    """How many numbers an attention head of the query has."""
    rows = next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    return rows // int(reader.fields[f"{family}.attention.head_count"].contents())


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
