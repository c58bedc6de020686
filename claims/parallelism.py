"""The model's attention heads and MLP columns divided over processes (Megatron-LM, arXiv 1909.08053, section 3).

A member holds the rows of the query, key, value, gate and up projections for its heads and columns, the columns of the
output and down projections that read them, and its share of the vocabulary's rows in the head. It computes one summand
of each sublayer, and all members add theirs up, twice in a layer. The formulas and the names of dimensions are those of
`claims.architecture`.
"""

import multiprocessing
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from claims import architecture, evidence, lab
from claims.architecture import attended, rms_norm, rotated, swiglu
from claims.evidence import Evidence
from pipeline.core.errors import UserError
from pipeline.model import checkpoint

PROCESSES = 3
"""They divide the base's 9 query heads and 3 key-value heads."""
SECONDS_FOR_ALL = 600.0


@dataclass(frozen=True, slots=True)
class Task:
    """The work of all members: the checkpoint, the text, and the folder in which they meet and leave results."""

    base: Path
    folder: Path
    ids: list[int]
    layers: int
    head_size: int
    epsilon: float
    theta: float
    tied: bool
    processes: int


def model_parallelism() -> Evidence:
    """The logits of the whole model in one process against those that the members compute together."""
    import torch

    model, ids_1xL = architecture.base(), architecture.ids()
    facts = checkpoint.architecture(model)
    divided = {name: getattr(facts, name) for name in ("attention_heads", "key_value_heads", "intermediate_size")}
    if uneven := [f"{name} = {count}" for name, count in divided.items() if count % PROCESSES]:
        raise UserError(f"the base cannot be divided over {PROCESSES} processes: {', '.join(uneven)}")
    with torch.no_grad():
        expected_LxV = model(ids_1xL).logits[0]
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        task = Task(
            lab.BASE.resolve(), Path(folder), ids_1xL[0].tolist(), facts.layers, facts.head_dim,
            model.config.rms_norm_eps, architecture.theta(model), facts.tied_embeddings, PROCESSES,
        )  # fmt: skip
        _run(task)
        parts = [torch.load(task.folder / f"{rank}.pt") for rank in range(PROCESSES)]
    found_LxV = torch.cat([part["logits_Lxv"] for part in parts], -1)
    matrices = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
    return Evidence(
        {
            "processes": PROCESSES,
            "query_heads_a_process": facts.attention_heads / PROCESSES,
            "key_value_heads_a_process": facts.key_value_heads / PROCESSES,
            "layer_weights_a_process": [part["weights"] / matrices for part in parts],
            "share": 1 / PROCESSES,
            "logits_difference": float((found_LxV - expected_LxV).abs().max()),
        },
        ["layer_weights_a_process: the share of the layers' matrices that each process has read."],
    )


def _run(task: Task) -> None:
    """Run all members, each in its own process; RuntimeError if one fails or does not end."""
    processes = multiprocessing.get_context("spawn")
    members = [processes.Process(target=member, args=(rank, task)) for rank in range(task.processes)]
    try:
        for one in members:
            one.start()
        running: dict[Any, Any] = {one.sentinel: one for one in members}
        while running:
            ended = [running.pop(sentinel) for sentinel in wait(list(running), SECONDS_FOR_ALL)]
            for one in ended:
                one.join()
            if not ended or any(one.exitcode for one in ended):
                raise RuntimeError(f"a divided model did not end well: {[one.exitcode for one in members]}")
    finally:
        for one in members:
            if one.is_alive():
                one.kill()
                one.join()


def member(rank: int, task: Task) -> None:
    """One member's work: write its columns of the logits, and the number of weights that it has read."""
    import torch
    from safetensors import safe_open
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{task.folder / 'meeting'}", rank=rank, world_size=task.processes
    )
    count = 0
    with safe_open(task.base / "model.safetensors", "pt") as stored, torch.no_grad():

        def share(name: str, dim: int) -> torch.Tensor:
            nonlocal count
            slices: Any = stored.get_slice(f"{name}.weight")
            size = slices.get_shape()[dim]
            here = slice(rank * size // task.processes, (rank + 1) * size // task.processes)
            found: torch.Tensor = slices[here] if dim == 0 else slices[:, here]
            count += found.numel()
            return found.float()

        def norm(states_LxC: torch.Tensor, name: str) -> torch.Tensor:
            return rms_norm(states_LxC, stored.get_tensor(f"{name}.weight").float(), task.epsilon)

        stream_LxC = stored.get_tensor("model.embed_tokens.weight")[task.ids].float()
        positions_L = torch.arange(len(task.ids))
        for number in range(task.layers):
            layer = f"model.layers.{number}"
            x_LxC = norm(stream_LxC, f"{layer}.input_layernorm")
            query, key, value = (
                (x_LxC @ share(f"{layer}.self_attn.{kind}_proj", 0).T)
                .unflatten(-1, (-1, task.head_size))
                .transpose(0, 1)
                for kind in "qkv"
            )
            query, key = (rotated(states, positions_L, task.theta) for states in (query, key))
            group = len(query) // len(key)
            heads = [attended(query[head], key[head // group], value[head // group]) for head in range(len(query))]
            summand_LxC = torch.cat(heads, -1) @ share(f"{layer}.self_attn.o_proj", 1).T
            distributed.all_reduce(summand_LxC)
            stream_LxC = stream_LxC + summand_LxC
            gate, up = (share(f"{layer}.mlp.{kind}_proj", 0) for kind in ("gate", "up"))
            x_LxC = norm(stream_LxC, f"{layer}.post_attention_layernorm")
            summand_LxC = swiglu(x_LxC, gate, up, share(f"{layer}.mlp.down_proj", 1))
            distributed.all_reduce(summand_LxC)
            stream_LxC = stream_LxC + summand_LxC
        weights = count
        head_vxC = share("model.embed_tokens" if task.tied else "lm_head", 0)
        logits_Lxv = norm(stream_LxC, "model.norm") @ head_vxC.T
    torch.save({"logits_Lxv": logits_Lxv, "weights": weights}, task.folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    evidence.main({"model-parallelism": model_parallelism})
