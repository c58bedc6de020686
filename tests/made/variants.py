"""What a project's model is and writes, once its stages have run: the quantized base, adapters, predictions."""

import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.records import Prediction
from pipeline.infer import infer
from pipeline.lora import adapter, start
from pipeline.model import checkpoint, load
from pipeline.model.prompt import Encoder
from pipeline.quantize import quantize
from tests.made import parameters
from tests.made.records import base_facts


def act(model: Any) -> Any:
    """Give an adapter values with which it acts, the same for the same shapes."""
    with torch.no_grad():
        for number, (_, tensor) in enumerate(sorted(adapter.tensors(model).items())):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return model


def quantized(project: params.Params, checkpoint: Path, method: str = "none") -> params.Params:
    """The project with this base; float32 throughout, so that two engines can write the same tokens."""
    shutil.copytree(checkpoint, paths.BASE)
    contracts.write(paths.BASE_FACTS, base_facts(sha256=records.sha256_tree(paths.BASE)))
    settings = {"method": method, "double_quantization": method in ("nf4", "fp4")}
    quantize.write_quantized(project.quantize.model_copy(update=settings), project.runtime)
    return project


def trained(rslora: bool, seed: int = 17) -> adapter.Saved:
    """An adapter whose B is not zero."""
    lora = parameters.lora(rslora=rslora)
    adapted = start.attach(load.quantized(torch.device("cpu"), keep_dequantized=True), lora, seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for tensor in adapter.tensors(adapted).values():
            tensor.normal_(std=0.2)
    adapter.save(
        adapted, adapter.tensors(adapted), paths.adapter(seed), records.read_json(paths.QUANTIZED_FACTS)["sha256"]
    )
    return adapter.Saved(paths.adapter(seed))


def decoded(project: params.Params, variant: str, saved: adapter.Saved | None, **changes: Any) -> list[Prediction]:
    generation = project.generation.model_copy(update={"gguf_type": "F32", "max_new_tokens": 16} | changes)
    infer.decode(variant, project.prompt, generation, project.runtime, saved)
    return records.read_rows(paths.predictions(variant), Prediction)


def ties(project: params.Params, saved: adapter.Saved, tokens: int = 16, apart: float = 1e-4) -> set[str]:
    """The test rows in whose greedy answer two tokens are likeliest at once: their logits are less than `apart`."""
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    encoder = Encoder(checkpoint.tokenizer(), project.prompt, facts.context)
    model = saved.load(load.quantized(torch.device("cpu"), keep_dequantized=True), facts.sha256)
    found = set()
    for row in records.read_rows(paths.split("test"), records.Example):
        ids = list(encoder.prompt(row))
        for _ in range(tokens):
            with torch.no_grad():
                best = model(input_ids=torch.tensor([ids])).logits[0, -1].float().topk(2)
            if float(best.values[0] - best.values[1]) < apart:
                found.add(row.id)
            ids.append(int(best.indices[0]))
    return found
