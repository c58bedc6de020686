"""llama.cpp computes what transformers computes, from files that hold the same numbers, and stops where it should."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import adapter, generate, params, paths, quantize, records
from pipeline import model as models
from pipeline.records import Prediction
from tests.test_families import made

CPU = torch.device("cpu")


def quantized(project: params.Params, checkpoint: Path, method: str = "none") -> params.Params:
    """The project with this base; float32 throughout, so that two engines can write the same tokens."""
    shutil.copytree(checkpoint, paths.BASE)
    facts = {"context": 512, "dtype": "float32", "stop_ids": [1], "sha256": records.sha256_tree(paths.BASE)}
    records.write_json(paths.BASE_FACTS, facts)
    settings = {"method": method, "double_quantization": method != "none"}
    quantize.quantize(project.quantize.model_copy(update=settings), project.runtime)
    return project


def trained(rslora: bool, seed: int = 17) -> adapter.Saved:
    """An adapter whose B is not zero."""
    lora = params.Lora(r=4, alpha=8.0, rslora=rslora, dropout=0.0, target_modules="all-linear")
    adapted = adapter.attach(models.load(CPU, keep_dequantized=True), lora, seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for tensor in adapter.tensors(adapted).values():
            tensor.normal_(std=0.2)
    adapter.save(adapted, paths.adapter(seed), records.read_json(paths.QUANTIZED_FACTS)["sha256"])
    return adapter.Saved(paths.adapter(seed))


def infer(project: params.Params, variant: str, saved: adapter.Saved | None, **changes: Any) -> list[Prediction]:
    generation = project.generation.model_copy(update={"gguf_type": "F32", "max_new_tokens": 16} | changes)
    generate.infer(variant, project.prompt, generation, project.runtime, saved)
    return records.read_rows(paths.predictions(variant), Prediction)


@pytest.mark.parametrize(
    ("family", "tied", "method"),
    [
        ("llama", True, "none"),
        ("llama", False, "nf4"),
        ("mistral", True, "none"),
        ("qwen2", True, "none"),
        ("qwen3", False, "none"),
    ],
)
def test_base_and_adapted_write_what_transformers_writes(
    project: params.Params, tiny_model: Path, tmp_path: Path, family: str, tied: bool, method: str
) -> None:
    quantized(project, made(family, tied, tiny_model, tmp_path / family), method)
    saved = trained(rslora=family == "llama")
    written = {}
    for name in ("transformers", "llama.cpp"):
        written[name] = [infer(project, "base", None, backend=name), infer(project, "tuned-17", saved, backend=name)]
        told = records.read_json(paths.decoding("tuned-17"))
        assert told["generation"]["backend"] == name
        assert told["recheck"] == {"examples": 4, "identical": 4}
    assert written["llama.cpp"] == written["transformers"]
    assert written["llama.cpp"][0] != written["llama.cpp"][1]
    assert list(paths.SCRATCH.glob(".*.part")) == []
