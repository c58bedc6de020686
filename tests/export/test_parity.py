"""The parity report: equal engines are equal, a worse file is called so, and what cannot be compared is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.commands import cli
from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.export import parity
from pipeline.infer import backend_llamacpp
from pipeline.model import checkpoint
from pipeline.model.prompt import Row
from pipeline.score.tables import Table
from tests.made.variants import quantized, trained


def test_one_file_in_float32_is_the_same_and_one_in_4_bits_is_not(
    project: params.Params, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized(project, tiny_model)
    trained(rslora=True)
    assert parity.measure(project, ["F32", "Q4_0"], None, False, 0.01)
    found = records.read_json(paths.PARITY_JSON)
    exact, coarse = found["llama.cpp"]["F32"], found["llama.cpp"]["Q4_0"]
    assert exact["loses"] == []
    for one in exact["variants"].values():
        assert one["agreement"] == {"answers": 1.0, "tokens": 1.0, "first_difference": None}
        assert abs(one["rise"]) < 1e-3
        assert one["difference"]["rouge1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert coarse["variants"]["base"]["agreement"]["tokens"] < 1
    assert any("perplexity is" in reason for reason in coarse["loses"])
    assert found["conditions"]["llama.cpp"]["xllamacpp"]
    tokenizer = checkpoint.tokenizer()
    assert not found["validation_bos"]
    assert parity.Rows([], {}, [Row("a", "a", [tokenizer.bos_token_id, 9], [9])], tokenizer, None).bos
    page = paths.PARITY_MD.read_text()
    assert "validation references, each behind its prompt, which begins without BOS." in page
    assert "**F32**: no loss is shown." in page
    assert "**Q4_0 loses**:" in page
    assert page in capsys.readouterr().out


def test_an_adapter_merged_into_the_file_is_the_adapter_beside_it(project: params.Params, tiny_model: Path) -> None:
    quantized(project, tiny_model, "nf4")
    trained(rslora=False)
    assert not parity.measure(project, ["F32"], 4, True, 0.01)
    found = records.read_json(paths.PARITY_JSON)
    assert found["merged"]
    assert (found["rows"], found["groups"], found["validation_rows"]) == (4, 2, 4)
    assert found["llama.cpp"]["F32"]["variants"]["tuned-17"]["agreement"]["tokens"] == 1.0


def test_agreement_counts_up_to_the_first_difference() -> None:
    one = {"a": [1, 2, 3, 4], "b": [5, 6], "c": [7, 8, 9, 9]}
    found = parity.agreement(one, {"a": [1, 2, 9, 4], "b": [5, 6], "c": [7]})
    assert found == parity.Agreement(answers=1 - 2 / 3, tokens=(2 + 2 + 1) / 10, first_difference=1.5)
    assert parity.agreement(one, one) == parity.Agreement(1.0, 1.0, None)


def test_a_loss_needs_an_interval_below_zero_or_a_risen_perplexity() -> None:
    def told(low: float, high: float, rise: float) -> dict[str, Any]:
        return {"base": {"difference": {"rouge1": {"value": -0.5, "low": low, "high": high}}, "rise": rise}}

    assert parity.losing(told(-1.0, 0.0, 0.01), ["rouge1"], 0.01) == []
    assert parity.losing(told(-1.0, -0.1, 0.0), ["rouge1"], 0.01) == [
        "base scores lower in rouge1: -0.5 (-1.0 to -0.1)"
    ]
    assert parity.losing(told(-1.0, 0.1, 0.02), ["rouge1"], 0.01) == [
        "base's perplexity is 2.0% higher, and 1.0% was allowed"
    ]


def test_speed_counts_new_tokens() -> None:
    side = parity.Side({"a": [1, 2], "b": [3]}, 1.5, 0.0, Table([], [np.zeros((0, 1))]))
    assert side.speed == 2.0


def test_what_llama_cpp_cannot_do_is_refused(project: params.Params) -> None:
    beams = project.model_copy(update={"generation": project.generation.model_copy(update={"num_beams": 2})})
    with pytest.raises(UserError, match="num_beams = 2: backend 'llama.cpp' can only decode greedily"):
        parity.measure(beams, ["F16"], None, False, 0.01)
    with pytest.raises(UserError, match="gguf_type = 'Q3'"):
        parity.measure(project, ["Q3"], None, False, 0.01)
    int8 = project.quantize.model_copy(update={"method": "int8"})
    with pytest.raises(UserError, match="no GGUF file computes that"):
        parity.measure(project.model_copy(update={"quantize": int8}), ["F16"], None, False, 0.01)


def test_a_family_that_is_not_written_is_refused_before_anything_is_decoded(
    project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(project, tiny_model)
    config = records.read_json(paths.QUANTIZED / "config.json")
    records.write_json(paths.QUANTIZED / "config.json", config | {"model_type": "phi3"})
    monkeypatch.setattr(parity, "_side", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="family 'phi3', and GGUF files are written only of"):
        parity.measure(project, ["F16"], None, False, 0.01)


def test_an_adapter_that_is_not_written_is_refused_before_anything_is_decoded(
    project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(project, tiny_model)
    config = trained(rslora=False).folder / "adapter_config.json"
    records.write_json(config, records.read_json(config) | {"use_dora": True})
    monkeypatch.setattr(parity, "_side", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="use_dora.*: export it as adapter or merged"):
        parity.measure(project, ["F16"], None, False, 0.01)


def test_an_experiment_that_has_changed_since_it_ran_is_not_compared(project: params.Params) -> None:
    assert project
    result = CliRunner().invoke(cli.app, ["parity"])
    assert (result.exit_code, result.stderr) == (1, "error: dvc.lock is missing: run `dvc repro`, which makes it\n")


def test_losses_are_those_of_transformers_token_by_token(project: params.Params, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.infer import backend, infer

    quantized(project, tiny_model)
    generation = project.generation.model_copy(update={"backend": "llama.cpp", "gguf_type": "F32"})
    config = infer.configuration(generation, [1], checkpoint.tokenizer())
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    engine = backend_llamacpp.load(backend.Setup(facts, config, generation, project.runtime, None, 64))
    prompt, completion = [5, 6, 7], [*range(150, 162), 1]  # bytes of half characters among them
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_model)(torch.tensor([prompt + completion])).logits[0]
    expected = -logits.log_softmax(-1)[range(2, 2 + len(completion)), completion]
    assert backend_llamacpp.losses(engine, prompt, completion) == pytest.approx(expected.tolist(), abs=1e-3)
