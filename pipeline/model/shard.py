"""Several processes share one base that is too large for the device of each, in one of two ways.

`fsdp` (arXiv 2304.11277, by `torch.distributed.fsdp.fully_shard`): each holds an equal part of every block's weights.
Before a block computes, forward or backward, its weights are gathered from all, packed as they are, and afterwards let
go. The values are those of the whole base, bit for bit; each process computes rows of its own. What is outside of the
blocks (embeddings, head, last norm), the constants of 4-bit blocks and the adapter stay whole in each process. All
must compute a block equally often, though their shares of rows may differ: `together` lets those that are done compute
along with the others, for no result of their own.

`tensor` (Megatron-LM, arXiv 1909.08053, section 3, by transformers and PEFT): each holds some of the attention heads,
of the MLPs' columns and of the adapter's rows and columns that belong to them. All compute the same rows, and add up
what they have twice a layer, in another order than one process does.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError
from pipeline.model import checkpoint
from pipeline.model import processes as distributed

if TYPE_CHECKING:
    import torch

SPLIT = frozenset({"colwise", "rowwise", "replicated_with_grad_allreduce"})
"""How transformers may divide what a layer holds: those that PEFT's adapters follow, and norms of single heads."""


@contextmanager
def in_turn() -> Iterator[None]:
    """The body runs in one process of a machine after another, so that main memory holds one whole base at a time."""
    own, turns = int(os.environ["LOCAL_RANK"]), max(distributed.gather(distributed.local_processes()))
    for turn in range(turns):
        if turn == own:
            yield
        distributed.gather(turn)


def mesh(device: "torch.device") -> Any:
    """All processes in one row; each of them must call this."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (distributed.count(),))


def apply(model: Any, device: "torch.device", mesh: Any) -> None:
    """Divide the blocks of a base that is whole in main memory over the processes of `mesh`, each on its `device`."""
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_decoder()
    for block in decoder.layers:
        block.to(device)
        packed = [(layer, layer.weight) for layer in block.modules() if getattr(layer, "quant_state", None) is not None]
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for layer, whole in packed:  # what is left of them: the constants, and what PEFT asks a weight for
            layer.quant_state = whole.quant_state
            layer.weight.quant_type, layer.weight.compress_statistics = whole.quant_type, whole.compress_statistics
    divided = set(decoder.layers.parameters())
    for part in (*decoder.children(), model.get_output_embeddings()):
        if part is not decoder.layers:
            part.to(device)
    # It holds nothing divided itself: it lets the next block's weights come while one computes.
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - divided)
    decoder.sharding, decoder.pace = "fsdp", Pace(decoder)


def rehearse(model: Any) -> None:
    """Gather each block once: what cannot be gathered fails here, and the buffers for it are made outside of inference
    mode, where they could not be written otherwise."""
    for block in model.get_decoder().layers:
        block.unshard()
        block.reshard()


@contextmanager
def together(model: Any, backward: bool = False) -> Iterator[None]:
    """The body computes this process's share, which may be none; left when all processes have computed theirs.

    With `backward`, each forward pass of the body is followed by a backward one, and what `.grad` holds afterwards is
    of no use.
    """
    yield
    pace = getattr(_decoder(model), "pace", None)
    if pace is not None:
        pace.wait(backward)


def kind(model: Any) -> str:
    """As `runtime.sharding`, of a loaded model with or without an adapter."""
    return getattr(_decoder(model), "sharding", "none")


def _decoder(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()


class Pace:
    """Each forward pass through a divided base begins with a sum over all processes: 1 from each that has work."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.is_waiting = decoder, False
        decoder.register_forward_pre_hook(self._announce)

    def wait(self, backward: bool) -> None:
        """Compute along for as long as any process has work."""
        import torch

        ids_1x1 = torch.zeros(1, 1, dtype=torch.long, device=next(self.decoder.parameters()).device)
        self.is_waiting = True
        while distributed.add_up(0.0) > 0:
            with torch.set_grad_enabled(backward):
                hidden_1x1xH = self.decoder(input_ids=ids_1x1, use_cache=False).last_hidden_state
            if backward:
                hidden_1x1xH.sum().backward()
        self.is_waiting = False

    def _announce(self, *_: Any) -> None:
        if not self.is_waiting:
            distributed.add_up(1.0)


# Heads and columns


def split(folder: Path, device: "torch.device") -> Any:
    """A checkpoint of which this process holds some of the heads and columns, on `device`.

    UserError for heads, key-value heads or columns that the processes do not divide, for a family that transformers
    does not split in this way, and for a device that is not the one which transformers takes.
    """
    import torch
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    if device.type != (there := torch._C._get_accelerator().type):
        raise UserError(
            f"runtime.sharding = 'tensor' computes on this machine's {there}, and runtime.device asks for "
            f"{device.type}: set it to auto, or sharding to fsdp"
        )
    require_divisible(AutoConfig.from_pretrained(folder), distributed.count())
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every layer that is not split: embeddings, norms and head
    try:
        config = DistributedConfig(tp_size=distributed.count(), tp_plan="auto")
        model = checkpoint.pretrained(folder, None, distributed_config=config)
    finally:
        logging.set_verbosity(verbosity)
    model.get_decoder().sharding = "tensor"
    return model


def require_divisible(config: Any, count: int) -> None:
    """UserError unless a model of this configuration can be split over `count` processes, and adapters with it."""
    instead, plan = "set runtime.sharding to fsdp", config.base_model_tp_plan
    if not plan or not set(plan.values()) <= SPLIT:
        raise UserError(
            f"runtime.sharding = 'tensor', but models of the family {config.model_type} are not split by heads and "
            f"columns in transformers: {instead}"
        )
    sizes = {
        "attention heads": config.num_attention_heads,
        "key-value heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "columns in its MLPs": config.intermediate_size,
    }
    odd = [f"{size} {name}" for name, size in sizes.items() if size % count]
    if odd:
        raise UserError(
            f"runtime.sharding = 'tensor' over {count} processes, which do not divide this model: it has "
            f"{' and '.join(odd)}; set runtime.processes to a number that divides them, or {instead}"
        )


def fit(adapted: Any) -> None:
    """Mend the adapter that PEFT has put on split layers: its layers say the sizes of their parts, and transformers
    takes them for those of the whole."""
    for layer in adapters(adapted):
        for part in (*layer.lora_A.values(), *layer.lora_B.values()):
            part.out_features, part.in_features = part.weight.shape


def draw(adapted: Any, seed: int) -> None:
    """Let a fresh adapter on split layers start as it does on whole ones: what PEFT draws, in its order."""
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
    """All of a tensor of which processes may hold parts; all of them must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(whole: "torch.Tensor", like: "torch.Tensor") -> "torch.Tensor":
    """Of a tensor that every process has whole, the part that this one has of `like`; all, where that is whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
