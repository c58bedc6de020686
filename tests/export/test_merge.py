"""Merged weights compute what base and adapter compute; what rounding makes of it is measured."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.core import params, paths, records
from pipeline.export import merge
from pipeline.fetch import fetch
from pipeline.lora import adapter, start
from pipeline.model import checkpoint, load
from pipeline.quantize import quantize
from tests.made.variants import act

CPU = torch.device("cpu")


def prepared(project: params.Params, method: str, dtype: str = "float32", rslora: bool = False) -> None:
    """Base, quantized base and an adapter with which it acts, as the stages leave them."""
    fetch.write_base(project.model.model_copy(update={"dtype": dtype}))
    update = {"method": method, "double_quantization": method == "nf4"}
    quantize.write_quantized(project.quantize.model_copy(update=update), project.runtime)
    facts = records.read_json(paths.QUANTIZED_FACTS)
    lora = project.lora.model_copy(update={"rslora": rslora})
    model = act(start.attach(load.quantized(CPU, keep_dequantized=True), lora, 1))
    adapter.save(model, adapter.tensors(model), paths.adapter(17), facts["sha256"])


@pytest.mark.parametrize(
    ("method", "rslora", "words"),
    [
        ("nf4", False, "the nf4 values that the adapter was trained on, unpacked to float32"),
        ("hqq", False, "the hqq values that the adapter was trained on, unpacked to float32"),
        ("none", True, "the weights that the adapter was trained on, in float32"),
    ],
)
def test_the_sum_is_the_model_with_its_adapter(
    method: str, rslora: bool, words: str, project: params.Params, tmp_path: Path
) -> None:
    prepared(project, method, rslora=rslora)
    measured = merge.as_measured(17, project.runtime)
    base, said = merge.base()
    assert said == words
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merge.merged(base, paths.adapter(17)).save_pretrained(tmp_path)
    found = merge.difference(measured, checkpoint.pretrained(tmp_path, CPU), merge.rows(project.prompt))
    assert found.loss == pytest.approx(found.loss_measured, rel=1e-5)
    assert found.logit_max < 1e-4
    assert (found.same, found.rows) == (1.0, 8)
    # As PEFT's own merge has it, and none of ours.
    AutoModelForCausalLM.from_pretrained(paths.BASE).save_pretrained(tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs.load_state_dict(plain)
    expected = PeftModel.from_pretrained(theirs, paths.adapter(17)).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor)
    assert any(not torch.equal(plain[name], tensor) for name, tensor in ours.items())


def test_what_separates_two_models_is_seen(project: params.Params) -> None:
    """The base without its adapter, and int8, whose activations plain weights do not quantize."""
    prepared(project, "int8")
    measured = merge.as_measured(17, project.runtime)
    base, words = merge.base()
    assert words.startswith("the weights before quantization, in float32: int8 layers quantize activations")
    trees = merge.rows(project.prompt)
    without = merge.difference(measured, base, trees)
    assert without.logit_max > 0.1
    assert without.same < 1
    merged = merge.difference(measured, merge.merged(base, paths.adapter(17)), trees)
    assert 0 < merged.logit_mean < without.logit_mean / 2
