"""Memory is predicted from the architecture, errs to the safe side, and what does not fit is refused with what does."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from bench import memory as bench
from pipeline.commands import cli, plan, use
from pipeline.core import contracts, params, paths, records
from pipeline.core.errors import UserError
from pipeline.fetch import hub_layout
from pipeline.infer import backend_transformers, infer, scheduler
from pipeline.lora import (
    train,  # fmt: skip
)
from pipeline.model import adapted, attention, checkpoint, devices, memory, pack
from pipeline.model import load as models
from pipeline.model.prompt import Row
from pipeline.model.shape import Shape
from pipeline.quantize import quantize
from tests import ROOT
from tests.made import parameters
from tests.made.models import of_family
from tests.made.records import base_facts, quantized_facts

GB = memory.GB
SIZES = {
    "samsum-7b": 6_738_415_616,
    "cnn-dailymail-llama31-8b": 8_030_261_248,
    "dialogsum-llama2-13b": 13_015_864_320,
    "samsum-llama2-70b": 68_976_648_192,
}
"""As the hub counts the parameters of these models (without the buffers that some checkpoints hold)."""


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def cuda(monkeypatch: pytest.MonkeyPatch, free_gb: float) -> torch.device:
    """A CUDA device of so much free memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free_gb * GB), 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    return torch.device("cuda")


def llama(keep_dequantized: bool = True) -> memory.Base:
    """Llama-2-7B in NF4."""
    shape = use.stated_shape("samsum-7b")
    assert shape is not None
    return memory.Base(shape, "bfloat16", "nf4", True, keep_dequantized)


def sections(**changes: Any) -> tuple[params.Lora, params.Train]:
    given = params.load(use.DEFAULT)
    return given.lora, given.train.model_copy(update=changes)


# What is counted


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(("recipe", "parameters"), SIZES.items())
def test_the_parameters_of_a_stated_architecture_are_those_of_the_model(recipe: str, parameters: int) -> None:
    shape = use.stated_shape(recipe)
    assert shape is not None
    assert shape.parameters == parameters


def test_the_architecture_of_a_checkpoint_is_read_and_its_parameters_counted(tiny_model: Path) -> None:
    shape = Shape.read(tiny_model)
    model = checkpoint.pretrained(tiny_model, torch.device("cpu"))
    assert shape.parameters == checkpoint.architecture(model).parameters
    assert shape.group == 2


@pytest.mark.parametrize("family", hub_layout.FAMILIES)
def test_every_family_that_is_taken_is_counted(family: str, tiny_model: Path, tmp_path: Path) -> None:
    """All but biases and additional norms: a hundredth of these small models."""
    folder = of_family(family, tied=False, tiny_model=tiny_model, folder=tmp_path)
    shape, facts = Shape.read(folder), checkpoint.architecture(checkpoint.pretrained(folder, torch.device("cpu")))
    assert shape.parameters == pytest.approx(facts.parameters, rel=0.01)
    assert sorted(shape.linears) == facts.linear_layers


def test_weights_in_4_bits_take_what_is_measured_of_them() -> None:
    """The default model's checkpoint: 4.127 bits a parameter with double quantization (quantized.json), 111.9 MB."""
    base = memory.Base(bench._shape(), "bfloat16", "nf4", True, keep_dequantized=False)
    assert base.packed_bytes == pytest.approx(111_879_761, rel=0.01)
    assert memory.Base(base.shape, "bfloat16", "nf4", True, keep_dequantized=True).weights == base.dense_bytes


@pytest.mark.parametrize(("group_size", "bits"), [(32, 5.0), (64, 4.5), (128, 4.25)])
def test_weights_in_groups_take_their_bits_and_are_unpacked_for_each_use_or_once(group_size: int, bits: float) -> None:
    base = memory.Base(bench._shape(), "bfloat16", "hqq", False, False, group_size)
    other = base.shape.other_parameters * 2
    assert base.packed_bytes == base.shape.linear_parameters * bits / 8 + other
    assert base.weights == base.packed_bytes
    kept = replace(base, keep_dequantized=True)
    assert kept.weights == base.dense_bytes
    assert base.unpacking > 0 == kept.unpacking
    assert memory.total(memory.quantizing(base, "cpu", rows=128)) > memory.total(memory.quantizing(base, "cpu"))


@pytest.mark.parametrize(
    ("length", "changes", "most"),
    [
        (256, {}, 1.05),
        (832, {}, 1.05),
        (256, {"init": "pissa"}, 1.05),
        (256, {"rank_pattern": {"q_proj": 32, "down_proj": 1}}, 1.05),
        (256, {"train_only": "B"}, 1.15),
        (256, {"train_only": "A", "init": "orthogonal"}, 1.05),
        (256, {"dora": True}, 1.2),
    ],
)
def test_activations_are_what_a_layer_keeps(
    tiny_model: Path, length: int, changes: dict[str, Any], most: float
) -> None:
    """Tensors saved for the backward pass, each storage once, of the layers that training computes.

    832 tokens are attended to in tiles; up to 768, the weights of attention are kept."""
    lora = parameters.lora(**changes)
    shape = Shape.read(tiny_model)
    saved = []
    for layers in (2, 4):
        model = deeper(tiny_model, layers)
        trainer = train.Trainer(_attached(model, lora), sections()[1], 7, 1)
        trainer.model.train()
        ids = [20 + at % 60 for at in range(length + 1)]
        packed = pack.pack([pack.tree([Row("", "", ids[:-4], ids[-4:])])], torch.device("cpu"))
        saved.append(_saved_bytes(trainer.model, packed))
    tokens = packed.input_ids_1xL.numel()
    base = memory.Base(shape, "float32", "none", False, keep_dequantized=True)
    [ranks] = adapted.blocks(shape, lora)
    kept = memory._kept_a_token(base, lora, ranks, length, "cpu")
    predicted = tokens * kept + 4 * memory._joined(shape, lora, ranks)
    ratio = predicted / ((saved[1] - saved[0]) / 2)
    assert 0.95 <= ratio <= most, ratio


def deeper(tiny_model: Path, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.model import fused

    config = LlamaConfig.from_pretrained(tiny_model, num_hidden_layers=layers, max_position_embeddings=1024)
    config._attn_implementation = attention.NAME
    model = LlamaForCausalLM(config).requires_grad_(False)
    fused.apply(model)
    return model


def _attached(model: Any, lora: params.Lora) -> Any:
    from pipeline.lora import start

    return start.attach(model, lora, 7)


def _saved_bytes(model: Any, packed: pack.Packed) -> int:
    from pipeline.model import loss

    saved: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss.summed(model, packed)
    # Joined weights replace those of the layers, so they are asked for behind the pass.
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in own)


@pytest.mark.parametrize("name", [name for name in params.OPTIMIZERS if name != "paged-adamw8bit"])
def test_the_state_of_each_optimizer_is_what_it_takes(tiny_model: Path, name: str) -> None:
    """Tensors that it keeps after a step, each storage once. All matrices are large enough for 8 bits."""
    modules = ["gate_proj", "up_proj", "down_proj"]
    lora = parameters.lora(r=64, target_modules=modules)
    given = sections(optimizer=name, beta2=None)[1]
    trainer = train.Trainer(_attached(deeper(tiny_model, 2), lora), given, 7, 1)
    trainer.step([pack.tree([Row("", "", [20, 21, 22], [23, 1])])], 0.0)
    states: Any = trainer.optimizer.state.values()  # type: ignore[union-attr]
    kept = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for state in states
        for key, one in state.items()
        if isinstance(one, torch.Tensor) and one.ndim and not key.startswith("qmap")
    }
    base = memory.Base(Shape.read(tiny_model), "float32", "none", False, keep_dequantized=True)
    predicted = memory.training(base, lora, given, memory.Load(64, 2, 64), "cpu")["optimizer"]
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.02)


def test_the_numbers_of_other_modules_are_theirs() -> None:
    assert memory.KEPT_WEIGHTS == attention.Short.COLUMNS
    assert memory.PREFILL == scheduler.PREFILL_TOKENS


def test_the_largest_micro_batch_is_found() -> None:
    rows = [Row(str(n), str(n), list(range(20, 20 + n)), [7] * 5) for n in (10, 90, 40)]
    trees = pack.trees(rows)
    assert memory.load([trees[:1], trees[1:]], 64) == memory.Load(tokens=94, answers=5, longest=94)
    assert memory.load([trees], 1000) == memory.Load(tokens=152, answers=15, longest=94)


def test_each_part_grows_with_what_it_depends_on() -> None:
    lora, settings = sections()
    load = memory.Load(2048, 256, 512)
    base = memory.training(llama(), lora, settings, load, "cuda")
    wider = memory.training(llama(), lora.model_copy(update={"r": 4 * lora.r}), settings, load, "cuda")
    longer = memory.training(llama(), lora, settings, memory.Load(4096, 256, 512), "cuda")
    answers = memory.training(llama(), lora, settings, memory.Load(2048, 512, 512), "cuda")
    eight = memory.training(llama(), lora, sections(optimizer="adamw8bit")[1], load, "cuda")
    packed = memory.training(llama(keep_dequantized=False), lora, settings, load, "cuda")
    patient = memory.training(llama(), lora, sections(early_stopping=2)[1], load, "cuda")
    muon, adafactor = (
        memory.training(llama(), lora, sections(optimizer=name)[1], load, "cuda") for name in ("muon", "adafactor")
    )
    assert wider["optimizer"] == 4 * base["optimizer"]
    assert wider["adapter"] == 4 * base["adapter"]
    assert 1.9 < longer["activations"] / base["activations"] <= 2
    assert answers["logits"] == 2 * base["logits"]
    assert eight["optimizer"] < 0.26 * base["optimizer"]
    assert muon["optimizer"] == 0.5 * base["optimizer"]
    assert adafactor["optimizer"] < 0.04 * base["optimizer"]
    assert packed["weights"] < 0.3 * base["weights"]
    assert "best adapter" not in base
    assert patient["best adapter"] > 0
    assert answers["logits"] + answers["at the peak"] >= base["logits"] + base["at the peak"]
    for other in (wider, longer, patient):
        assert memory.total(other) > memory.total(base)


def test_keys_and_values_are_bounded_by_batch_tokens_but_never_below_one_example() -> None:
    generation = params.load(use.DEFAULT).generation
    a_token = 2 * 32 * 4096 * 2 * (1 + 2 / 32)
    for batch_tokens, columns in ((8192, 8192), (64, 2032)):
        limited = generation.model_copy(update={"batch_tokens": batch_tokens})
        parts = memory.inference(llama(), limited, 1950, 0, "cuda")
        assert parts["keys and values"] == pytest.approx(columns * a_token)


# Measured


def test_predictions_lie_above_what_was_measured_and_not_far() -> None:
    measured = json.loads((ROOT / "bench" / "memory.json").read_text(encoding="utf-8"))
    stages = [(f"{stage} of `dvc repro`", setting) for stage, setting, _ in bench.EXPERIMENT]
    assert [(one["stage"], one["setting"]) for one in measured] == [*bench.SETTINGS, *stages]
    for one in measured:
        ratio = memory.total(bench.predicted(one["stage"], one["setting"])) / one["bytes"]
        assert 1.0 <= ratio <= 1.25, (one, ratio)


@pytest.mark.usefixtures("root")
def test_the_page_is_made_of_the_measurements() -> None:
    measured = json.loads(bench.MEASURED.read_text(encoding="utf-8"))
    assert bench.PAGE.read_text(encoding="utf-8") == bench.page(measured)


# What does not fit


def test_training_that_fits_is_let_through_and_one_that_does_not_is_told_what_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = cuda(monkeypatch, 23)
    lora, settings = sections(micro_batch_tokens=4096)
    fitting = memory.require_training(device, llama(False), lora, settings, memory.Load(1024, 100, 500), False)
    assert memory.total(fitting) < 23 * GB
    with pytest.raises(UserError, match=r"train takes about \d+\.\d GB of memory \(activations \d+\.\d GB") as told:
        memory.require_training(device, llama(False), lora, settings, memory.Load(4096, 400, 500), False)
    message = str(told.value)
    assert "and cuda has 23.0 GB left: set train.micro_batch_tokens to " in message
    fits = int(message.partition("micro_batch_tokens to ")[2].split()[0])
    memory.require_training(
        device, llama(False), lora, settings, memory.Load(fits, math.ceil(fits / 10.24), 500), False
    )
    with pytest.raises(UserError):
        memory.require_training(device, llama(False), lora, settings, memory.Load(fits + 64, 410, 500), False)


def test_a_group_that_is_too_long_is_told_what_else_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch, 23)
    lora, settings = sections()
    load = memory.Load(1900, 100, 1900)
    alone = "the longest group alone has 1900 tokens .*: set runtime.keep_dequantized to false or set runtime.gradient_"
    with pytest.raises(UserError, match=alone):
        memory.require_training(device, llama(), lora, settings, load, False)
    # Neither is enough by itself, nor are both with the optimizer; the two are.
    both = memory.total(memory.training(llama(False), lora, settings, load, "cuda", True))
    device = cuda(monkeypatch, both / GB)
    told = "tokens .*: set runtime.keep_dequantized to false and runtime.gradient_checkpointing to true$"
    with pytest.raises(UserError, match=told):
        memory.require_training(device, llama(), lora, settings, load, False)
    memory.require_training(device, llama(False), lora, settings, load, True)
    with pytest.raises(UserError, match="lower prompt.max_tokens or lora.r, or take a larger device or several"):
        memory.require_training(device, llama(), lora, settings, memory.Load(160_000, 100, 160_000), False)


def test_blocks_that_are_computed_again_keep_what_goes_into_them() -> None:
    lora, settings = sections()
    shape, load = llama().shape, memory.Load(4096, 100, 512)
    kept = memory.training(llama(), lora, settings, load, "cuda")["activations"]
    again = memory.training(llama(), lora, settings, load, "cuda", recomputed=True)["activations"]
    inputs, ends = (2.0 * 4096 * count * shape.hidden_size for count in (shape.layers, 2))
    assert again - inputs - ends == pytest.approx((kept - ends) / shape.layers)


def test_of_a_shared_base_each_device_holds_its_part_and_what_it_gathers() -> None:
    whole = llama(keep_dequantized=False)
    linears = whole.shape.linear_parameters / 2
    for count in (2, 8):
        part = replace(whole, sharding="fsdp", devices=count).weights
        expected = whole.packed_bytes - linears + linears / count + memory.GATHERED * linears / whole.shape.layers
        assert part == pytest.approx(expected)
        split = memory.loaded(whole, parameters.runtime(processes=count, sharding="tensor"), "cuda")
        assert split.weights == pytest.approx(whole.dense_bytes / count)
    shared = parameters.runtime(processes=8, sharding="fsdp", keep_dequantized=False)
    assert memory.loaded(whole, shared, "cpu").weights == whole.weights
    assert memory.loaded(whole, shared, "cuda").devices == 8


def test_a_base_is_not_divided_among_gpus_without_main_memory_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = parameters.runtime(processes=8, sharding="fsdp", keep_dequantized=False)
    monkeypatch.setattr(memory, "main_memory", lambda: 3 * GB)
    with pytest.raises(UserError, match="reads the base into main memory before it divides it: 3.9 GB, and 3.0 GB are"):
        memory.held(llama(keep_dequantized=False), shared, torch.device("cuda"))
    monkeypatch.setattr(memory, "main_memory", lambda: 5 * GB)
    held = memory.held(llama(keep_dequantized=False), shared, torch.device("cuda"))
    assert (held.sharding, held.devices) == ("fsdp", 8)


def test_optimizer_states_in_8_bits_are_named_where_they_make_it_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, settings = sections()
    wide, load = lora.model_copy(update={"r": 256}), memory.Load(512, 50, 512)
    packed = llama(keep_dequantized=False)
    eight = memory.training(packed, wide, sections(optimizer="paged-adamw8bit")[1], load, "cuda")
    device = cuda(monkeypatch, memory.total(eight) / GB)
    with pytest.raises(UserError, match="set train.optimizer to paged-adamw8bit"):
        memory.require_training(device, packed, wide, settings, load, False)


def test_inference_that_does_not_fit_is_told_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch, 22)
    generation = params.load(use.DEFAULT).generation
    with pytest.raises(UserError, match=r"set generation.batch_tokens to (\d+) or less \(it is 24576\)") as told:
        memory.require_inference(device, llama(), generation, 1000, 10_000_000)
    fits = int(str(told.value).partition("batch_tokens to ")[2].split()[0])
    limited = generation.model_copy(update={"batch_tokens": fits})
    memory.require_inference(device, llama(), limited, 1000, 10_000_000)
    with pytest.raises(UserError, match="set runtime.keep_dequantized to false"):
        memory.require_inference(cuda(monkeypatch, 12), llama(), generation, 1000, 0)
    with pytest.raises(UserError, match="one example alone does not fit"):
        memory.require_inference(cuda(monkeypatch, 3), llama(False), generation, 1000, 0)


def test_general_text_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.require_reading(cuda(monkeypatch, 20), llama(), 512, 0)
    with pytest.raises(
        UserError,
        match="forget takes about .* lower the largest window of forget.probes .* or set runtime.keep_dequantized",
    ):
        memory.require_reading(cuda(monkeypatch, 14), llama(), 4096, 0)


def test_a_base_too_large_for_the_device_is_quantized_from_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama(keep_dequantized=False)
    assert memory.require_quantizing(cuda(monkeypatch, 24), base).type == "cuda"
    monkeypatch.setattr(memory, "main_memory", lambda: 30 * GB)
    assert memory.require_quantizing(cuda(monkeypatch, 12), base).type == "cpu"
    with pytest.raises(UserError, match="quantize takes about .* and cuda has 2.0 GB left"):
        memory.require_quantizing(cuda(monkeypatch, 2), base)
    monkeypatch.setattr(memory, "main_memory", lambda: 10 * GB)
    with pytest.raises(UserError, match="the base by itself, 13.5 GB, does not fit into the main memory"):
        memory.require_quantizing(cuda(monkeypatch, 12), base)


# What a device has


def test_what_cuda_has_is_what_is_free_and_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda(monkeypatch, 10)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1 * GB)
    assert memory.available(device) == pytest.approx(12 * GB)


def test_what_metal_has_is_its_working_set_within_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: int(16 * GB))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: int(2 * GB))
    for main, expected in ((30, 14), (9, 9)):
        monkeypatch.setattr(memory, "main_memory", lambda main=main: main * GB)
        assert memory.available(torch.device("mps")) == pytest.approx(expected * GB)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=int(20 * GB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path, limit.name, used.name, "inactive_file"),))
    assert memory.available(torch.device("cpu")) == pytest.approx(19 * GB)  # no such file
    limit.write_text("max\n")
    assert memory.main_memory() == pytest.approx(19 * GB)
    limit.write_text(f"{int(8 * GB)}\n")
    used.write_text(f"{int(4 * GB)}\n")
    (tmp_path / "memory.stat").write_text(f"anon {int(3 * GB)}\ninactive_file {int(1 * GB)}\n")
    assert memory.main_memory() == pytest.approx(0.95 * 5 * GB)


# Before anything is loaded


def test_stages_refuse_before_they_load(
    project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (paths.BASE, paths.QUANTIZED):
        shutil.copytree(tiny_model, folder)
    sha256 = records.sha256_tree(paths.BASE)
    contracts.write(paths.BASE_FACTS, base_facts(sha256=sha256))
    contracts.write(paths.QUANTIZED_FACTS, quantized_facts(sha256=sha256, dtype="float32"))
    monkeypatch.setattr(memory, "available", lambda _: 1000.0)
    for module, name in ((models, "base"), (backend_transformers, "load_base")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(checkpoint, "pretrained", lambda *_, **__: pytest.fail("loaded"))
    given = project
    with pytest.raises(UserError, match="train takes about"):
        train.fit(1, given.prompt, given.lora, given.train, given.runtime)
    with pytest.raises(UserError, match="infer takes about"):
        infer.decode("base", given.prompt, given.generation, given.runtime)
    with pytest.raises(UserError, match="quantize takes about"):
        quantize.write_quantized(given.quantize, given.runtime)


# The plan


@pytest.mark.usefixtures("root")
def test_the_memory_that_a_recipe_states_is_what_the_plan_computes() -> None:
    stated = 0
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = use._choice(path, use._default()).recipe
        if recipe.needs.gpu_gb is None:
            continue
        assert recipe.needs.model is not None, path
        given = use.experiment(path.stem, params.load())
        assert recipe.needs.gpu_gb == plan.gpu_gb(given, recipe.needs.model), path
        stated += 1
    assert stated == 11


@pytest.mark.usefixtures("root")
def test_there_is_a_recipe_for_each_card() -> None:
    needed = [
        recipe.needs.gpu_gb
        for path in (ROOT / "recipes").glob("*.yaml")
        if (recipe := use._choice(path, use._default()).recipe).needs.gpu_gb
    ]
    for low, high in ((12, 24), (24, 48), (48, 80)):
        assert [gb for gb in needed if low < gb <= high], high


@pytest.mark.usefixtures("root")
def test_the_command_prints_what_fits_where() -> None:
    done = CliRunner().invoke(cli.app, ["plan", "samsum-7b"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("recipe samsum-7b: llama, 6,738 M parameters, bfloat16; nf4; adapter of rank 64")
    assert [line.split()[0] for line in lines if line.startswith(("weights", "total"))] == ["weights", "total"]
    row = next(line for line in lines if line.startswith("train.micro_batch_tokens, packed")).split()[2:5]
    sizes = [int(cell.replace(",", "")) for cell in row]
    assert sizes[0] < sizes[1] < sizes[2]
    assert "nothing has been measured" in lines[-1]


@pytest.mark.usefixtures("root")
def test_an_optimizer_that_a_device_lacks_is_not_planned_there() -> None:
    given = params.load(use.DEFAULT)
    paged = given.model_copy(update={"train": given.train.model_copy(update={"optimizer": "paged-adamw8bit"})})
    printed = list(plan.lines("x", paged, bench._shape()))
    row = next(line for line in printed if line.startswith("train.micro_batch_tokens"))
    assert row.endswith("other optimizer")
    assert set(params.OPTIMIZERS) == {"adamw", "adamw8bit", "paged-adamw8bit", "adafactor", "muon"}


@pytest.mark.usefixtures("root")
def test_where_prompts_are_learnt_all_tokens_are_planned_with_their_logits() -> None:
    given = params.load(use.DEFAULT)
    prompts = given.model_copy(update={"train": given.train.model_copy(update={"prompt_loss_weight": 0.1})})
    parts = {one: plan.Plan(each, bench._shape(), "cpu", True).train() for one, each in enumerate((given, prompts))}
    assert parts[1]["logits"] == pytest.approx(2 * parts[0]["logits"])
    assert any(
        "at most 100% of a micro-batch are supervised" in line for line in plan.lines("x", prompts, bench._shape())
    )


def test_the_plan_reads_the_architecture_where_it_can(project: params.Params, tiny_model: Path) -> None:
    assert plan._shape(project) == Shape.read(tiny_model)
    unknown = project.model_copy(update={"model": project.model.model_copy(update={"source": "hf:a/b@" + 40 * "0"})})
    monkey = use.DEFAULT
    monkey.write_text((ROOT / "params.default.yaml").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="is unknown: fetch the model with `dvc repro fetch`"):
        plan._shape(unknown)


def test_a_device_is_one_of_three() -> None:
    assert [memory.kind(torch.device(name)) for name in ("cpu", "cuda", "mps")] == ["cpu", "cuda", "mps"]
    assert devices.threads(torch.device("cuda")) == 0
