"""Each kind of adapter computes what PEFT computes, goes on after a kill, and is the same in all that read it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import gguf
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.export import merge
from pipeline.fetch import fetch
from pipeline.infer import backend_transformers, infer
from pipeline.lora import adapter, start, train
from pipeline.model import adapted, checkpoint, load, packed
from pipeline.model.prompt import Row
from pipeline.model.shape import Shape
from tests.made import parameters
from tests.made.methods import METHODS, Method, having, names
from tests.made.models import of_family
from tests.made.trainer import section, some_trees
from tests.made.variants import decoded, quantized

CPU = torch.device("cpu")
IDS = torch.arange(20, 44).view(2, 12)


def cases(*columns: str) -> pytest.MarkDecorator:
    """Every method that works in one of the columns, with that column."""
    found = [(one, column) for column in columns for one in having(column)]
    ids = [f"{name}-{column}" for (_, column), name in zip(found, names([one for one, _ in found]), strict=True)]
    return pytest.mark.parametrize(("method", "column"), found, ids=ids)


def each(methods: list[Method]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", methods, ids=names(methods))


def settings(method: Method, **changes: Any) -> params.Lora:
    return parameters.lora(**method.changes | changes)


def based(project: params.Params, method: Method, tiny_model: Path, quantization: str) -> params.Params:
    """The project with a base that has what the method needs."""
    made = of_family("llama", False, tiny_model, paths.SCRATCH / "made", **method.model)
    return quantized(project, made, quantization)


def fresh(lora: params.Lora, keep_dequantized: bool = True) -> Any:
    return start.attach(load.quantized(CPU, keep_dequantized), lora, 7, rows())


def rows() -> list[Row]:
    """Rows of training, for starts that read them."""
    draw = torch.Generator().manual_seed(5)
    lengths = [(at, 5 + at % 7) for at in range(30, 60)]
    return [
        Row(str(at), str(at), *(torch.randint(5, 260, (count,), generator=draw).tolist() for count in counts))
        for at, counts in enumerate(lengths)
    ]


def moved(model: Any, by: float = 0.05) -> Any:
    """Move whatever is trained, as training does."""
    for number, (_, tensor) in enumerate(sorted(adapter.tensors(model).items())):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
        tensor.data += by * noise
    return model


def trained(lora: params.Lora, steps: int = 3) -> train.Trainer:
    one = train.Trainer(fresh(lora), section(learning_rate=2e-2, schedule="constant"), 7, 10, lora.plus_ratio)
    for _ in range(steps):
        one.step(some_trees(), 0.0)
    return one


def saved(lora: params.Lora) -> adapter.Saved:
    return kept(trained(lora))


def kept(one: train.Trainer) -> adapter.Saved:
    one.write_masters()
    adapter.save(one.model, one.masters, paths.adapter(17), records.read_json(paths.QUANTIZED_FACTS)["sha256"])
    return adapter.Saved(paths.adapter(17))


def far(lora: params.Lora) -> adapter.Saved:
    """An adapter far from its start, where of two tokens one is mostly much likelier."""
    model = moved(fresh(lora), 0.2)
    values = {name: tensor.detach() for name, tensor in adapter.tensors(model).items()}
    adapter.save(model, values, paths.adapter(17), records.read_json(paths.QUANTIZED_FACTS)["sha256"])
    return adapter.Saved(paths.adapter(17))


def as_peft_has_it(lora: params.Lora, ours: Any) -> Any:
    """PEFT's own model in transformers' own layers, with the values of ours."""
    model = AutoModelForCausalLM.from_pretrained(paths.QUANTIZED, attn_implementation="sdpa").requires_grad_(False)
    packed.dequantize(model)
    by_peft = lora.init in ("pissa", "olora", "gaussian", "orthogonal")
    held = dict(ours.named_parameters())
    if lora.decomposes and not by_peft:
        for name, layer in model.named_modules():
            if f"base_model.model.{name}.lora_A.start.weight" in held:
                a, b = (held[f"base_model.model.{name}.lora_{half}.start.weight"] for half in "AB")
                layer.weight.data += lora.alpha / lora.r * b.data @ a.data
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora, use_dora=lora.dora,
        bias=lora.bias, target_modules=start.targets(model, lora), layers_to_transform=lora.layers,
        rank_pattern=lora.rank_pattern, alpha_pattern=lora.alpha_pattern, modules_to_save=lora.modules_to_save or None,
        init_lora_weights=lora.init if by_peft else True, task_type="CAUSAL_LM",
    )  # fmt: skip
    reference = get_peft_model(model, config)
    theirs = dict(reference.named_parameters())
    for name, tensor in held.items():
        if ("lora_" in name or tensor.requires_grad) and ".start." not in name:
            theirs[name].data = tensor.data.clone()
            theirs[name].requires_grad = tensor.requires_grad
    return reference


def results(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)
    logits = model(input_ids=IDS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_same(ours: Any, theirs: Any) -> None:
    logits, gradients = results(ours)
    expected_logits, expected = results(theirs)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-3)
    assert gradients.keys() == expected.keys() == adapter.tensors(ours).keys()
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-3, name


@cases("none", "nf4")
def test_logits_and_gradients_are_those_of_peft(
    method: Method, column: str, project: params.Params, tiny_model: Path
) -> None:
    based(project, method, tiny_model, column)
    ours = moved(fresh(settings(method)))
    assert_same(ours, as_peft_has_it(settings(method), ours))


@each([one for one in METHODS if "dora" in one.changes or one.changes.get("init") in ("pissa", "olora")])
def test_dropout_is_that_of_peft(method: Method, project: params.Params, tiny_model: Path) -> None:
    based(project, method, tiny_model, "none")
    lora = settings(method, dropout=0.5)
    ours = moved(fresh(lora)).train()
    theirs = as_peft_has_it(lora, ours).train()
    assert_same(ours, theirs)
    without = results(ours.eval())[0]
    assert not torch.allclose(results(ours.train())[0], without)


@each([one for one in having("nf4") if one.changes.get("init") != "orthogonal"])
def test_a_packed_base_gives_the_same_as_an_unpacked_one(
    method: Method, project: params.Params, tiny_model: Path
) -> None:
    based(project, method, tiny_model, "nf4")
    unpacked, packed_one = (moved(fresh(settings(method), keep)) for keep in (True, False))
    logits, gradients = results(packed_one)
    expected_logits, expected = results(unpacked)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)


@each([one for one in METHODS if one.changes.get("init") != "loftq"])
def test_the_start_is_the_base(method: Method, project: params.Params, tiny_model: Path) -> None:
    based(project, method, tiny_model, "none")
    with torch.no_grad():
        expected = load.quantized(CPU, True)(input_ids=IDS).logits
        model = fresh(settings(method))
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
        with adapter.off(moved(model)):
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-2)


@each(having("resume"))
def test_a_resumed_training_ends_as_an_uninterrupted_one(
    method: Method, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    based(project, method, tiny_model, method.method)
    lora = settings(method)
    whole, first, second = trained(lora, 4), trained(lora, 2), trained(lora, 0)
    first.save(tmp_path)
    second.resume(tmp_path)
    for _ in range(2):
        second.step(some_trees(), 0.0)
    assert second.log == whole.log
    assert whole.log[-1].loss < whole.log[0].loss
    for key, master in whole.masters.items():
        assert torch.equal(master, second.masters[key]), key
    for one in (whole, second):
        one.write_masters()
        adapter.save(one.model, one.masters, tmp_path / str(one is whole), "abc")
    whole_file, second_file = ((tmp_path / str(one) / adapter.WEIGHTS).read_bytes() for one in (True, False))
    assert whole_file == second_file


@each(list(METHODS))
def test_parameters_are_counted_before_anything_is_loaded(
    method: Method, project: params.Params, tiny_model: Path
) -> None:
    based(project, method, tiny_model, method.method)
    lora = settings(method)
    counted = adapted.size(Shape.read(paths.QUANTIZED), lora)
    model = fresh(lora)
    biases = sum(one.numel() for name, one in adapter.tensors(model).items() if name.endswith(".bias"))
    assert counted.trained == sum(one.numel() for one in adapter.tensors(model).values()) - biases
    assert counted.frozen == sum(one.numel() for one in adapter.frozen(model).values())
    written = load_file(saved(lora).folder / adapter.WEIGHTS)
    assert counted.saved == sum(one.numel() for one in written.values()) - biases


PLAIN = """
import json
import sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

ids = torch.arange(20, 44).view(2, 12)
greedy = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=1, pad_token_id=0)
found = []
for base, folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(base)
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    new = model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), generation_config=greedy)
    found.append([logits, new[0, 12:].tolist()])
assert not any(name.split(".")[0] == "pipeline" for name in sys.modules)
torch.save(found, "plain.pt")
"""


def test_plain_peft_computes_the_same_on_the_original_base_in_its_own_process(
    project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    """The logits of the model that was trained, and by greedy decoding the tokens of inference here."""
    config = infer.configuration(
        project.generation.model_copy(update={"max_new_tokens": 8}), [1], checkpoint.tokenizer(tiny_model)
    )
    methods = having("adapter")
    pairs: list[list[str]] = []
    ours: list[tuple[torch.Tensor, list[int]]] = []
    for method in methods:
        for old in (paths.BASE, paths.QUANTIZED, paths.SCRATCH / "made"):
            shutil.rmtree(old, ignore_errors=True)
        based(project, method, tiny_model, method.method)
        trainer = trained(settings(method))
        one = kept(trainer)
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=IDS).logits
        model = one.load(load.quantized(CPU, True), records.read_json(paths.QUANTIZED_FACTS)["sha256"])
        engine = backend_transformers.Engine(model, config, project.generation, "cpu", 1, {})
        new = dict(backend_transformers.complete(engine, [[("row", IDS[0].tolist())]]))["row"]
        ours.append((logits, new))
        place = tmp_path / f"method-{len(pairs)}"
        shutil.copytree(paths.QUANTIZED, place / "base")
        shutil.copytree(one.folder, place / "adapter")
        pairs.append([str(place / "base"), str(place / "adapter")])
    subprocess.run([sys.executable, "-c", PLAIN, json.dumps(pairs)], check=True, cwd=tmp_path)
    theirs = torch.load(tmp_path / "plain.pt")
    assert len(theirs) == len(methods) > 15
    for method, (logits, new), (expected, expected_new) in zip(methods, ours, theirs, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3, msg=f"other logits with {method}")
        assert new == expected_new, method


@each(having("merged"))
def test_merged_weights_compute_what_base_and_adapter_compute(
    method: Method, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    based(project, method, tiny_model, method.method)
    saved(settings(method))
    measured = merge.as_measured(17, project.runtime)
    base, _ = merge.base()
    trees = merge.rows(project.prompt)
    assert merge.difference(measured, base, trees).logit_max > 0.01
    merge.merged(base, paths.adapter(17)).save_pretrained(tmp_path)
    found = merge.difference(measured, checkpoint.pretrained(tmp_path, CPU), trees)
    assert found.logit_max < 1e-3
    assert found.same == 1.0


@each(having("gguf"))
def test_llama_cpp_writes_what_transformers_writes(method: Method, project: params.Params, tiny_model: Path) -> None:
    """From both forms of GGUF: an adapter of its own, and merged into the base."""
    assert "llama.cpp" not in method.refused
    based(project, method, tiny_model, method.method)
    one = far(settings(method))
    base, ours, theirs = (
        [row.text for row in decoded(project, variant, used, backend=backend)]
        for variant, used, backend in (
            ("base", None, "transformers"), ("tuned-17", one, "transformers"), ("tuned-17", one, "llama.cpp"),
        )
    )  # fmt: skip
    # In the answers to the other two, rounding may decide between two tokens.
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 6
    assert sum(a == b for a, b in zip(ours, base, strict=True)) <= 1
    gguf.write_merged(paths.QUANTIZED, one.folder, Path("merged.gguf"), "F32")
    merged = fetch.gguf(Path("merged.gguf")).eval()
    model = one.load(load.quantized(CPU, True), records.read_json(paths.QUANTIZED_FACTS)["sha256"])
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)


@each(having("gguf", refused=True))
def test_what_gguf_cannot_hold_is_refused(method: Method, project: params.Params, tiny_model: Path) -> None:
    based(project, method, tiny_model, method.method)
    one = saved(settings(method))
    with pytest.raises(UserError, match=method.refused["gguf"]):
        gguf.write_adapter(one.folder, paths.QUANTIZED, Path("adapter.gguf"), "F32")
    with pytest.raises(UserError, match=method.refused["gguf"]):
        gguf.write_merged(paths.QUANTIZED, one.folder, Path("merged.gguf"), "F32")
    assert list(Path().glob("*.gguf")) == []


@pytest.mark.parametrize("column", ["none", "nf4", "llama.cpp"])
def test_what_cannot_work_is_refused_with_the_parameters(column: str, project: params.Params) -> None:
    """Before anything is fetched; and what is not refused in the table is accepted."""
    for method in METHODS:
        quantization = column if column != "llama.cpp" else method.method
        content = project.model_dump()
        content["lora"] |= settings(method).model_dump()
        content["quantize"] |= {"method": quantization, "double_quantization": quantization == "nf4"}
        content["generation"]["backend"] = "llama.cpp" if column == "llama.cpp" else "transformers"
        if column in method.refused:
            with pytest.raises(UserError, match=method.refused[column]):
                params.check(content, "params.yaml")
        else:
            assert params.check(content, "params.yaml").lora == settings(method)


# Starts


def test_iterations_come_near_the_singular_values(project: params.Params, tiny_model: Path) -> None:
    """What the start leaves of the weights is the least with singular values, and little more with iterations."""
    based(project, METHODS[0], tiny_model, "none")
    left = []
    for init in ("pissa", "pissa_niter_1", "pissa_niter_16"):
        layer = fresh(parameters.lora(init=init)).get_base_model().model.layers[1].mlp.up_proj
        left.append(float((layer.base_layer.weight - layer.get_delta_weight("default")).detach().norm()))
    assert left[0] < left[2] < left[1]
    assert left[2] < 1.01 * left[0]


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_loftq_is_nearer_to_the_original_weights(alpha: float, project: params.Params, tiny_model: Path) -> None:
    """Nearer than NF4 alone, by what its ranks hold of the difference; whatever the scale."""
    based(project, METHODS[0], tiny_model, "nf4")
    model = fresh(parameters.lora(init="loftq", alpha=alpha))
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    [(_, original)] = checkpoint.stored(paths.BASE, ["model.layers.1.mlp.up_proj.weight"])
    lost = original - layer.base_layer.weight
    update = layer.get_delta_weight("default").detach()
    left = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
    torch.testing.assert_close((lost - update).norm(), left, rtol=1e-3, atol=1e-5)
    assert float(left) < 0.95 * float(lost.norm())


def test_eva_finds_what_peft_finds_in_plain_layers(project: params.Params, tiny_model: Path) -> None:
    from peft import EvaConfig, initialize_lora_eva_weights

    based(project, METHODS[0], tiny_model, "none")
    ours = fresh(parameters.lora(init="eva"))
    model = AutoModelForCausalLM.from_pretrained(paths.QUANTIZED, attn_implementation="sdpa")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=start.targets(model, parameters.lora()), init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, use_label_mask=False), task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(model, config, low_cpu_mem_usage=True)
    batches = list(start.padded(rows(), start.TOGETHER, CPU))
    assert len(batches) == 2
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    expected = dict(theirs.named_parameters())
    compared = 0
    for name, tensor in ours.named_parameters():
        if ".lora_A." in name:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(tensor @ tensor.T, torch.eye(4), rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared == 14


def test_eva_that_does_not_settle_is_refused(
    project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    based(project, METHODS[0], tiny_model, "none")
    monkeypatch.setattr(start, "PASSES", 1)
    with pytest.raises(UserError, match="lora.init = 'eva' does not settle in 1 passes over the training rows"):
        fresh(parameters.lora(init="eva"))


def test_the_frozen_matrix_stays_and_is_saved(project: params.Params, tiny_model: Path) -> None:
    based(project, METHODS[0], tiny_model, "none")
    lora = parameters.lora(train_only="B")
    before = {name: one.detach().clone() for name, one in adapter.frozen(fresh(lora)).items()}
    written = load_file(saved(lora).folder / adapter.WEIGHTS)
    assert len(before) == len(written) / 2 == 14
    for name, tensor in before.items():
        assert torch.equal(written[name.replace(".default", "")], tensor), name


def test_the_input_is_not_kept_for_a_frozen_a(project: params.Params, tiny_model: Path) -> None:
    based(project, METHODS[0], tiny_model, "none")
    held = []
    for only in (None, "B"):
        model = moved(fresh(parameters.lora(train_only=only)))
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=IDS)
        held.append(sum(seen.values()))
    assert held[1] < 0.9 * held[0]


def test_the_learning_rate_of_b_is_that_many_times_as_high(project: params.Params, tiny_model: Path) -> None:
    """With LoRA+ the first step of Adam is as long as its rate: A moves by it, B by the ratio of it."""
    based(project, METHODS[0], tiny_model, "none")
    lora = parameters.lora(init="orthogonal", plus_ratio=4.0)
    one = train.Trainer(fresh(lora), section(learning_rate=1e-3, schedule="constant"), 7, 10, lora.plus_ratio)
    before = {name: master.clone() for name, master in one.masters.items()}
    one.step(some_trees(), 0.0)
    for name, master in one.masters.items():
        expected = 4e-3 if ".lora_B." in name else 1e-3
        assert float((master - before[name]).abs().max()) == pytest.approx(expected, rel=1e-2), name


def test_magnitudes_move_by_less_than_bfloat16_can_hold(project: params.Params, tiny_model: Path) -> None:
    """They are kept in float32 in training and when they are loaded."""
    based(project, METHODS[0], tiny_model, "none")
    one = train.Trainer(fresh(parameters.lora(dora=True)).to(torch.bfloat16), section(learning_rate=1e-4), 7, 10)
    one.step(some_trees(), 0.0)
    magnitudes = {name: tensor for name, tensor in one.tensors.items() if adapter.MAGNITUDE in name}
    assert len(magnitudes) == 14
    for name, tensor in magnitudes.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, one.masters[name])


# What a model does not have


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": [0, 2]}, r"lora.layers names block 2, but this model has 2: 0 to 1"),
        ({"rank_pattern": {"qproj": 2}}, r"lora.rank_pattern has 'qproj', which matches no adapted layer"),
        ({"rank_pattern": {".*_proj": 2, "q_proj": 3}}, r"has 'q_proj', .* or none that an earlier pattern has not"),
        ({"alpha_pattern": {"q_proj": 2.0}, "target_modules": ["v_proj"]}, "lora.alpha_pattern has 'q_proj'"),
        ({"rank_pattern": {"layers.0.mlp.up_proj": 2}, "layers": [1]}, "matches no adapted layer"),
        ({"init": "pissa", "r": 33}, r"with rank 33 at model.layers.0.self_attn.k_proj, whose weight has rank 32"),
        ({"bias": "all"}, "lora.bias = 'all', but this model has no biases"),
        ({"bias": "lora_only"}, "lora.bias = 'lora_only', but "),
        ({"modules_to_save": ["lm_head"]}, "embeddings and head of this model are one tensor"),
        ({"target_modules": ["qproj"]}, "lora.target_modules names qproj, which this model does not have"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_and_after_it_is_loaded(
    changes: dict[str, Any], told: str, tiny_model: Path, tmp_path: Path
) -> None:
    tied = of_family("llama", True, tiny_model, tmp_path / "tied")
    lora = parameters.lora(**changes)
    with pytest.raises(UserError, match=told):
        adapted.require_shape(lora, Shape.read(tied), biases=False)
    with pytest.raises(UserError, match=told):
        start.attach(AutoModelForCausalLM.from_pretrained(tied), lora, 1)


@pytest.mark.parametrize(
    "key", ["q_proj", "layers.1.mlp.up_proj", "mlp.*", "(q|k)_proj", "proj", "layers.[01].mlp.up_proj"]
)
def test_patterns_match_what_peft_matches(key: str, tiny_model: Path) -> None:
    from peft.utils.other import get_pattern_key

    shape = Shape.read(tiny_model)
    layers = [full for block in range(shape.layers) for full in shape.names(block).values()]
    assert len(layers) == 14
    for layer in layers:
        theirs = get_pattern_key([key, "o_proj"], layer)
        assert (adapted.pattern_of([key, "o_proj"], layer) or layer) == theirs


def test_the_names_of_layers_are_those_of_the_model(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)} - {"lm_head"}
    shape = Shape.read(tiny_model)
    assert {full for block in range(shape.layers) for full in shape.names(block).values()} == linear
