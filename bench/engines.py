"""The engines that `bench.speed` measures. Each runs one task in its own process, so that the peak memory is its own.

    python -m bench.engines ENGINE [SETTING]

prints one line of JSON. All engines read the default experiment's outputs: the same 4-bit base, rows and prompts.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts
from pipeline.infer import backend_transformers, infer, scheduler
from pipeline.lora import adapter, start, train
from pipeline.model import checkpoint, devices, fused, load, pack, packed
from pipeline.model.prompt import Encoder, Row
from pipeline.sources import source

WARM_UP = 2
"""Steps that are not timed."""

STEPS = 8
BATCH = 8
PROMPTS = 48
ALONE = 12
"""The number of prompts for engines that decode them one by one."""

SCALING_STEPS = 4
ADAPTERS = 8

LEARNING_RATE = 1e-3


class Task:
    """The default experiment's model, rows and prompts."""

    def __init__(self) -> None:
        import torch

        self.params = params.load()
        self.device = devices.choose(self.params.runtime)
        self.threads = torch.get_num_threads()
        self.tokenizer = checkpoint.tokenizer()
        self.facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
        self.encoder = Encoder(self.tokenizer, self.params.prompt, self.facts.context)

    def rows(self, count: int) -> list[Row]:
        examples = records.read_rows(paths.split("train"), records.Example)[:count]
        return [self.encoder.row(example) for example in examples]

    def prompts(self, count: int) -> list[records.Example]:
        return records.read_rows(paths.split("test"), records.Example)[:count]

    def plain_model(self, *, dense: bool) -> Any:
        """As transformers loads it: its own attention and layers; `dense` unpacks the 4-bit weights."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(paths.QUANTIZED, attn_implementation="sdpa")
        if dense:
            packed.dequantize(model)
        return model.requires_grad_(False).eval()


def rate() -> dict[str, Any]:
    """The rate of the machine's bf16 matrix product in torch: the best of several, in GFLOP/s."""
    import torch

    Task()
    best = 0.0
    for size in (1024, 2048, 4096):
        a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - started) / 1e9)
    return {"gflops": best}


def train_ours(sharing: str) -> dict[str, Any]:
    """Our training step; `sharing` is "rows" (each row by itself, 8 a batch) or "groups" (as in the experiment)."""
    task = Task()
    settings = task.params.train.model_copy(
        update={"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0.0}
    )
    model = start.attach(load.quantized(task.device, task.params.runtime.keep_dequantized), task.params.lora, 17)
    trainer = train.Trainer(model, settings, 17, STEPS + WARM_UP)
    if sharing == "rows":
        rows = task.rows(BATCH * (STEPS + WARM_UP))
        batches = [[pack.tree([row]) for row in rows[at : at + BATCH]] for at in range(0, len(rows), BATCH)]
    else:
        trees = pack.trees(task.rows(10_000))
        batches = train.batches(trees, settings.batch_size, 17)[: STEPS + WARM_UP]
    for number, batch in enumerate(batches):
        if number == WARM_UP:
            started = time.perf_counter()
        trainer.step(batch, 0.0)
    timed = batches[WARM_UP:]
    return {
        "seconds": time.perf_counter() - started,
        "losses": [step.loss for step in trainer.log],
        "rows": sum(len(tree.branches) for batch in timed for tree in batch),
        "tokens": sum(tree.tokens for batch in timed for tree in batch),
        "supervised": sum(tree.supervised for batch in timed for tree in batch),
        **_sizes(model),
    }


def train_trl(_: str) -> dict[str, Any]:
    """TRL's SFTTrainer on the same rows in the same order, from the same adapter, without gradient checkpointing."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    task = Task()
    rows = task.rows(BATCH * (STEPS + WARM_UP))
    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt, *row.completion],
                "completion_mask": [0] * len(row.prompt) + [1] * len(row.completion),
            }
            for row in rows
        ]
    )
    setattr(fused, "apply", lambda _: None)  # noqa: B010  # the adapter as PEFT computes it
    model = start.attach(task.plain_model(dense=False), task.params.lora, 17)
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    trainer = SFTTrainer(
        model=model,
        train_dataset=dataset,
        processing_class=task.tokenizer,
        callbacks=[Clock()],
        args=SFTConfig(
            output_dir=str(paths.SCRATCH / "trl"),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            max_length=None,
            packing=False,
            bf16=True,
            use_cpu=task.device.type == "cpu",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    trainer.train()
    timed = rows[BATCH * WARM_UP :]
    return {
        "seconds": marks[-1] - marks[WARM_UP - 1],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": len(timed),
        "tokens": sum(len(row.prompt) + len(row.completion) - 1 for row in timed),
        "supervised": sum(len(row.completion) for row in timed),
        **_sizes(model),
    }


def train_scaling(setting: str) -> dict[str, Any]:
    """Our training step on drawn tokens; `setting` is <tokens a row>x<rows a step>x<rank>."""
    import torch

    length, count, rank = map(int, setting.split("x"))
    task = Task()
    settings = task.params.train.model_copy(update={"warmup": 0.0})
    lora = task.params.lora.model_copy(update={"r": rank})
    model = start.attach(load.quantized(task.device, task.params.runtime.keep_dequantized), lora, 17)
    trainer = train.Trainer(model, settings, 17, SCALING_STEPS + WARM_UP)
    answer = length // 8
    for number in range(SCALING_STEPS + WARM_UP):
        drawn = torch.randint(
            100, 10_000, (count, length + 1), generator=torch.Generator().manual_seed(number)
        ).tolist()
        if number == WARM_UP:
            started = time.perf_counter()
        trainer.step([pack.tree([Row("", "", ids[:-answer], ids[-answer:])]) for ids in drawn], 0.0)
    return {"seconds": time.perf_counter() - started, "steps": SCALING_STEPS, "tokens": SCALING_STEPS * count * length}


def adapters(_: str) -> dict[str, Any]:
    """The seconds that loading and switching of several adapters on one base take."""
    task = Task()
    trained = adapter.Saved(paths.adapter(task.params.seeds[0]))
    started = time.perf_counter()
    model = load.quantized(task.device, task.params.runtime.keep_dequantized)
    loaded = time.perf_counter()
    for number in range(ADAPTERS):
        model = trained.load(model, task.facts.sha256, f"adapter {number}")
    added = time.perf_counter()
    for number in range(ADAPTERS):
        model.set_adapter(f"adapter {number}")
    done = time.perf_counter()
    return {
        "load_base": loaded - started,
        "add_adapter": (added - loaded) / ADAPTERS,
        "switch": (done - added) / ADAPTERS,
    }


def infer_ours(setting: str) -> dict[str, Any]:
    """Our scheduler, as the stage `infer` runs it. `setting`: the number of prompts, or `float32`."""
    task = Task()
    model = load.quantized(task.device, keep_dequantized=True)
    examples = task.prompts(ALONE if setting == "float32" else int(setting))
    if setting == "float32":
        model = model.float()
    config = infer.configuration(task.params.generation, [task.encoder.end], task.tokenizer)
    limits = task.params.generation

    def run(examples: list[records.Example]) -> dict[str, list[int]]:
        families = [
            [scheduler.Request(example.id, task.encoder.prompt(example)) for example in group]
            for _, group in groupby(examples, key=lambda example: example.group)
        ]
        finished = scheduler.decode(model, config, families, limits.batch_size, limits.batch_tokens)
        return {request.name: request.new for request in finished}

    return _timed(run, examples)


def infer_transformers(setting: str) -> dict[str, Any]:
    """`transformers.generate` in batches of similar length: `<size>` in bfloat16, `float32` one by one."""
    task = Task()
    model = task.plain_model(dense=True)
    single = setting in ("1", "float32")
    if setting == "float32":
        model = model.float()
    size = 1 if single else int(setting)
    config = infer.configuration(task.params.generation, [task.encoder.end], task.tokenizer)

    def run(examples: list[records.Example]) -> dict[str, list[int]]:
        prompts = {example.id: task.encoder.prompt(example) for example in examples}
        names = sorted(prompts, key=lambda name: -len(prompts[name]))
        found: dict[str, list[int]] = {}
        for batch in (names[at : at + size] for at in range(0, len(names), size)):
            outputs = backend_transformers.beam_search(model, config, [prompts[name] for name in batch])
            found |= dict(zip(batch, outputs, strict=True))
        return found

    return _timed(run, task.prompts(ALONE if single else PROMPTS))


def infer_llamacpp(setting: str) -> dict[str, Any]:
    """llama.cpp (xllamacpp's prebuilt wheel) on the GGUF that the base was read from, in `setting` slots."""
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    task = Task()
    slots = int(setting)
    wanted = task.params.model
    with source.resolved(wanted.source, wanted.sha256, kind="model", key="model.source") as file:
        server_params = xllamacpp.CommonParams()
        server_params.model.path = str(file)
        server_params.n_parallel = slots
        server_params.n_ctx = 1024 * slots
        server_params.cpuparams.n_threads = task.threads
        server_params.cpuparams_batch.n_threads = task.threads
        server = xllamacpp.Server(server_params)

        def ask(example: records.Example) -> tuple[str, list[int]]:
            answer = server.handle_completions(
                {
                    "prompt": task.encoder.prompt(example),
                    "n_predict": task.params.generation.max_new_tokens,
                    "temperature": 0,
                    "return_tokens": True,
                }
            )
            answer = json.loads(answer) if isinstance(answer, str) else answer
            return example.id, answer["tokens"] if "tokens" in answer else [0] * answer["usage"]["completion_tokens"]

        def run(examples: list[records.Example]) -> dict[str, list[int]]:
            with ThreadPoolExecutor(slots) as pool:
                return dict(pool.map(ask, examples))

        return _timed(run, task.prompts(PROMPTS))


ENGINES: dict[str, Callable[[str], dict[str, Any]]] = {
    "rate": lambda _: rate(),
    "train-ours": train_ours,
    "train-trl": train_trl,
    "train-scaling": train_scaling,
    "adapters": adapters,
    "infer-ours": infer_ours,
    "infer-transformers": infer_transformers,
    "infer-llamacpp": infer_llamacpp,
}


def _timed(
    run: Callable[[list[records.Example]], dict[str, list[int]]], examples: list[records.Example]
) -> dict[str, Any]:
    run(examples[-3:])  # so that kernels are built before the clock starts
    started = time.perf_counter()
    outputs = run(examples)
    return {
        "seconds": time.perf_counter() - started,
        "examples": len(outputs),
        "tokens": sum(map(len, outputs.values())),
        "outputs": outputs,
    }


def _sizes(model: Any) -> dict[str, int]:
    """The sizes from which the arithmetic of a step is computed."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = sum(
        module.in_features * module.out_features
        for name, module in base.named_modules()
        if module is not head and hasattr(module, "in_features") and "lora_" not in name and "base_layer" not in name
    )
    return {"linear": linear, "adapter": trainable, "head": head.in_features * head.out_features}


def peak_mb() -> float:
    """The most main memory that this process has held at once, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    engine, setting = sys.argv[1], (sys.argv[2:] or [""])[0]
    if not Path(paths.QUANTIZED_FACTS).is_file():
        sys.exit("error: bench measures on the experiment's data and 4-bit base: run `dvc repro` first")
    result = ENGINES[engine](setting)
    print("result " + json.dumps(result | {"peak_mb": peak_mb()}), flush=True)


if __name__ == "__main__":
    main()
