"""A checkpoint of a model, in the hub's layout: the facts of its architecture, its tokenizer, and its stored weights.

transformers' causal language models cover LLaMA (RMSNorm, rotary embeddings, SwiGLU; arXiv 2302.13971) and its
relatives with grouped-query attention (Llama 2, arXiv 2307.09288).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import paths, records
from pipeline.core.contracts import Architecture
from pipeline.core.errors import UserError
from pipeline.model.shape import Shape

if TYPE_CHECKING:
    import torch


def architecture(model: Any) -> Architecture:
    """The facts of a loaded model: its `Shape`, and what its weights tell."""
    shape = Shape.of(model.config.to_dict())
    return Architecture(
        **shape.model_dump(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_bytes_per_token=2 * shape.layers * shape.keys * model.dtype.itemsize,
        stop_ids=stop_ids(model),
        linear_layers=linear_layers(model),
    )


def linear_layers(model: Any) -> list[str]:
    """Names (last part) of all linear layers but the head: those that `all-linear` adapts, and that are quantized."""
    import torch

    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    }
    return sorted(names)


def stop_ids(model: Any) -> list[int]:
    """The tokens at which the model's authors stop decoding. Nothing else is taken from the generation config."""
    ids = model.generation_config.eos_token_id
    ids = model.config.eos_token_id if ids is None else ids
    return sorted([ids] if isinstance(ids, int) else ids or [])


def tokenizer(folder: Path = paths.QUANTIZED) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def pretrained(folder: Path, device: "torch.device | None", **options: Any) -> Any:
    """A checkpoint in evaluation mode, with the attention that packed sequences and decoding rely on.

    It lies on `device`; None leaves the place to `options`, which go to transformers' `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    from pipeline.model import attention, groups

    groups.register()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=device and {"": device},
        attn_implementation=attention.NAME,
        trust_remote_code=False,
        **options,
    )


def stored(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The tensors of these names in a checkpoint, one after another. UserError for one that it does not hold."""
    from safetensors import safe_open

    wanted = set(names)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(wanted.intersection(opened.keys())):
                wanted.remove(name)
                yield name, opened.get_tensor(name)
    if wanted:
        raise UserError(f"{folder} holds no tensor named {min(wanted)}: run `dvc repro --force fetch`")


def require_intact(folder: Path, sha256: str) -> None:
    """UserError unless a checkpoint is, byte for byte, the one whose digest its facts hold."""
    if records.sha256_tree(folder) != sha256:
        raise UserError(
            f"{folder} is not what its stage wrote: it has changed on the disk, or in DVC's cache, from where it came; "
            "`lora-repro verify` says where, and how to repair it"
        )
