"""A base that processes share: each holds a part, and what they compute is, to the byte, what they compute with a whole
one each."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline import forget
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.core.params import Params
from pipeline.fetch import hub_layout
from pipeline.infer import infer
from pipeline.lora import adapter, start, train
from pipeline.model import checkpoint, fused, loss, pack, processes, shard
from pipeline.model import load as models
from pipeline.model.prompt import Row
from pipeline.quantize import quantize
from tests.made.models import of_family
from tests.made.parameters import edit
from tests.made.processes import inferred, members

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def packed(quantized: Params) -> Params:
    """Whole bases, unpacked on the fly; steps and rounds that two processes cannot share evenly."""
    return quantized.model_copy(
        update={
            "runtime": quantized.runtime.model_copy(update={"keep_dequantized": False}),
            "train": quantized.train.model_copy(update={"batch_size": 6, "micro_batch_tokens": 64}),
            "generation": quantized.generation.model_copy(update={"batch_size": 1, "recheck": 1}),
        }
    )


def shared(project: Params, **settings: Any) -> Params:
    runtime = project.runtime.model_copy(update={"sharding": "fsdp", **settings})
    return project.model_copy(update={"runtime": runtime})


def everything(project: Params) -> None:
    """All stages that compute with the quantized base."""
    train.fit(17, project.prompt, project.lora, project.train, project.runtime)
    processes.gather(None)  # until process 0 has written
    forget.measure_seed(17, project.forget, project.runtime)
    inferred(project)
    saved = adapter.Saved(paths.adapter(17))
    infer.decode("tuned-17", project.prompt, project.generation, project.runtime, saved)


def noted(project: Params) -> None:
    """The same; how much of the base's blocks is held here is noted."""
    load = models.quantized

    def noting(device: torch.device, keep_dequantized: bool, sharding: str = "none") -> Any:
        model = load(device, keep_dequantized, sharding)
        weights = list(model.get_decoder().layers.parameters())
        held = [shard_of(weight).numel() for weight in weights]
        Path(f"held-{os.environ['RANK']}").write_text(json.dumps([sum(map(torch.numel, weights)), sum(held)]))
        return model

    models.quantized = noting
    everything(project)


def shard_of(weight: Any) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def require_half_held() -> None:
    for number in range(2):
        whole, held = json.loads(Path(f"held-{number}").read_text())
        assert held == pytest.approx(whole / 2, rel=0.01)


def untold(project: Params) -> None:
    """Stage forget, as a launcher has started it, and what it cost."""
    processes._take_part(params.read("forget"), lambda _: forget.measure_seed(17, project.forget, project.runtime))


def written() -> dict[str, bytes]:
    folders = (paths.OUT / "adapters", paths.OUT / "training", paths.OUT / "forgetting", paths.PREDICTIONS)
    return {
        path.as_posix(): path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()
    }


def with_whole_bases(project: Params, call: Callable[[Params], None]) -> dict[str, bytes]:
    assert members(project, call) == [0, 0]
    found = written()
    for folder in ("adapters", "training", "forgetting", "predictions"):
        shutil.rmtree(paths.OUT / folder, ignore_errors=True)
    return found


@pytest.mark.parametrize("recomputed", [False, True])
def test_processes_that_share_a_base_write_what_they_write_with_one_each(packed: Params, recomputed: bool) -> None:
    expected = with_whole_bases(packed, everything)
    assert len(expected) >= 8
    assert members(shared(packed, gradient_checkpointing=recomputed), noted) == [0, 0]
    assert written() == expected
    require_half_held()


def test_a_base_in_groups_is_shared_as_well(packed: Params) -> None:
    shutil.rmtree(paths.QUANTIZED)
    hqq = packed.quantize.model_copy(update={"method": "hqq", "double_quantization": False})
    quantize.write_quantized(hqq, packed.runtime)
    packed = packed.model_copy(update={"quantize": hqq})
    expected = with_whole_bases(packed, everything)
    assert members(shared(packed), noted) == [0, 0]
    assert written() == expected
    require_half_held()


def test_an_unquantized_base_is_shared_as_well(unquantized: Params) -> None:
    expected = with_whole_bases(unquantized, everything)
    assert members(shared(unquantized, keep_dequantized=True), everything) == [0, 0]
    assert written() == expected


def test_beam_search_with_a_shared_base(packed: Params) -> None:
    packed = packed.model_copy(update={"generation": packed.generation.model_copy(update={"num_beams": 2})})
    expected = with_whole_bases(packed, inferred)
    assert members(shared(packed), inferred) == [0, 0]
    assert written() == expected


def test_processes_agree_that_nothing_is_measured(packed: Params) -> None:
    nothing = packed.forget.model_copy(update={"probes": []})
    edit(forget={"probes": []}, runtime={"processes": 2})
    paths.adapter(17).mkdir(parents=True)
    assert members(packed.model_copy(update={"forget": nothing}), untold) == [0, 0]
    assert records.read_json(paths.forgetting(17))["probes"] == []


# Heads and columns


@pytest.fixture
def unquantized(packed: Params) -> Params:
    shutil.rmtree(paths.QUANTIZED)
    none = packed.quantize.model_copy(update={"method": "none", "double_quantization": False})
    quantize.write_quantized(none, packed.runtime)
    return packed.model_copy(update={"quantize": none})


@pytest.mark.parametrize("recomputed", [False, True])
def test_heads_over_processes_train_and_write_what_one_process_does(unquantized: Params, recomputed: bool) -> None:
    everything(unquantized)
    expected, forgotten = records.read_json(paths.training_summary(17)), records.read_json(paths.forgetting(17))
    weights = load_file(paths.adapter(17) / adapter.WEIGHTS)
    texts = [paths.predictions(name).read_bytes() for name in ("base", "tuned-17")]
    shutil.rmtree(paths.OUT / "adapters")
    settings = {"sharding": "tensor", "gradient_checkpointing": recomputed}
    assert members(shared(unquantized, **settings), noted) == [0, 0]
    require_half_held()
    assert texts == [paths.predictions(name).read_bytes() for name in ("base", "tuned-17")]
    summary = records.read_json(paths.training_summary(17))
    for name in ("final_loss", "best_loss", "training_loss", "largest_grad_norm", "logit_change"):
        assert summary[name] == pytest.approx(expected[name], rel=1e-4), name
    assert {name for name in expected if summary[name] != expected[name]} <= {
        "final_loss", "best_loss", "kept_loss", "training_loss", "gap", "validation", "largest_grad_norm",
        "logit_change",
    }  # fmt: skip
    for name, tensor in load_file(paths.adapter(17) / adapter.WEIGHTS).items():
        assert torch.allclose(tensor, weights[name], atol=1e-4), name
    (found,), (whole,) = records.read_json(paths.forgetting(17))["probes"], forgotten["probes"]
    assert found["kl"] == pytest.approx(whole["kl"], rel=1e-3)
    assert records.read_json(paths.decoding("base"))["generation"]["tensor_parallel"] == 2


def trained(project: Params) -> None:
    train.fit(17, project.prompt, project.lora, project.train, project.runtime)


COUNTED = {"prompt_loss_weight": 0.3, "label_smoothing": 0.1, "neftune_alpha": 5.0, "optimizer": "muon", "beta2": None}


def test_a_shared_base_is_trained_with_weights_smoothing_and_noise_as_a_whole_one(unquantized: Params) -> None:
    """The noise of a group is the same in every process."""
    project = unquantized.model_copy(update={"train": unquantized.train.model_copy(update=COUNTED)})
    trained(project)
    alone = records.read_json(paths.training_summary(17))
    expected = with_whole_bases(project, trained)
    assert members(shared(project), trained) == [0, 0]
    assert written() == expected
    shutil.rmtree(paths.OUT / "adapters")
    assert members(shared(project, sharding="tensor"), trained) == [0, 0]
    split = records.read_json(paths.training_summary(17))
    for name in ("final_loss", "best_loss", "training_loss", "largest_grad_norm"):
        assert split[name] == pytest.approx(alone[name], rel=1e-3), name


def dying(project: Params) -> None:
    """Process 1 is gone when it has written a round."""
    add = infer.Written.add

    def adding(self: infer.Written, row: records.Prediction) -> None:
        add(self, row)
        if processes.rank() == 1 and len(self.rows) == 6:
            os._exit(9)

    infer.Written.add = adding  # type: ignore[method-assign]
    inferred(project)


def test_processes_that_were_ended_at_different_rows_go_on_together(unquantized: Params) -> None:
    split = shared(unquantized, sharding="tensor")
    assert members(split, inferred) == [0, 0]
    expected = written()
    shutil.rmtree(paths.PREDICTIONS)
    assert members(split, dying)[1] == 9
    (lines,) = paths.SCRATCH.glob("infer-base-*/predictions-0.jsonl")
    lines.write_text("")  # as if it had been ended sooner
    assert members(split, inferred) == [0, 0]
    assert "going on behind 6 examples" in Path("printed-1").read_text()
    assert written() == expected


IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def three_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the heads of the default model, which three processes divide."""
    folder = tmp_path_factory.mktemp("heads") / "model"
    sizes = {"hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=2, **sizes)).save_pretrained(folder)
    return folder


def computing(_: Params) -> None:
    """Logits by the heads of all processes."""
    processes.join(cpu_only=True, one_model=True)
    model = shard.split(Path("three"), CPU)
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor(IDS), use_cache=False).logits, f"logits-{processes.rank()}")


def test_heads_over_three_processes_give_the_logits_of_one(packed: Params, three_heads: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(three_heads).eval()
    with torch.no_grad():
        expected_BxLxV = whole(input_ids=torch.tensor(IDS)).logits
    Path("three").symlink_to(three_heads)
    assert members(packed, computing, 3) == [0, 0, 0]
    for number in range(3):
        assert torch.allclose(torch.load(f"logits-{number}"), expected_BxLxV, atol=1e-4)
    assert float(expected_BxLxV.std()) > 0.01


def test_heads_that_cannot_be_divided_are_refused(packed: Params, three_heads: Path) -> None:
    Path("three").symlink_to(three_heads)
    assert members(packed, computing, 2) == [1, 1]
    told = "over 2 processes, which do not divide this model: it has 9 attention heads and 3 key-value heads; set"
    assert told in Path("printed-0").read_text()


def learning(project: Params) -> None:
    """The loss and the gradients of every family, with whole bases and with those that processes share."""
    processes.join(cpu_only=True)
    mesh = shard.mesh(CPU)
    row = pack.pack([pack.tree([Row("", "", [5, 9, 30, 31, 32], [40, 41, 42, 7])])], CPU)

    def learned(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
        adapted = start.attach(model.requires_grad_(False), project.lora, 3).train()
        for tensor in adapter.tensors(adapted).values():
            tensor.data.add_(0.05)
        total = loss.summed(adapted, row)
        total.backward()
        tensors = adapter.tensors(adapted).items()
        return float(total.detach()), {
            name: shard.whole(tensor.grad) for name, tensor in tensors if tensor.grad is not None
        }

    for family in hub_layout.FAMILIES:
        folder = Path(family)
        whole = checkpoint.pretrained(folder, CPU)
        fused.apply(whole)
        expected, gradients = learned(whole)
        divided = checkpoint.pretrained(folder, CPU).requires_grad_(False)
        shard.apply(divided, CPU, mesh)
        fused.apply(divided)
        found, others = learned(divided)
        assert found == expected, family
        assert all(torch.equal(gradients[name], others[name]) for name in gradients), family
        try:
            split = shard.split(folder, CPU)
        except UserError as error:
            print(f"{family}: {error}")
            continue
        found, others = learned(split)
        assert found == pytest.approx(expected, rel=1e-4), family
        for name, gradient in gradients.items():
            assert torch.allclose(others[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), name


def test_every_family_is_shared_or_refused(packed: Params, tiny_model: Path) -> None:
    for family in hub_layout.FAMILIES:
        of_family(family, tied=True, tiny_model=tiny_model, folder=Path(family))
    assert members(packed, learning) == [0, 0]
    refused = [line.partition(":")[0] for line in Path("printed-0").read_text().splitlines() if "are not split" in line]
    assert refused == ["phi3", "olmo2"]
