"""Fetching the base model: any source becomes one checkpoint, in safetensors, with its tokenizer and its facts."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline import gguf as gguf_file
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import BaseFacts
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.fetch import contradictions, gguf_layout, glance, hub_layout, meta_layout
from pipeline.fetch.unfit import UnfitError, named
from pipeline.model import apart, checkpoint, devices, prompt, shard
from pipeline.sources import source

if TYPE_CHECKING:
    import torch

Check = Callable[[Any, Any], None]
"""Called with the model without weights, and the tokenizer, before the weights are read."""


def write_base(model: params.Model, experiment: params.Params | None = None) -> None:
    """Bring the model to `out/models/base` as safetensors in `model.dtype`, and its facts beside it.

    UserError when the source is not a causal language model of a known family, or has no usable tokenizer; and when a
    later stage of `experiment` would refuse it. Nothing of the experiment enters what is written.
    """

    def check(empty: Any, tokenizer: Any) -> None:
        if experiment is not None:
            _require_usable(empty, tokenizer, experiment)

    with (
        source.resolved(model.source, model.sha256, kind="model", key="model") as found,
        named(model.source),
    ):
        # torch and transformers take seconds to import, and a tokenizer of many words a minute: this comes first.
        seen = glance.glance(found)
        assert seen is not None
        if experiment is not None:
            glance.require_usable(seen, experiment)
        import torch

        devices.quieten()
        dtype = getattr(torch, model.dtype)
        if meta_layout.is_layout(found):
            say(f"fetch: converting {model.source}")
            loaded, tokenizer = meta_layout.load(found, dtype, check)
        else:
            say(f"fetch: reading {model.source}")
            loaded, tokenizer = _load(found, dtype, check)
        loaded.to(dtype)
        # Mapped weights would be read from their files only when they are used: those are watched up to here alone.
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.data = tensor.data.clone()
        contradictions.settle(loaded)
    _check_tokenizer(tokenizer, loaded)
    # The facts say where it was read from; the checkpoint would name a path of this machine.
    loaded.config.name_or_path = tokenizer.name_or_path = ""
    loaded.save_pretrained(paths.BASE)
    tokenizer.save_pretrained(paths.BASE)
    spare = contradictions.unembedded(tokenizer, loaded.get_input_embeddings().num_embeddings)
    contradictions.leave_out(spare, paths.BASE)
    architecture = asdict(checkpoint.architecture(loaded))
    facts = BaseFacts(**architecture, source=model.source, sha256=records.sha256_tree(paths.BASE))
    contracts.write(paths.BASE_FACTS, facts)
    cache = f"{facts.kv_bytes_per_token:,} bytes of keys and values a token"
    say(f"fetch: {facts.family}, {facts.parameters:,} parameters, {cache}")


def gguf(file: Path) -> Any:
    """The model that a GGUF file holds, in float32, with the attention that packed sequences rely on.

    UserError as of `write_base`.
    """
    import torch

    from pipeline.model import attention

    # In a folder of its own: transformers would read a chat template or stop tokens that lie beside it.
    with TemporaryDirectory(prefix="lora-repro-") as alone, named(file.name):
        link = Path(alone) / file.name
        link.symlink_to(file.resolve())
        say(f"fetch: reading {file.name}")
        model, _ = _load(link, torch.float32, lambda *_: None)
    model.set_attn_implementation(attention.NAME)
    return model.eval()


def _require_usable(empty: Any, tokenizer: Any, experiment: params.Params) -> None:
    """UserError for what a later stage would refuse in a model (here without weights) or its tokenizer.

    Some of them would only do so after hours of training.
    """
    context = checkpoint.architecture(empty).context
    if context < empty.config.max_position_embeddings:
        say(f"fetch: the context ends at {context} tokens, with the model's sliding window or longrope's first length")
    prompt.Encoder(tokenizer, experiment.prompt, context)
    experiment.forget.require_model(context, bool(tokenizer.chat_template))
    experiment.contamination.require_context(context)
    if experiment.runtime.sharding == "tensor":
        shard.require_divisible(empty.config, experiment.runtime.processes)
    if experiment.generation.backend == "llama.cpp":
        with TemporaryDirectory(prefix="lora-repro-") as name:
            empty.config.save_pretrained(name)
            tokenizer.save_pretrained(name)
            gguf_file.refuse(Path(name))


def _load(found: Path, dtype: "torch.dtype", check: Check) -> tuple[Any, Any]:
    """The model and tokenizer in a GGUF file, or in a folder in the Hugging Face layout, as transformers reads them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Nothing is looked up elsewhere. Python code beside a checkpoint is not run, and nobody is asked whether to.
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    held: dict[str, tuple[int, ...]] = {}
    if found.is_dir():
        held = hub_layout.seen(found).shapes
        if (found / "tokenizer.json").is_file():
            apart.require_readable(found / "tokenizer.json")
        where |= {"pretrained_model_name_or_path": found}
        weights: dict[str, Any] = {"use_safetensors": True}
    else:
        header = gguf_layout.checked(found)
        where |= {"pretrained_model_name_or_path": found.parent, "gguf_file": found.name}
        # Packed weights cannot be saved as safetensors.
        weights = {"quantization_config": GgufConfig(dequantize=True)}
    try:
        with gguf_layout.read_once():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where))
            if held:
                _require_no_larger(empty, held)
            contradictions.unembedded(tokenizer, empty.get_input_embeddings().num_embeddings)
            check(empty, tokenizer)
            loaded, reading = AutoModelForCausalLM.from_pretrained(
                dtype=dtype, output_loading_info=True, **where, **weights
            )
    except UserError:
        raise
    except RuntimeError:  # transformers has printed which tensors
        raise UnfitError("its weights do not fit its configuration; name a sound checkpoint") from None
    except Exception as error:  # a configuration or a header that makes no sense raises anything
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise UnfitError(
            f"transformers cannot load it ({reason}); name a sound checkpoint. Code that comes with a model is never "
            "run"
        ) from error
    if found.is_file():
        gguf_layout.require_whole(header, loaded)
    if absent := sorted(reading["missing_keys"]):
        raise _incomplete(absent)
    return loaded, tokenizer


def _incomplete(absent: list[str]) -> UnfitError:
    return UnfitError(
        f"it lacks {len(absent)} of the model's tensors, such as {absent[0]}: they would be random; name a complete "
        "checkpoint"
    )


def _require_no_larger(empty: Any, held: dict[str, tuple[int, ...]]) -> None:
    """UnfitError for a model of more numbers than the files hold: transformers would make up the rest, at any size."""
    numbers, buffers = (sum(one.numel() for one in some) for some in (empty.parameters(), empty.buffers()))
    total = sum(map(math.prod, held.values()))
    if max(numbers, buffers) > total:
        if absent := sorted(key for key, _ in empty.named_parameters() if key not in held):
            raise _incomplete(absent)
        raise UnfitError(
            f"its weights do not fit its configuration, which describes a model of {max(numbers, buffers):,} numbers "
            f"where the files hold {total:,}; name a sound checkpoint"
        )


def _check_tokenizer(tokenizer: Any, model: Any) -> None:
    embedded = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > embedded:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model embeds only {embedded}: "
            f"model.source mixes two models"
        )
