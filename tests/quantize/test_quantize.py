"""4-bit weights: what they cost, that they are really there, and that gradients through them are right."""

import copy
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.errors import UserError
from pipeline.fetch import fetch
from pipeline.lora import adapter, start
from pipeline.model import attention, loss, memory, pack, packed
from pipeline.model.prompt import Row
from pipeline.quantize import quantize
from tests.made.data import WORDS
from tests.made.models import reading_bos
from tests.made.parameters import lora
from tests.made.records import base_facts, quantized_facts

CPU = torch.device("cpu")
ROWS = [Row("a", "a", list(range(20, 40)), [50, 51, 52, 1]), Row("b", "b", list(range(60, 75)), [80, 81, 1])]
LORA = lora()


def nf4(folder: Path, double: bool = True) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, attn_implementation=attention.NAME
    )


def gradient(adapted: Any) -> torch.Tensor:
    adapted.zero_grad()
    loss.summed(adapted, pack.pack(pack.trees(ROWS), CPU)).backward()
    return torch.cat(
        [tensor.grad.flatten().float() for tensor in adapter.tensors(adapted).values() if tensor.grad is not None]
    )


def evaluate(adapted: Any) -> None:
    """A validation in the middle of training: this is what repacks the weights of bitsandbytes on the CPU."""
    adapted.eval()
    with torch.no_grad():
        adapted(input_ids=torch.tensor([[5, 6, 7]]))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def adapted_pair(folder: Path) -> tuple[Any, Any]:
    """The same adapter, B not zero, on NF4 weights and on the same weights unpacked."""
    kept, plain = nf4(folder), nf4(folder)
    packed.keep_unpacked(kept)
    packed.dequantize(plain)
    pair = start.attach(kept, LORA, 1), start.attach(plain, LORA, 1)
    generator = torch.Generator().manual_seed(3)
    noise = {name: torch.randn(t.shape, generator=generator) * 0.05 for name, t in adapter.tensors(pair[0]).items()}
    for one in pair:
        for name, tensor in adapter.tensors(one).items():
            tensor.data = noise[name].to(tensor.dtype)
    return pair


def test_gradients_on_nf4_equal_those_on_the_dequantized_weights_also_after_an_evaluation(tiny_model: Path) -> None:
    packed, plain = adapted_pair(tiny_model)
    truth = gradient(plain)
    assert float(truth.norm()) > 0
    assert cosine(gradient(packed), truth) > 0.9999
    for one in (packed, plain):
        evaluate(one)
        assert cosine(gradient(one), truth) > 0.9999


@pytest.mark.parametrize("double", [True, False])
def test_both_ways_of_holding_the_weights_give_the_same_logits(tiny_model: Path, double: bool) -> None:
    on_the_fly, kept = nf4(tiny_model, double), nf4(tiny_model, double)
    packed.keep_unpacked(on_the_fly)
    packed.dequantize(kept)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        assert torch.equal(on_the_fly.eval()(ids).logits, kept.eval()(ids).logits)
    assert not any("4bit" in type(layer).__name__ for layer in kept.modules())


def test_the_stage_writes_a_checkpoint_that_loads_as_it_is_and_its_facts(
    project: params.Params, tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, paths.BASE)
    of_base = base_facts(dtype="float32", sha256=records.sha256_tree(paths.BASE))
    contracts.write(paths.BASE_FACTS, of_base)
    quantize.write_quantized(project.quantize, project.runtime)
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    # QLoRA, section 3: 4 bits and 0.127 bits of doubly quantized constants a parameter. The layers here are so small
    # that the second level's own constants weigh more.
    assert 4.127 <= facts.bits_per_parameter < 4.16
    assert facts.quantized_layers == 14
    assert 0.05 < max(facts.layers.values()) < 0.15
    assert facts.perplexity_after != facts.perplexity_before
    loaded = AutoModelForCausalLM.from_pretrained(paths.QUANTIZED)
    packed.require_effective(loaded, facts)
    assert facts.sha256 == records.sha256_tree(paths.QUANTIZED)


def test_a_base_that_has_changed_on_the_disk_is_refused(project: params.Params, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, paths.BASE)
    of_base = base_facts(dtype="float32", sha256=records.sha256_tree(paths.BASE))
    contracts.write(paths.BASE_FACTS, of_base)
    config = paths.BASE / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(UserError, match="out/models/base is not what its stage wrote.*lora-repro verify"):
        quantize.write_quantized(project.quantize, project.runtime)


def test_a_silent_downgrade_is_refused(tiny_model: Path) -> None:
    facts = quantized_facts()
    packed.require_effective(nf4(tiny_model), facts)
    unquantized = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UserError, match="quantize.method = 'nf4' with 14 layers was asked for, but .* has 0 layers"):
        packed.require_effective(unquantized, facts)
    with pytest.raises(UserError, match="of {'nf4'}"):
        packed.require_effective(nf4(tiny_model), replace(facts, method="fp4"))


def test_layers_that_were_repacked_are_noticed(tiny_model: Path) -> None:
    model = nf4(tiny_model)
    packed.keep_unpacked(model)
    evaluate(model)
    assert packed.repacked(model) == 0
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="1 4-bit layers were repacked"):
        packed.repacked(model)


def test_damaged_weights_fail_the_perplexity(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention.NAME)
    damaged = copy.deepcopy(model)
    damaged.model.norm.weight.data.fill_(float("nan"))
    windows = [list(range(5, 60))]
    assert loss.perplexity(model, windows, "before") > 1
    with pytest.raises(UserError, match="before is nan"):
        loss.perplexity(damaged, windows, "before")


# LLM.int8()


def int8(folder: Path, threshold: float = 6.0) -> Any:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, attn_implementation=attention.NAME
    )


def with_adapter(model: Any) -> Any:
    """The same adapter, B not zero, on whatever model."""
    adapted = start.attach(model.requires_grad_(False), LORA, 1)
    generator = torch.Generator().manual_seed(3)
    for _, tensor in sorted(adapter.tensors(adapted).items()):
        tensor.data = (torch.randn(tensor.shape, generator=generator) * 0.05).to(torch.bfloat16)
    return adapted


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_gradients_on_int8_are_those_of_plain_weights_also_after_an_evaluation(tiny_model: Path) -> None:
    """Eight bits are close to sixteen: what is close to the unquantized model's gradient is close to the truth."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    truth = gradient(with_adapter(plain))
    model = with_adapter(int8(tiny_model))
    assert sum("Linear8bitLt" in type(layer).__name__ for layer in model.modules()) >= 14
    assert cosine(gradient(model), truth) > 0.99
    evaluate(model)
    assert cosine(gradient(model.train()), truth) > 0.99
    assert cosine(gradient(model.eval()), truth) > 0.99


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_int8_is_written_with_its_facts_and_stays_int8(project: params.Params, tiny_model: Path) -> None:
    from pipeline.model import load

    shutil.copytree(tiny_model, paths.BASE)
    of_base = base_facts(dtype="bfloat16", sha256=records.sha256_tree(paths.BASE))
    contracts.write(paths.BASE_FACTS, of_base)
    wanted = {"method": "int8", "double_quantization": False, "int8_threshold": 4.0}
    quantize.write_quantized(project.quantize.model_copy(update=wanted), project.runtime)
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    # One float32 constant a row of 64 or 128 columns.
    assert 8 + 32 / 128 <= facts.bits_per_parameter <= 8 + 32 / 64
    assert facts.quantized_layers == 14
    assert 0 < max(facts.layers.values()) < 0.02
    assert facts.perplexity_after == pytest.approx(facts.perplexity_before, rel=0.05)
    for keep in (True, False):
        loaded = load.quantized(CPU, keep_dequantized=keep)
        assert {layer.state.threshold for layer in loaded.modules() if type(layer).__name__ == "Linear8bitLt"} == {4.0}
    with pytest.raises(UserError, match=r"int8_threshold = 6.0 was asked for, but the loaded model has 4.0"):
        packed.require_effective(loaded, replace(facts, int8_threshold=6.0))
    with pytest.raises(UserError, match="with 14 layers was asked for, but the loaded model has 14 layers of {'int8'}"):
        packed.require_effective(loaded, replace(facts, method="nf4"))


def test_a_base_in_main_memory_gives_the_same_facts_and_says_so(
    project: params.Params, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other device is faked: `cpu:0` is the CPU under another name."""
    shutil.copytree(tiny_model, paths.BASE)
    of_base = base_facts(dtype="float32", sha256=records.sha256_tree(paths.BASE))
    contracts.write(paths.BASE_FACTS, of_base)
    found = []
    for home in ("cpu", "cpu:0"):
        monkeypatch.setattr(memory, "require_quantizing", lambda *_, home=home: torch.device(home))
        quantize.write_quantized(project.quantize, project.runtime)
        found.append(contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts))
    assert found[1] == replace(found[0], base_on="cpu")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_computes_for_metal_is_what_it_computes_here(kind: str) -> None:
    """Its steps in torch for MPS, run on a CPU: the codes and constants are those of the CPU's kernels, and the weights
    that they stand for."""
    from bitsandbytes.backends.mps import ops
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(2))
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind)
    with torch.compiler.set_stance("force_eager"):
        metal, constants = ops._quantize_4bit_fallback(weight, 64, kind, torch.uint8)
        restored = ops._dequantize_4bit_impl(metal, constants, 64, kind, weight.shape, weight.dtype)
    assert torch.equal(metal, packed)
    assert torch.equal(constants, state.absmax)
    torch.testing.assert_close(restored, dequantize_4bit(packed, state), rtol=1e-6, atol=0)


# Perplexity


def likelihood(model: Any, tokenizer: Any, sources: list[str], tokens: int, bos: bool) -> float:
    """The perplexity of texts as transformers computes it: each read by itself, with the tokenizer's own BOS or not."""
    total, count = 0.0, 0
    for source in sources:
        ids = tokenizer(source, add_special_tokens=bos).input_ids[: tokens - count + 1]
        if len(ids) < 2:
            continue
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.double()
        total, count = total + float(mean) * (len(ids) - 1), count + len(ids) - 1
        if count == tokens:
            break
    return math.exp(total / count)


@pytest.mark.parametrize("method", ["nf4", "none"])
@pytest.mark.parametrize(("family", "bos"), [("gemma3_text", True), ("qwen3", False)])
def test_perplexity_is_that_of_transformers_on_text_as_the_model_reads_it(
    family: str, bos: bool, method: str, project: params.Params, tiny_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = reading_bos(family, bos, tiny_model, tmp_path / "m")
    fetch.write_base(params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32"))
    draw = random.Random(3)
    sources = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 20))) for _ in range(60)]
    rows = [records.Example(str(at), str(at), "a", source, "t", "l") for at, source in enumerate(sources)]
    records.write_rows(paths.split("validation"), rows)
    asked = {"method": method, "double_quantization": method == "nf4"}
    quantize.write_quantized(project.quantize.model_copy(update=asked), project.runtime)
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    tokenizer = AutoTokenizer.from_pretrained(paths.BASE)
    assert max(len(tokenizer(source).input_ids) for source in sources) < facts.perplexity_window
    after = AutoModelForCausalLM.from_pretrained(paths.QUANTIZED, dtype=torch.float32).eval()
    if method == "nf4":
        packed.dequantize(after)
    before = AutoModelForCausalLM.from_pretrained(paths.BASE, dtype=torch.float32).eval()
    tokens = facts.perplexity_tokens
    assert tokens == project.quantize.perplexity_tokens
    assert facts.perplexity_before == pytest.approx(likelihood(before, tokenizer, sources, tokens, bos), rel=1e-5)
    assert facts.perplexity_after == pytest.approx(likelihood(after, tokenizer, sources, tokens, bos), rel=1e-5)
    # Read in the other way the text is much less likely, so that the comparison above would not hold.
    if bos:
        assert likelihood(before, tokenizer, sources, tokens, False) > 2 * facts.perplexity_before
    assert (facts.perplexity_window, facts.perplexity_bos) == (96 if family == "gemma3_text" else 256, bos)
    said = "each with a BOS first" if bos else "without BOS, as the model reads text"
    assert f"{tokens} tokens of validation sources, windows of {facts.perplexity_window} tokens, {said}" in (
        capsys.readouterr().out
    )


def test_sources_of_one_token_are_read_as_lines(project: params.Params, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, paths.BASE)
    contracts.write(paths.BASE_FACTS, base_facts(dtype="float32", sha256=records.sha256_tree(paths.BASE)))
    rows = records.read_rows(paths.split("validation"), records.Example)
    records.write_rows(paths.split("validation"), [replace(row, source="ab"[at % 2]) for at, row in enumerate(rows)])
    quantize.write_quantized(project.quantize, project.runtime)
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    assert facts.perplexity_tokens == 3  # "a", a line feed, "b", a line feed: the first is only read


def test_windows_end_with_the_context(project: params.Params, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, paths.BASE)
    facts = base_facts(dtype="float32", sha256=records.sha256_tree(paths.BASE), context=7)
    contracts.write(paths.BASE_FACTS, facts)
    read: list[int] = []

    def perplexity(_: Any, windows: list[list[int]], __: str) -> float:
        read.extend(map(len, windows))
        return 5.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "perplexity", perplexity)
        quantize.write_quantized(project.quantize, project.runtime)
    assert max(read) == 7
