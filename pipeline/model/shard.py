"""Several processes share one base that is too large for the device of each, in one of two ways.

`fsdp` (arXiv 2304.11277, by `torch.distributed.fsdp.fully_shard`): each process holds an equal part of every block's
weights. Before a block computes, forward or backward, its weights are gathered, packed as they are, and freed
afterwards. The values are those of the whole base, bit for bit. Each process computes its own rows. Whole in each
process are: embeddings, head and last norm, the constants of 4-bit blocks, and the adapter.

`tensor` (Megatron-LM, arXiv 1909.08053, section 3, by transformers and PEFT): each process holds some of the attention
heads and of the MLPs' columns, and the adapter's rows and columns that belong to them. All compute the same rows, and
add up their partial sums twice a layer, in another order than one process does.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError
from pipeline.model import checkpoint, processes
from pipeline.model.shape import Shape

if TYPE_CHECKING:
    import torch

SPLIT = frozenset({"colwise", "rowwise", "replicated_with_grad_allreduce"})
"""Ways in which transformers may divide a layer here: those that PEFT's adapters follow, and norms of single heads."""


@contextmanager
def in_turn() -> Iterator[None]:
    """Run the body in one process of a machine at a time, so that main memory holds one whole base at a time."""
    own, turns = int(os.environ["LOCAL_RANK"]), max(processes.gather(processes.local_processes()))
    for turn in range(turns):
        if turn == own:
            yield
        processes.gather(turn)


def mesh(device: "torch.device") -> Any:
    """A device mesh of all processes in one row. All of them must call this."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (processes.count(),))


def apply(model: Any, device: "torch.device", mesh: Any) -> None:
    """Divide the blocks of a base that is whole in main memory over the processes of `mesh`, each on its `device`."""
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_decoder()
    for block in decoder.layers:
        block.to(device)
        packed = [(layer, layer.weight) for layer in block.modules() if getattr(layer, "quant_state", None) is not None]
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for layer, whole in packed:  # keep the constants, and the attributes that PEFT reads from a weight
            layer.quant_state = whole.quant_state
            layer.weight.quant_type, layer.weight.compress_statistics = whole.quant_type, whole.compress_statistics
    divided = set(decoder.layers.parameters())
    for part in (*decoder.children(), model.get_output_embeddings()):
        if part is not decoder.layers:
            part.to(device)
    # The decoder itself divides nothing: as FSDP's root it gathers the next block's weights while one computes.
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - divided)


def rehearse(model: Any) -> None:
    """Gather each block once, so that what cannot be gathered fails here.

    It also makes the buffers outside of inference mode: buffers made in it could not be written outside of it.
    """
    for block in model.get_decoder().layers:
        block.unshard()
        block.reshard()


@contextmanager
def together(model: Any, backward: bool = False) -> Iterator[None]:
    """Compute this process's share, which may be empty, in the body; leave when all processes have computed theirs.

    All must compute a divided block equally often. So each forward pass through a divided base begins with a sum over
    all processes, to which those with work add 1. A process that is done computes along until the sum is 0.

    `backward`: each forward pass of the body is followed by a backward one. After the block `.grad` holds nothing of
    use.
    """
    if kind(model) != "fsdp":
        yield
        return
    import torch

    decoder = _base(model).get_decoder()
    with decoder.register_forward_pre_hook(_announce):
        yield
    ids_1x1 = torch.zeros(1, 1, dtype=torch.long, device=next(decoder.parameters()).device)
    while processes.add_up(0.0) > 0:
        with torch.set_grad_enabled(backward):
            hidden_1x1xH = decoder(input_ids=ids_1x1, use_cache=False).last_hidden_state
        if backward:
            hidden_1x1xH.sum().backward()


def _announce(*_: Any) -> None:
    processes.add_up(1.0)


def kind(model: Any) -> str:
    """How a loaded model, with or without an adapter, is shared: a value of `runtime.sharding`."""
    if processes.count() == 1:
        return "none"
    from torch.distributed.fsdp import FSDPModule

    base = _base(model)
    if isinstance(base.get_decoder(), FSDPModule):
        return "fsdp"
    return "none" if base.tp_size is None else "tensor"


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Heads and columns


def split(folder: Path, device: "torch.device") -> Any:
    """Load this process's heads and columns of a checkpoint, on `device`.

    UserError for heads, key-value heads or columns that the processes do not divide, for a family that transformers
    does not split in this way, and for a device other than the one that transformers takes.
    """
    import torch
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    there = (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    if device.type != there:
        raise UserError(
            f"runtime.sharding = 'tensor' computes on this machine's {there}, and runtime.device asks for "
            f"{device.type}: set it to auto, or sharding to fsdp"
        )
    require_divisible(AutoConfig.from_pretrained(folder), processes.count())
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every layer that is not split: embeddings, norms and head
    try:
        config = DistributedConfig(tp_size=processes.count(), tp_plan="auto")
        return checkpoint.pretrained(folder, None, distributed_config=config)
    finally:
        logging.set_verbosity(verbosity)


def require_divisible(config: Any, count: int) -> None:
    """UserError unless a model of this configuration can be split over `count` processes, and adapters with it."""
    instead, plan = "set runtime.sharding to fsdp", config.base_model_tp_plan
    if not plan or not set(plan.values()) <= SPLIT:
        raise UserError(
            f"runtime.sharding = 'tensor', but models of the family {config.model_type} are not split by heads and "
            f"columns in transformers: {instead}"
        )
    shape = Shape.of(config.to_dict())
    sizes = {
        "attention heads": shape.attention_heads,
        "key-value heads": shape.key_value_heads,
        "columns in its MLPs": shape.intermediate_size,
    }
    odd = [f"{size} {name}" for name, size in sizes.items() if size % count]
    if odd:
        raise UserError(
            f"runtime.sharding = 'tensor' over {count} processes, which do not divide this model: it has "
            f"{' and '.join(odd)}; set runtime.processes to a number that divides them, or {instead}"
        )


def fit(adapted: Any) -> None:
    """Let an adapter on split layers state the sizes of the whole, as transformers expects: PEFT states its part's."""
    for layer in adapters(adapted):
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.out_features, part.in_features = part.weight.shape


def draw(adapted: Any, seed: int) -> None:
    """Let a fresh adapter on split layers start as on whole ones: draw what PEFT draws, in the same order."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in adapters(adapted):
            for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                whole = torch.nn.Linear(a.in_features, a.out_features, bias=False).weight.detach()
                torch.nn.Linear(b.in_features, b.out_features, bias=False)
                torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
                a.weight.data.copy_(part(whole.to(a.weight.device), a.weight))


def adapters(adapted: Any) -> list[Any]:
    return [layer for layer in adapted.modules() if hasattr(layer, "lora_A")]


def whole(tensor: "torch.Tensor") -> "torch.Tensor":
    """The whole of a tensor of which processes may hold parts. All of them must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(whole: "torch.Tensor", like: "torch.Tensor") -> "torch.Tensor":
    """This process's part of a tensor that every process has whole, divided as `like`; all of it if `like` is whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
