"""Training: a step is the mean over its batch however it is split, and a killed run ends as if it had not been."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core import params, paths, records
from pipeline.core.contracts import Validation
from pipeline.core.errors import UserError
from pipeline.lora import adapter, train
from pipeline.model import checkpoint, devices, pack
from pipeline.model.prompt import Row
from tests.made.trainer import some_trees, trainer

COUNTED: dict[str, dict[str, Any]] = {
    "answers": {},
    "prompts": {"prompt_loss_weight": 0.3},
    "smoothed": {"label_smoothing": 0.1},
    "noisy": {"neftune_alpha": 10.0},
    "all": {"prompt_loss_weight": 0.3, "label_smoothing": 0.1, "neftune_alpha": 10.0},
}


@pytest.mark.parametrize("counted", COUNTED.values(), ids=COUNTED)
def test_a_step_does_not_depend_on_how_its_batch_is_split(tiny_model: Path, counted: dict[str, Any]) -> None:
    """Gradient accumulation equals the large batch (the loss is a mean over tokens, not over parts)."""
    whole, split = (trainer(tiny_model, micro_batch_tokens=tokens, **counted) for tokens in (100_000, 64))
    trees = pack.weighed(uneven_rows(), counted.get("prompt_loss_weight", 0.0))
    assert len(pack.micro_batches(trees, 100_000)) == 1
    assert len(pack.micro_batches(trees, 64)) == 4
    for one in (whole, split):
        with_values(one)
    (mean, gradients), (other_mean, others) = whole._gradients(trees), split._gradients(trees)
    assert other_mean == pytest.approx(mean, rel=1e-6)
    for name, gradient in gradients.items():
        assert float(gradient.norm()) > 0
        assert float((others[name] - gradient).norm() / gradient.norm()) < 1e-5, name
    # Planted: the mean of the parts' means, which is what the loss would be if each part had its own divisor.
    means = [whole._gradients(part)[0] for part in pack.micro_batches(trees, 64)]
    assert abs(sum(means) / len(means) - mean) > 1e-4 * mean
    for one in (whole, split):
        one.step(trees, 0.0)
        one.step(trees, 0.0)
    assert split.log[1].loss == pytest.approx(whole.log[1].loss, rel=1e-5)


@pytest.mark.parametrize("tokens", [64, 100_000])
@pytest.mark.parametrize(("prompt_loss_weight", "smoothing"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.1), (0.3, 0.1)])
def test_a_step_is_the_mean_of_its_tokens_by_their_weights_as_plain_torch_has_it(
    tiny_model: Path, prompt_loss_weight: float, smoothing: float, tokens: int
) -> None:
    """A row a sequence, all logits, and one mean over the batch; each row with an earlier answer that is learnt too."""
    one = trainer(
        tiny_model,
        micro_batch_tokens=tokens,
        prompt_loss_weight=prompt_loss_weight,
        label_smoothing=smoothing,
        turns="all",
    )
    with_values(one)
    rows = [replace(row, earlier=[(row.prompt[:1], row.prompt[1:3])]) for row in uneven_rows()]
    mean, gradients = one._gradients(pack.weighed(rows, prompt_loss_weight))
    nats, weights = [], []
    for row in rows:
        ids = torch.tensor([*row.prompt, *row.completion])
        logits = one.model(input_ids=ids[None]).logits[0, :-1]
        nats.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none", label_smoothing=smoothing))
        weights += [1.0, 1.0, *[prompt_loss_weight] * (len(row.prompt) - 3), *[1.0] * len(row.completion)]
    expected = torch.cat(nats) @ torch.tensor(weights) / sum(weights)
    expected.backward()
    assert mean == pytest.approx(expected.item(), rel=1e-5)
    for name, tensor in one.tensors.items():
        assert tensor.grad is not None
        assert float((gradients[name] - tensor.grad).norm() / tensor.grad.norm()) < 1e-4, name


def uneven_rows() -> list[Row]:
    """Rows of 5 to 150 tokens, with answers of 1 to 90."""
    return [
        Row(f"{group}/{n}", str(group), [*range(20, 23 + size), 60 + n], [80 + n, 30, 31][: n + 1] * answer + [1])
        for group, (size, answer) in enumerate([(0, 1), (40, 1), (5, 45), (100, 4), (12, 2)])
        for n in range(2)
    ]


def with_values(one: train.Trainer) -> None:
    """Give the adapter values: B begins at zero, with which A has no gradient."""
    draw = torch.Generator().manual_seed(5)
    for master in one.masters.values():
        master.normal_(std=0.05, generator=draw)
    one._write_rounded()


def test_training_lowers_the_loss_and_changes_the_adapter_alone(tiny_model: Path) -> None:
    one = trainer(tiny_model)
    frozen = {name: tensor.clone() for name, tensor in one.model.named_parameters() if not tensor.requires_grad}
    for _ in range(10):
        one.step(some_trees(), 0.0)
    assert one.log[-1].loss < 0.7 * one.log[0].loss
    assert all(torch.equal(tensor, dict(one.model.named_parameters())[name]) for name, tensor in frozen.items())


def test_the_gradient_is_clipped_to_the_norm(tiny_model: Path) -> None:
    one = trainer(tiny_model, max_grad_norm=0.01)
    one.step(some_trees(), 0.0)
    assert one.log[0].grad_norm > 0.01
    clipped = torch.cat([master.grad.flatten() for master in one.masters.values() if master.grad is not None])
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)


def test_validation_changes_nothing_and_is_taken_once_a_step(tiny_model: Path) -> None:
    one, other = trainer(tiny_model), trainer(tiny_model)
    one.validate(some_trees())
    one.validate(some_trees())
    assert [entry.step for entry in one.validation] == [0]
    for each in (one, other):
        each.step(some_trees(), 0.0)
    assert one.log == other.log


def test_a_loss_that_is_not_finite_fails(tiny_model: Path) -> None:
    one = trainer(tiny_model)
    next(iter(one.masters.values())).fill_(float("inf"))
    one._write_rounded()
    with pytest.raises(UserError, match="training diverged at step 0: loss nan"):
        one.step(some_trees(), 0.0)


def test_an_epoch_holds_every_group_once_and_whole() -> None:
    trees = some_trees()
    filled = train.batches(trees, rows=4, seed=1)
    assert [len(batch) for batch in filled] == [2, 2, 2]
    assert sorted(map(id, [tree for batch in filled for tree in batch])) == sorted(map(id, trees))
    assert filled != train.batches(trees, rows=4, seed=2)
    assert filled == train.batches(trees, rows=4, seed=1)
    assert [len(batch) for batch in train.batches(trees, rows=1, seed=1)] == [1] * 6


def run(project: params.Params, **changes: Any) -> None:
    given = project.train.model_copy(update={"epochs": 2, **changes})
    train.fit(17, project.prompt, project.lora, given, project.runtime)


def outputs() -> dict[str, str]:
    files = [*paths.adapter(17).iterdir(), paths.training_summary(17), paths.training_log(17)]
    return {path.name: records.sha256_file(path) for path in files}


def test_the_stage_writes_adapter_summary_and_curve(quantized: params.Params) -> None:
    run(quantized)
    summary = records.read_json(paths.training_summary(17))
    assert summary["rows"] == 16
    assert summary["steps"] == 8
    assert [entry["step"] for entry in summary["validation"]] == [0, 4, 8]
    assert summary["validation"][-1]["loss"] < summary["validation"][0]["loss"]
    curve = list(csv.DictReader(paths.training_log(17).read_text().splitlines()))
    assert [int(row["step"]) for row in curve] == list(range(8))
    assert [float(row["epoch"]) for row in curve] == [n / 4 for n in range(8)]
    assert not list(paths.SCRATCH.glob("train-17-*"))


def test_keeping_the_weights_unpacked_changes_no_bit_and_threads_may(quantized: params.Params) -> None:
    """What `runtime` holds is declared by no stage unless it can change a result: the thread count alone can."""
    run(quantized)
    expected = outputs()
    on_the_fly = quantized.runtime.model_copy(update={"keep_dequantized": False})
    run(quantized.model_copy(update={"runtime": on_the_fly}))
    assert outputs() == expected
    run(quantized.model_copy(update={"runtime": quantized.runtime.model_copy(update={"threads": 2})}))
    assert records.read_json(paths.training_summary(17))["threads"] == 2


class Killed(BaseException):
    """Stands for the process dying: nothing of ours catches it."""


def killed_at(step: int, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train by `call` until step `step`, with a checkpoint after every step."""
    original = train.Trainer.step

    def stepping(self: train.Trainer, batch: Any, epoch: float) -> None:
        if len(self.log) == step:
            raise Killed
        original(self, batch, epoch)

    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Trainer, "step", stepping)
        call()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prompt_loss_weight": 0.2, "label_smoothing": 0.1, "neftune_alpha": 5.0, "schedule": "wsd", "warmup": 2},
        {"optimizer": "adafactor", "beta2": None},
        {"optimizer": "muon", "beta2": None},
    ],
    ids=["default", "losses", "adafactor", "muon"],
)
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(
    quantized: params.Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
) -> None:
    run(quantized, **changes)
    expected = outputs()
    for step in (3, 6):
        killed_at(step, lambda: run(quantized, **changes), monkeypatch)
    torch.manual_seed(99)  # the global state of the random generator must not matter
    run(quantized, **changes)
    assert "going on from step 6" in capsys.readouterr().out
    assert outputs() == expected


# Validation during training


def test_validating_more_often_changes_no_bit_of_the_adapter(quantized: params.Params) -> None:
    run(quantized)
    expected = adapter.Saved(paths.adapter(17)).sha256
    losses = {entry["step"]: entry["loss"] for entry in records.read_json(paths.training_summary(17))["validation"]}
    run(quantized, validate_every=3)
    summary = records.read_json(paths.training_summary(17))
    assert adapter.Saved(paths.adapter(17)).sha256 == expected
    assert [entry["step"] for entry in summary["validation"]] == [0, 3, 6, 8]
    assert summary["validation"][-1]["loss"] == losses[8] == summary["kept_loss"]


def test_the_summary_says_what_is_kept_and_how_far_training_rows_are_ahead(quantized: params.Params) -> None:
    run(quantized)
    summary = records.read_json(paths.training_summary(17))
    assert (summary["steps"], summary["planned_steps"], summary["stopped_early"]) == (8, 8, False)
    assert (summary["epochs"], summary["kept_step"], summary["kept_epoch"]) == (2.0, 8, 2.0)
    assert summary["training_loss_rows"] == summary["validation_rows"] == 8
    assert summary["gap"] == summary["kept_loss"] - summary["training_loss"]
    assert summary["adapter_bytes"] == (paths.adapter(17) / adapter.WEIGHTS).stat().st_size
    # Taken in evaluation mode: of the rows that validation has, it is the validation loss.
    records.write_rows(paths.split("train"), records.read_rows(paths.split("validation"), records.Example))
    run(quantized)
    summary = records.read_json(paths.training_summary(17))
    assert summary["gap"] == pytest.approx(0, abs=1e-6)


def test_groups_are_taken_evenly() -> None:
    trees = some_trees()
    assert train.evenly(trees, 4) == [trees[0], trees[3]]
    assert train.evenly(trees, 1) == [trees[0]]
    assert train.evenly(trees, 100) == trees


@pytest.mark.parametrize(
    ("losses", "patience", "best", "over"),
    [
        ([3.0], 1, 0, False),
        ([1.0, 2.0], 1, 1, False),  # worse than before training: still the best of what was trained
        ([1.0, 2.0, 3.0], 1, 1, True),
        ([3.0, 2.0, 2.0], 1, 1, True),  # equal is no gain
        ([3.0, 2.0, 2.5, 1.0], 2, 3, False),
        ([3.0, 1.0, 2.5, 2.0], 2, 1, True),
        ([3.0, 1.0, 2.5, 2.0], 0, 1, False),
    ],
)
def test_training_is_over_once_patience_has_passed(losses: list[float], patience: int, best: int, over: bool) -> None:
    validation = [Validation(step, loss) for step, loss in enumerate(losses)]
    assert train.lowest(validation).step == best
    assert train.is_over(validation, patience) is over


def stopping(quantized: params.Params) -> None:
    run(quantized, validate_every=1, early_stopping=2)


def as_planned(seen: dict[int, dict[str, torch.Tensor]]) -> Callable[..., float]:
    """Validation losses that are lowest after step 3; notes the adapter at each step."""

    def loss(self: train.Trainer, trees: Any, label: str) -> float:
        assert trees
        if label == "validate":
            seen[len(self.log)] = {name: master.clone() for name, master in self.masters.items()}
        return 1.0 + abs(len(self.log) - 3)

    return loss


def test_early_stopping_keeps_the_best_adapter_and_a_killed_run_the_same(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    seen: dict[int, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr(train.Trainer, "loss", as_planned(seen))
    stopping(quantized)
    expected = outputs()
    summary = records.read_json(paths.training_summary(17))
    assert [entry["step"] for entry in summary["validation"]] == [0, 1, 2, 3, 4, 5]
    assert (summary["steps"], summary["planned_steps"], summary["stopped_early"]) == (5, 8, True)
    assert (summary["best_step"], summary["kept_step"], summary["kept_epoch"], summary["kept_loss"]) == (
        3,
        3,
        0.75,
        1.0,
    )
    assert len(paths.training_log(17).read_text().splitlines()) == 6
    assert "at step 3, stopped at step 5 of 8" in capsys.readouterr().out
    saved = load_file(paths.adapter(17) / adapter.WEIGHTS)
    for name, master in seen[3].items():
        assert torch.equal(saved[name.replace(".default", "")], master), name
    assert any(not torch.equal(seen[3][name], seen[5][name]) for name in seen[3])

    for step in (2, 4):  # before the best, and behind it: the best is part of the checkpoint
        killed_at(step, lambda: stopping(quantized), monkeypatch)
    stopping(quantized)
    assert "going on from step 4" in capsys.readouterr().out
    assert outputs() == expected


def test_early_stopping_that_could_never_act_is_refused(quantized: params.Params) -> None:
    with pytest.raises(UserError, match=r"early_stopping = 2, but training has 2 validations after its first step"):
        run(quantized, early_stopping=2)
    run(quantized, early_stopping=1)


def test_another_learning_rate_starts_afresh(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_at(3, lambda: run(quantized), monkeypatch)
    capsys.readouterr()
    run(quantized, learning_rate=1e-3)
    assert "going on" not in capsys.readouterr().out


def test_another_number_of_threads_starts_afresh(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`runtime.threads: 0` and `device: auto` are another number and another device on another day."""
    killed_at(3, lambda: run(quantized), monkeypatch)
    capsys.readouterr()
    monkeypatch.setattr(devices, "threads", lambda _: 3)
    run(quantized)
    assert "going on" not in capsys.readouterr().out


def test_a_base_that_has_changed_on_the_disk_is_refused(quantized: params.Params) -> None:
    [weights] = paths.QUANTIZED.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="out/models/quantized is not what its stage wrote.*lora-repro verify"):
        run(quantized)


def test_rows_that_do_not_fit_are_counted_and_above_the_share_refused(quantized: params.Params) -> None:
    examples = records.read_rows(paths.split("train"), records.Example)
    long = records.Example("long/what", "long", "what", "red cat runs " * 80, "blue dog", "red")
    records.write_rows(paths.split("train"), [*examples, long])
    with pytest.raises(UserError, match=r"1 of 17 training prompts are longer than prompt.max_tokens = 200"):
        run(quantized, max_dropped_share=0.0)
    run(quantized, max_dropped_share=0.1)
    assert records.read_json(paths.training_summary(17))["dropped"] == 1


def test_a_validation_prompt_that_does_not_fit_is_refused(quantized: params.Params) -> None:
    long = records.Example("long/what", "long", "what", "red cat runs " * 80, "blue dog", "red")
    records.write_rows(paths.split("validation"), [long])
    with pytest.raises(UserError, match="1 of 1 validation prompts are longer than prompt.max_tokens = 200"):
        run(quantized)


def test_what_became_of_texts_is_said_and_in_the_summary(
    quantized: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "validation"):
        examples = records.read_rows(paths.split(split), records.Example)
        odd = records.Example("odd/what", "odd", "what", "red <|end|> cat", "<think>a</think>blue <|end|> dog", "red")
        long = records.Example("long/what", "long", "what", "red cat runs " * 80, "blue dog", "red")
        records.write_rows(paths.split(split), [*examples, odd, long])
    cut = quantized.prompt.model_copy(update={"truncate_source": True})
    run(quantized.model_copy(update={"prompt": cut}))
    summary, printed = records.read_json(paths.training_summary(17)), capsys.readouterr().out
    assert summary["dropped"] == 0
    for split, rows in (("train", 18), ("validation", 10)):
        found = summary["encoded"][split]
        assert (found["examples"], found["controls"], found["cut"], found["thoughts"]) == (rows, 1, 1, 1)
        assert found["lost"] > 30
        of = f"of {rows} {'training' if split == 'train' else split} examples"
        assert f"train 17: 1 {of} hold the name of a control token" in printed
        assert f"train 17: the prompts of 1 {of} were cut to prompt.max_tokens" in printed
        assert f"train 17: the targets of 1 {of} hold a thought" in printed


def test_the_remedy_for_long_rows_is_not_what_is_set_already(quantized: params.Params) -> None:
    system = [{"role": "system", "content": "red cat runs " * 80}]
    long = records.Example("long/what", "long", "what", "red", "blue dog", "red", history=system)
    records.write_rows(paths.split("train"), [long])
    cut = quantized.prompt.model_copy(update={"truncate_source": True})
    with pytest.raises(UserError, match="shorten what is never cut.*system message") as refused:
        run(quantized.model_copy(update={"prompt": cut}))
    assert "truncate_source to true" not in str(refused.value)
    answer = records.Example("long/what", "long", "what", "red", "blue dog " * 300, "red")
    records.write_rows(paths.split("train"), [answer])
    with pytest.raises(UserError, match="1 of 1 training prompts exceed the model's context of 512 tokens with their"):
        run(quantized)


# What the loss counts


def talks() -> list[records.Example]:
    """Training rows, each after another question and its answer; the first one's is not to be learnt."""
    examples = records.read_rows(paths.split("train"), records.Example)
    earlier = [{"role": "user", "content": "red cat?"}, {"role": "assistant", "content": "blue dog runs"}]
    marked = [earlier[0], earlier[1] | {"weight": "0"}]
    return [replace(one, history=earlier if at else marked) for at, one in enumerate(examples)]


def test_all_answers_of_a_conversation_are_learnt_and_losses_that_are_compared_stay_plain(
    quantized: params.Params,
) -> None:
    examples = talks()
    records.write_rows(paths.split("train"), examples)
    found = {}
    for turns in ("last", "all"):
        run(quantized, turns=turns, learning_rate=1e-30)
        found[turns] = records.read_json(paths.training_summary(17))
    last, all_of_them = found["last"], found["all"]
    tokenizer = checkpoint.tokenizer(paths.QUANTIZED)
    answer = len(tokenizer("blue dog runs", add_special_tokens=False).input_ids) + 1
    # Those of a group stand in what its rows share, and are predicted once.
    groups = {one.group for one in examples}
    assert all_of_them["supervised_tokens"] == last["supervised_tokens"] + 2 * answer * len(groups)
    for name in ("rows", "steps", "tokens", "training_loss", "training_loss_rows", "kept_loss", "best_loss"):
        assert all_of_them[name] == last[name], name
    assert all_of_them["final_loss"] != last["final_loss"]


@pytest.mark.parametrize("counted", [one for name, one in COUNTED.items() if name != "answers"])
def test_validation_and_training_loss_stay_plain_whatever_a_step_counts(
    quantized: params.Params, counted: dict[str, Any]
) -> None:
    found = []
    for changes in ({}, counted):
        run(quantized, learning_rate=1e-30, **changes)
        found.append(records.read_json(paths.training_summary(17)))
    for name in ("validation", "training_loss", "gap", "rows", "tokens"):
        assert found[0][name] == found[1][name], name
    assert found[0]["final_loss"] != found[1]["final_loss"]


def test_a_warmup_that_is_longer_than_training_is_refused(quantized: params.Params) -> None:
    with pytest.raises(UserError, match=r"train.warmup = 9 steps, and training has 8: lower it, or raise train.epochs"):
        run(quantized, warmup=9.0)
    run(quantized, warmup=8.0)
    rates = [float(row["learning_rate"]) for row in csv.DictReader(paths.training_log(17).read_text().splitlines())]
    assert rates == pytest.approx([(step + 1) / 8 * 1e-2 for step in range(8)])
