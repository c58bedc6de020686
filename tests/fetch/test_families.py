"""Every family that is taken computes here what transformers and PEFT compute as they come, or is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.fetch import fetch, hub_layout
from pipeline.infer import scheduler
from pipeline.lora import adapter, start
from pipeline.model import load, loss, pack, packed
from pipeline.model.prompt import Row
from pipeline.quantize import quantize
from tests.made.models import of_family
from tests.made.parameters import lora, runtime
from tests.made.variants import act

CPU = torch.device("cpu")
STOPS = [7, 30, 61, 83, 111, 140, 170, 200, 222, 250]
LORA = lora()


def taken(folder: Path, method: str) -> Any:
    """The base as the stages load it, after `fetch` and `quantize`."""
    fetch.write_base(params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32"))
    four_bits = method != "none"
    quantize.write_quantized(
        params.Quantize(
            method=method, double_quantization=four_bits, group_size=64,  # type: ignore[arg-type]
            calibration_rows=128, int8_threshold=6.0, perplexity_tokens=256,
        ),
        runtime(),
    )  # fmt: skip
    return load.quantized(CPU, keep_dequantized=True)


def as_it_comes(method: str) -> Any:
    """The same weights in transformers' own layers, with its own attention; 4-bit ones unpacked by `quantize`."""
    model = AutoModelForCausalLM.from_pretrained(paths.QUANTIZED, attn_implementation="sdpa").eval()
    if method != "none":
        packed.dequantize(model)
    return model.requires_grad_(False)


def rows() -> list[Row]:
    draw = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 260, (count,), generator=draw).tolist()

    shared = ids(40)
    return [
        Row("a/1", "a", shared + ids(9), ids(6)),
        Row("a/2", "a", shared + ids(3), ids(2)),
        Row("b/1", "b", ids(25), ids(8)),
    ]


def trained(total: torch.Tensor, model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total.backward()
    gradients = {
        name: tensor.grad.clone() for name, tensor in adapter.tensors(model).items() if tensor.grad is not None
    }
    return float(total.detach()), gradients


def row_by_row(model: Any) -> torch.Tensor:
    total = torch.zeros(())
    for row in rows():
        logits = model(input_ids=torch.tensor([row.prompt + row.completion])).logits[0, len(row.prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row.completion), reduction="sum")
    return total


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", hub_layout.FAMILIES)
def test_a_family_trains_writes_and_saves_as_its_libraries_do(
    family: str, tied: bool, method: str, tiny_model: Path, tmp_path: Path
) -> None:
    ours = act(start.attach(taken(of_family(family, tied, tiny_model, tmp_path / "m"), method), LORA, 1))
    plain = as_it_comes(method)
    adapter.save(ours, adapter.tensors(ours), tmp_path / "adapter", "x")
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).eval()

    # Training: packed, with the shared beginning computed once, against row by row.
    found, gradients = trained(loss.summed(ours, pack.pack(pack.trees(rows()), CPU)), ours)
    expected, expected_gradients = trained(row_by_row(theirs), theirs)
    assert found == pytest.approx(expected, rel=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) >= 8
    for name, gradient in gradients.items():
        assert float((gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()) < 1e-3, name
    assert adapter.logit_change(ours.eval()) == pytest.approx(adapter.logit_change(theirs), rel=1e-3)
    assert adapter.logit_change(theirs) > 1e-2

    # Decoding: all at once through the scheduler, against one by one.
    config = GenerationConfig(
        max_new_tokens=12, do_sample=False, num_beams=1, eos_token_id=STOPS, pad_token_id=1, repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )  # fmt: skip
    prompts = {row.id: row.prompt for row in rows()}
    groups = [[scheduler.Request(name, prompts[name]) for name in names] for names in (("a/1", "a/2"), ("b/1",))]
    written = {one.name: one.new for one in scheduler.decode(ours.eval(), config, groups, 8, 1000)}
    for name, ids in prompts.items():
        with torch.inference_mode():
            output = theirs.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
        assert written[name] == output, name
    # With tied embeddings a random model soon repeats its last token.
    assert tied or len({token for ids in written.values() for token in ids}) > 3


@pytest.mark.usefixtures("project")
def test_shards_are_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    shutil.copytree(folder, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(taken(tmp_path / "shards", "none")(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("project")
def test_a_window_or_a_change_of_frequencies_ends_the_context(tiny_model: Path, tmp_path: Path) -> None:
    def context(family: str, **changes: Any) -> int:
        folder = of_family(family, True, tiny_model, tmp_path / f"{family}{len(changes)}", **changes)
        fetch.write_base(params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32"))
        return int(records.read_json(paths.BASE_FACTS)["context"])

    assert context("mistral", sliding_window=48) == 48
    assert context("gemma3_text") == 96
    assert context("llama") == 512
    factors = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
    scaled = {"rope_theta": 10000.0, "original_max_position_embeddings": 128}
    assert context("phi3", rope_parameters=factors | scaled, original_max_position_embeddings=128) == 128


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch.write_base(params.Model(source=str(folder), sha256=records.sha256_path(folder), dtype="float32"))
    assert not paths.BASE.exists()


@pytest.mark.usefixtures("project")
def test_other_families_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    refused(of_family("gemma2", True, tiny_model, tmp_path / "m"), "not a causal language model of a known family")


@pytest.mark.usefixtures("project")
def test_pickled_weights_are_never_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refused(folder, "holds no weights in safetensors .*can run code when they are read")


@pytest.mark.usefixtures("project")
def test_a_checkpoint_that_is_not_whole_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"lacks 1 of the model's tensors, such as model.layers.1.mlp.up_proj.weight")


@pytest.mark.usefixtures("project")
def test_weights_of_another_configuration_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    settings = records.read_json(folder / "config.json")
    records.write_json(folder / "config.json", settings | {"intermediate_size": 96})
    refused(folder, "its weights do not fit its configuration")


@pytest.mark.usefixtures("project")
def test_a_model_that_sees_what_follows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("gemma3_text", True, tiny_model, tmp_path / "m", use_bidirectional_attention=True)
    refused(folder, "attend to those that follow")


@pytest.mark.usefixtures("project")
def test_an_adapter_beside_the_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds an adapter beside the model")
