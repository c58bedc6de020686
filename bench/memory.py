"""Predicted against measured memory: `pipeline.model.memory` beside the peaks of the default experiment's model on a
CPU.

    python -m bench.memory                 measure every setting, and write bench/memory.json and docs/memory.md
    python -m bench.memory --again         write docs/memory.md from bench/memory.json
    python -m bench.memory JSON            one measurement, in its own process

It reads the default experiment's outputs (`dvc repro` first). A peak is that of the resident set, which includes files
that are mapped while a checkpoint is read. Neither CUDA nor MPS has been measured.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.engines import Task, peak_mb
from pipeline.commands import use
from pipeline.core import params, paths
from pipeline.lora import start
from pipeline.lora import train as training
from pipeline.model import checkpoint, loss, memory, pack, packed
from pipeline.model import load as models
from pipeline.model.prompt import Row
from pipeline.model.shape import Shape
from pipeline.quantize import blocks, grouped

MEASURED = Path("bench/memory.json")
PAGE = Path("docs/memory.md")
RECIPE = "samsum-smollm2-135m"
"""A recipe that states the architecture of the default model."""

STEPS = 2
ANSWER = 8
"""One token in so many belongs to an answer."""

Setting = dict[str, Any]

SETTINGS: list[tuple[str, Setting]] = [
    ("quantize", {"method": "nf4", "double_quantization": True}),
    ("quantize", {"method": "int8", "double_quantization": False}),
    ("quantize", {"method": "hqq", "group_size": 64}),
    ("train", {"tokens": 512, "rows": 1}),
    ("train", {"tokens": 1024, "rows": 1}),
    ("train", {"tokens": 2048, "rows": 1}),
    ("train", {"tokens": 256, "rows": 3}),
    ("train", {"tokens": 256, "rows": 8}),
    ("train", {"tokens": 512, "rows": 1, "r": 64}),
    ("train", {"tokens": 512, "rows": 1, "r": 256}),
    ("train", {"tokens": 512, "rows": 1, "r": 256, "optimizer": "adamw8bit"}),
    ("train", {"tokens": 2048, "rows": 1, "gradient_checkpointing": True}),
    ("train", {"tokens": 256, "rows": 8, "gradient_checkpointing": True}),
    ("train", {"tokens": 512, "rows": 1, "keep_dequantized": False}),
    ("train", {"tokens": 512, "rows": 1, "keep_dequantized": False, "gradient_checkpointing": True}),
]

EXPERIMENT: list[tuple[str, Setting, str]] = [
    ("quantize", {"method": "nf4", "double_quantization": True}, "models-quantized"),
    ("train", {"tokens": 1498, "rows": 1, "answer": 262}, "training-17"),
    ("infer", {"prompt": 386, "max_new_tokens": 80}, "predictions-base"),
    ("infer", {"prompt": 386, "max_new_tokens": 80, "adapter": 4_884_480}, "predictions-tuned-17"),
]
"""The stages of the default experiment, by its largest group and prompt; `dvc repro` notes their peaks in out/costs."""


# Predicted


def predicted(stage: str, setting: Setting) -> memory.Parts:
    """The prediction for the default model on a CPU. Values that `setting` lacks are the default experiment's."""
    given = params.load(use.DEFAULT)
    base = memory.Base(_shape(), "bfloat16", "nf4", True, setting.get("keep_dequantized", True))
    stage = stage.partition(" ")[0]
    if stage == "quantize":
        double, group_size = setting.get("double_quantization", False), setting.get("group_size")
        base = memory.Base(base.shape, base.dtype, setting["method"], double, False, group_size)
        return memory.quantizing(base, "cpu", rows=setting.get("calibration_rows", 0))
    if stage == "train":
        lora, train = _of(given.lora, setting), _of(given.train, setting)
        tokens = setting["tokens"]
        load = memory.Load(tokens * setting["rows"], _answer(setting) * setting["rows"], tokens)
        return memory.training(base, lora, train, load, "cpu", setting.get("gradient_checkpointing", False))
    generation = _of(given.generation, setting)
    return memory.inference(base, generation, setting["prompt"], setting.get("adapter", 0), "cpu")


def _shape() -> Shape:
    shape = use.stated_shape(RECIPE)
    assert shape is not None
    return shape


def _of(section: params.S, setting: Setting) -> params.S:
    return section.model_copy(update={key: setting[key] for key in setting if key in type(section).model_fields})


def _answer(setting: Setting) -> int:
    answer: int = setting.get("answer", setting["tokens"] // ANSWER)
    return answer


# Measured


def quantizing(setting: Setting) -> None:
    """Hold in memory what the stage quantize holds; nothing is left on the disk."""
    task = Task()
    base = checkpoint.pretrained(paths.BASE, task.device)
    windows = [list(range(100, 100 + memory.WINDOW))] * 2
    loss.perplexity(base, windows, "before")
    given = _of(task.params.quantize, setting)
    if given.method in params.GROUPED:
        drawn = [list(range(at, at + memory.WINDOW)) for at in range(100, 100 + setting.get("calibration_rows", 0))]
        grouped.replace(base, given, drawn)
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            quantized = checkpoint.pretrained(Path(folder), task.device)
    else:
        config = blocks.config(given, base.dtype)
        quantized = checkpoint.pretrained(paths.BASE, task.device, quantization_config=config)
        blocks.reconstruction(base, quantized)
        packed.keep_unpacked(quantized)
    loss.perplexity(quantized, windows, "after")


def train(setting: Setting) -> None:
    """Training steps on drawn tokens: `rows` rows of `tokens` tokens in one micro-batch."""
    import torch

    task = Task()
    tokens, rows, answer = setting["tokens"], setting["rows"], _answer(setting)
    model = models.quantized(task.device, setting.get("keep_dequantized", True))
    adapted = start.attach(model, _of(task.params.lora, setting), 17)
    if setting.get("gradient_checkpointing", False):
        adapted.get_base_model().activation_checkpointing_enable()
    settings = _of(task.params.train, {**setting, "micro_batch_tokens": tokens * rows})
    trainer = training.Trainer(adapted, settings, 17, STEPS)
    for number in range(STEPS):
        drawn = torch.randint(100, 10_000, (rows, tokens + 1), generator=torch.Generator().manual_seed(number)).tolist()
        trees = [pack.tree([Row("", "", ids[:-answer], ids[-answer:])]) for ids in drawn]
        trainer.step(trees, 0.0)
        trainer.validate(trees)


MEASURES = {"quantize": quantizing, "train": train}


def measured() -> list[dict[str, Any]]:
    found = []
    for stage, setting in SETTINGS:
        command = [sys.executable, "-m", "bench.memory", json.dumps([stage, setting])]
        printed = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
        found.append({"stage": stage, "setting": setting, "bytes": int(printed.splitlines()[-1])})
        print(json.dumps(found[-1]), flush=True)
    for stage, setting, name in EXPERIMENT:
        cost = json.loads((paths.COSTS / f"{name}.json").read_text(encoding="utf-8"))
        found.append(
            {"stage": f"{stage} of `dvc repro`", "setting": setting, "bytes": int(cost["peak_memory_mb"] * 2**20)}
        )
    return found


def page(found: list[dict[str, Any]]) -> str:
    lines = [
        "# Predicted and measured memory",
        "",
        "The default model (SmolLM2-135M-Instruct, NF4 with double quantization, bfloat16) ran on two CPU cores. The",
        "peak is the largest resident set of the process, Python and libraries included. A value that a setting does",
        "not name is the default experiment's. `python -m bench.memory` measures and writes this page.",
        "",
        "Not measured: dropout, beam search, a base that processes share, other families and larger models. **Neither",
        "CUDA nor MPS has been measured.** For them the same counts are taken for weights, adapter, optimizer,",
        "activations, logits, keys and values; the loss to fragmentation is assumed.",
        "",
        "| stage | setting | predicted | measured | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    ratios = []
    for one in found:
        prediction = memory.total(predicted(one["stage"], one["setting"]))
        ratios.append(prediction / one["bytes"])
        said = ", ".join(f"{key} {value}" for key, value in one["setting"].items())
        cells = f"{prediction / memory.GB:.2f} GB | {one['bytes'] / memory.GB:.2f} GB | {ratios[-1]:.2f}"
        lines.append(f"| {one['stage']} | {said} | {cells} |")
    lines += ["", f"Predicted over measured: {min(ratios):.2f} to {max(ratios):.2f}.", ""]
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:] in ([], ["--again"]):
        found = json.loads(MEASURED.read_text(encoding="utf-8")) if sys.argv[1:] else measured()
        MEASURED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(found), encoding="utf-8")
        return 0
    stage, setting = json.loads(sys.argv[1])
    MEASURES[stage](setting)
    print(int(peak_mb() * 2**20))
    return 0


if __name__ == "__main__":
    sys.exit(main())
