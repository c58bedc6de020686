"""LoRA training: only the adapter is optimized, on a frozen and possibly 4-bit base (QLoRA, arXiv 2305.14314).

The loss of a step is the mean over all supervised tokens of its batch, by their weights, however the batch is split for
memory: each part gives its sum, divided by the weight of the whole batch. The adapter computes in the model's dtype;
gradients are summed, and the update is made, in float32. The order, dropout, noise and learning rate of a step depend
only on the seed and the step's number, so training can be interrupted anywhere.

Several processes (`pipeline.model.processes`) divide the groups of each batch, and of validation, among them. They sum
gradients and losses over the supervised tokens of all, which equals one process up to rounding. Only dropout differs,
since each process draws its own.

The loss on the validation split shows overfitting. `early_stopping` ends training after that many validations without a
lower loss, and keeps the adapter with the lowest one. It never keeps the state before the first step, which is the
base. The training loss is measured like the validation loss: in evaluation mode, with the kept adapter, on training
groups spread evenly through the split, with about as many rows as validation has. Both are plain means over the tokens
of the last answers, whatever a step's loss counts, so that experiments can be compared.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pipeline.core import contracts, params, paths, records
from pipeline.core.contracts import QuantizedFacts, Step, TrainingSummary, Validation
from pipeline.core.errors import UserError
from pipeline.core.progress import bar, publish_validation, say
from pipeline.core.records import Encoded, Example
from pipeline.lora import adapter, neftune, optimizer, schedule, start
from pipeline.model import adapted, checkpoint, devices, load, loss, memory, pack, packed, processes, resume, shard
from pipeline.model.prompt import Encoder, Row, notices

if TYPE_CHECKING:
    import torch

SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of training and validation, how many training rows were dropped because they are too long, and what
    became of the examples of both splits."""

    train: list[Row]
    validation: list[Row]
    dropped: int
    encoded: dict[str, Encoded]

    @property
    def checked(self) -> int:
        """The number of prompts that were checked, including those of dropped rows."""
        return len(self.train) + self.dropped + len(self.validation)


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be computed.

    `steps` has the epochs before each step, and its batch. `validation` and `sample`, training groups spread evenly
    through the split, are the groups of the two losses. In these the last answers alone are supervised.
    """

    steps: list[tuple[float, list[pack.Tree]]]
    epochs: int
    validation: list[pack.Tree]
    sample: list[pack.Tree]

    def epochs_at(self, step: int) -> float:
        """The number of epochs that have passed after `step` steps."""
        return self.steps[step][0] if step < len(self.steps) else float(self.epochs)


def fit(seed: int, prompt: params.Prompt, lora: params.Lora, train: params.Train, runtime: params.Runtime) -> None:
    """Train the adapter of one seed. Write it with its summary (`TrainingSummary`) and its curve.

    UserError if rows do not fit, a target module does not exist, memory is too small, or a loss is not finite.
    """
    # 1. Plan, and check what can be checked before the model is loaded.
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    rows = _rows(Encoder(checkpoint.tokenizer(), prompt, facts.context), train)
    plan = _plan(rows, train, seed)
    device = _device_for(plan, facts, lora, train, runtime)
    identity = _identity(seed, facts, device, [prompt, lora, train], runtime)
    processes.require_same(resume.key("train", identity), "experiment")
    with resume.folder(f"train-{seed}", identity) as scratch:
        # 2. Load the model with a fresh adapter, or with the state of an interrupted run.
        base = load.quantized(device, runtime.keep_dequantized, runtime.sharding)
        model = start.attach(base, lora, seed, rows.train)
        if runtime.gradient_checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        trainer = Trainer(model, train, seed, len(plan.steps), lora.plus_ratio)
        trainer.resume(scratch)
        processes.require_same(len(trainer.log), "checkpoint")
        if processes.rank() == 0:
            for notice in (one for split, found in rows.encoded.items() for one in notices(split, found)):
                say(f"train {seed}: {notice}")
        say(
            f"train {seed}: {len(rows.train)} rows ({rows.dropped} dropped), {len(plan.steps)} steps, "
            f"{trainer.parameters:,} trainable parameters"
        )
        # 3. Make the steps.
        _run(trainer, plan, scratch)
        # 4. Measure and write the adapter that is kept.
        trainer.validate(plan.validation)
        trainer.keep_best()
        training_loss = trainer.loss(plan.sample, "training rows")
        trainer.write_masters()
        logit_change = adapter.logit_change(model.eval())
        if processes.rank() > 0:
            return
        adapter.save(model, trainer.masters, paths.adapter(seed), facts.sha256)
        records.write_text(paths.training_log(seed), contracts.curve_text(trainer.log))
        summary = _summary(trainer, rows, plan, device, training_loss, logit_change)
        contracts.write(paths.training_summary(seed), summary)
    stopped = f", stopped at step {summary.steps} of {summary.planned_steps}" if summary.stopped_early else ""
    say(
        f"train {seed}: validation loss {summary.validation[0].loss:.4f} -> {summary.kept_loss:.4f} "
        f"at step {summary.kept_step}{stopped}, training loss {training_loss:.4f}"
    )


def _rows(encoder: Encoder, train: params.Train) -> Rows:
    """The rows of both splits. UserError if too many do not fit."""
    encode = encoder.conversations if train.turns == "all" else encoder.rows
    everything, of_train = encode(records.read_rows(paths.split("train"), Example))
    fitting = [row for row in everything if encoder.fits(row.prompt) and encoder.holds(row)]
    validation, of_validation = encoder.rows(records.read_rows(paths.split("validation"), Example))
    longest_answer = max(len(row.completion) for row in validation)
    encoder.require_fit({row.id: row.prompt for row in validation}, "validation", longest_answer)
    dropped = len(everything) - len(fitting)
    if dropped > train.max_dropped_share * len(everything) or not fitting:
        raise UserError(_too_long(encoder, everything, dropped, train.max_dropped_share))
    return Rows(fitting, validation, dropped, {"train": of_train, "validation": of_validation})


def _too_long(encoder: Encoder, rows: Sequence[Row], dropped: int, share: float) -> str:
    """Why so many training rows were dropped, and what to do."""
    long = sum(not encoder.fits(row.prompt) for row in rows)
    too_many = f"more than train.max_dropped_share = {share} allows"
    if not long:
        return (
            f"{dropped} of {len(rows)} training prompts exceed the model's context of {encoder.context} tokens with "
            f"their answers, {too_many}: lower prompt.max_tokens, or leave long answers out with data.words.max"
        )
    return (
        f"{long} of {len(rows)} training prompts are longer than prompt.max_tokens = {encoder.params.max_tokens}, "
        f"{too_many}{encoder.remedy}; or raise train.max_dropped_share"
    )


def _plan(rows: Rows, train: params.Train, seed: int) -> Plan:
    """The plan of one seed.

    UserError if `train.early_stopping` would wait longer than training lasts, or the schedule has too few steps.
    """
    groups, validation = pack.weighed(rows.train, train.prompt_loss_weight), pack.trees(rows.validation)
    epochs = [batches(groups, train.batch_size, _mix(seed, -1 - epoch)) for epoch in range(train.epochs)]
    steps = [(epoch + at / len(some), batch) for epoch, some in enumerate(epochs) for at, batch in enumerate(some)]
    after_the_first = sum(_is_due(step, epoch, train) for step, (epoch, _) in enumerate(steps))
    if train.early_stopping >= after_the_first > 0:
        raise UserError(
            f"train.early_stopping = {train.early_stopping}, but training has {after_the_first} validations after "
            f"its first step, which are too few: lower it, raise train.epochs, or validate more often with "
            f"train.validate_every (training has {len(steps)} steps)"
        )
    schedule.require(len(steps), train)
    return Plan(steps, train.epochs, validation, evenly(pack.trees(rows.train), len(rows.validation)))


def _device_for(
    plan: Plan, facts: QuantizedFacts, lora: params.Lora, train: params.Train, runtime: params.Runtime
) -> "torch.device":
    """The device that trains. UserError if it cannot, or if a process would have nothing to do."""
    groups = max(len(batch) for _, batch in plan.steps)
    if groups < processes.count() and runtime.sharding != "tensor":
        raise UserError(
            f"runtime.processes = {processes.count()}, but a step's batch has {groups} groups of rows at most to "
            f"divide among them: lower it, or raise train.batch_size"
        )
    device = devices.choose(runtime)
    devices.require(device, facts.dtype)
    optimizer.require(train.optimizer, device)
    base = memory.held(memory.Base.quantized(facts), runtime, device)
    adapted.require_shape(lora, base.shape)
    largest = memory.load([*(batch for _, batch in plan.steps), plan.validation], train.micro_batch_tokens)
    memory.require_training(device, base, lora, train, largest, runtime.gradient_checkpointing)
    return device


def _identity(
    seed: int,
    facts: QuantizedFacts,
    device: "torch.device",
    sections: Sequence[BaseModel],
    runtime: params.Runtime,
) -> dict[str, Any]:
    """What decides the result besides code and packages. A checkpoint with another identity is not used."""
    return {
        "seed": seed,
        "model": facts.sha256,
        "data": [records.sha256_file(paths.split(name)) for name in ("train", "validation")],
        "params": [section.model_dump(mode="json") for section in sections],
        "runtime": runtime.model_dump(mode="json"),
        "effective": [device.type, devices.threads(device)],
    }


def _run(trainer: "Trainer", plan: Plan, scratch: Path) -> None:
    """Make the remaining steps, with validations and checkpoints, unless training stops early."""
    seed, train = trainer.seed, trainer.train
    last_saved = time.monotonic()
    with bar(f"train {seed}", len(plan.steps), "steps") as advance:
        advance(len(trainer.log))
        while len(trainer.log) < len(plan.steps):
            epoch, batch = plan.steps[len(trainer.log)]
            if _is_due(len(trainer.log), epoch, train):
                trainer.validate(plan.validation)
                if is_over(trainer.validation, train.early_stopping):
                    break
                # Not the last one: a search must not end a trial depending on how fast it reads the file.
                publish_validation(seed, len(trainer.log), trainer.validation[-1].loss)
            trainer.step(batch, epoch)
            advance(1)
            if processes.rank() == 0 and time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS:
                trainer.save(scratch)
                last_saved = time.monotonic()


def _summary(
    trainer: "Trainer", rows: Rows, plan: Plan, device: "torch.device", training_loss: float, logit_change: float
) -> TrainingSummary:
    from pipeline.model import attention

    log, seed = trainer.log, trainer.seed
    best = lowest(trainer.validation)
    kept = best if trainer.train.early_stopping else trainer.validation[-1]
    return TrainingSummary(
        seed=seed,
        device=device.type,
        threads=devices.threads(device),
        attention=attention.describe(device.type),
        rows=len(rows.train),
        dropped=rows.dropped,
        validation_rows=len(rows.validation),
        steps=len(log),
        planned_steps=len(plan.steps),
        epochs=plan.epochs_at(len(log)),
        stopped_early=len(log) < len(plan.steps),
        prompts_checked=rows.checked,
        encoded=rows.encoded,
        shortest_answer=min(len(row.completion) for row in rows.train),
        repacked_layers=packed.repacked(trainer.model),
        largest_grad_norm=max(step.grad_norm for step in log),
        trainable_parameters=trainer.parameters,
        adapter_bytes=(paths.adapter(seed) / adapter.WEIGHTS).stat().st_size,
        supervised_tokens=sum(tree.supervised for _, batch in plan.steps[: len(log)] for tree in batch),
        tokens=sum(step.tokens for step in log),
        final_loss=log[-1].loss,
        validation=trainer.validation,
        best_step=best.step,
        best_epoch=plan.epochs_at(best.step),
        best_loss=best.loss,
        kept_step=kept.step,
        kept_epoch=plan.epochs_at(kept.step),
        kept_loss=kept.loss,
        training_loss=training_loss,
        training_loss_rows=sum(tree.rows for tree in plan.sample),
        gap=kept.loss - training_loss,
        logit_change=logit_change,
    )


class Trainer:
    """The state of a training run, with its steps, validations and checkpoints.

    `masters` are the adapter's values in float32. `steps` is the planned number, which the learning rate depends on;
    that of B is `plus_ratio` times as high.
    """

    def __init__(self, model: Any, train: params.Train, seed: int, steps: int, plus_ratio: float = 1.0) -> None:
        self.model, self.train, self.seed, self.steps = model, train, seed, steps
        self.tensors = adapter.tensors(model)
        self.masters = {name: shard.whole(tensor.detach()).float().clone() for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            tensor.data = tensor.data.to(adapter.dtype(name, model))
        self.optimizer = optimizer.build(optimizer.groups(self.masters, plus_ratio), train)
        self.log: list[Step] = []
        self.validation: list[Validation] = []
        self.best: dict[str, torch.Tensor] = {}

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.masters.values())

    def step(self, batch: Sequence[pack.Tree], epoch: float) -> None:
        """One optimizer step on one batch, after `epoch` epochs. UserError if the loss or the gradient is not
        finite."""
        import torch

        number = len(self.log)
        mean, gradients = self._gradients(batch)
        norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise UserError(
                f"training diverged at step {number}: loss {mean}, gradient norm {norm}; lower train.learning_rate"
            )
        rate = schedule.learning_rate(number, self.steps, self.train)
        self._update(gradients, rate, min(1.0, self.train.max_grad_norm / (norm + 1e-6)))
        rows = sum(tree.rows for tree in batch)
        self.log.append(Step(number, epoch, mean, rate, norm, rows, sum(tree.tokens for tree in batch)))

    def _gradients(self, batch: Sequence[pack.Tree]) -> tuple[float, "dict[str, torch.Tensor]"]:
        """The mean loss over the supervised tokens of a batch, by weight, and its gradients in float32, over all
        processes."""
        import torch

        self.model.train()
        torch.manual_seed(_mix(self.seed, len(self.log)) + processes.rank())  # for dropout
        weight = sum(tree.weight for tree in batch)
        gradients = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        total = 0.0
        own = processes.share(batch, lambda tree: tree.tokens)
        noise = {id(tree): _mix(self.seed, len(self.log), number) for number, tree in enumerate(batch)}
        # Gradients below 6e-8 vanish in float16: there, take the gradient of the sum and divide it in float32.
        unit = 1 / weight if self.model.dtype is torch.float16 else 1.0
        with shard.together(self.model, backward=True):
            for part in pack.micro_batches(own, self.train.micro_batch_tokens):
                part_loss = self._summed(part, noise) / weight
                with devices.repeatable(self.model.device):
                    (part_loss if unit == 1.0 else part_loss / unit).backward()
                total += part_loss.item()
                for name, tensor in self.tensors.items():
                    if tensor.grad is not None:
                        gradient = shard.whole(tensor.grad)
                        gradients[name] += gradient if unit == 1.0 else gradient.float() * unit
                        tensor.grad = None
        self.model.zero_grad()  # `shard.together` may have made gradients while this process waited
        return processes.add_up(total, list(gradients.values())), gradients

    def _summed(self, part: Sequence[pack.Tree], noise: Mapping[int, int]) -> "torch.Tensor":
        """The loss of one micro-batch, summed over its supervised tokens. `noise`: the seed of each tree, by its id."""
        packed = pack.pack(part, self.model.device)
        seeds = [noise[id(tree)] for tree in part]
        with neftune.noisy(self.model, packed, part, self.train.neftune_alpha, seeds):
            return loss.summed(self.model, packed, self.train.label_smoothing)

    def _update(self, gradients: "dict[str, torch.Tensor]", rate: float, scale: float) -> None:
        """Step the optimizer, with gradients scaled in place, and give the model the new values."""
        for name, master in self.masters.items():
            master.grad = gradients[name].mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self._write_rounded()

    def validate(self, trees: Sequence[pack.Tree]) -> None:
        """Append the mean loss over all validation rows, once a step. With early stopping, remember the best state."""
        if any(one.step == len(self.log) for one in self.validation) or not trees:
            return
        processes.require_same(self.masters, "adapter")
        mean = self.loss(trees, "validate")
        if not math.isfinite(mean):
            raise UserError(f"the validation loss at step {len(self.log)} is {mean}; lower train.learning_rate")
        self.validation.append(Validation(len(self.log), mean))
        if self.train.early_stopping and lowest(self.validation).step == len(self.log):
            self.best = {name: master.clone() for name, master in self.masters.items()}

    def loss(self, trees: Sequence[pack.Tree], label: str) -> float:
        """The mean loss in nats over the supervised tokens of all rows, without dropout. It changes no state."""
        import torch

        self.model.eval()
        own = processes.share(trees, lambda tree: tree.tokens)
        parts = pack.micro_batches(own, self.train.micro_batch_tokens)
        total = 0.0
        progress = bar(f"{label} {self.seed}", len(parts), "parts")
        with torch.no_grad(), shard.together(self.model), progress as advance:
            for part in parts:
                total += loss.summed(self.model, pack.pack(part, self.model.device)).item()
                advance(1)
        return processes.add_up(total) / sum(tree.weight for tree in trees)

    def keep_best(self) -> None:
        """With early stopping, return to the state with the lowest validation loss."""
        for name, tensor in self.best.items():
            self.masters[name].copy_(tensor)
        self._write_rounded()

    def write_masters(self) -> None:
        """Give the model the float32 values, which are saved."""
        for name, tensor in self.tensors.items():
            values = shard.part(self.masters[name].clone(), tensor)
            tensor.data = values if "lora_" in name else values.to(tensor.dtype)
        for tensor in adapter.frozen(self.model).values():
            tensor.data = tensor.data.float()

    def save(self, scratch: Path) -> None:
        """Write the state to `scratch`, atomically."""
        import torch

        state = {
            "masters": self.masters,
            "optimizer": self.optimizer.state_dict(),
            "log": [asdict(step) for step in self.log],
            "validation": [asdict(one) for one in self.validation],
            "best": self.best,
        }
        with records.replacing(scratch / "state.pt") as temporary:
            torch.save(state, temporary)

    def resume(self, scratch: Path) -> None:
        """Continue from the state in `scratch`, if there is one."""
        import torch

        file = scratch / "state.pt"
        if not file.is_file():
            return
        state = torch.load(file, map_location=self.model.device, weights_only=True)
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = [Step(**step) for step in state["log"]]
        self.validation, self.best = [Validation(**one) for one in state["validation"]], state["best"]
        for one in self.validation:
            publish_validation(self.seed, one.step, one.loss)
        self._write_rounded()
        say(f"train {self.seed}: going on from step {len(self.log)}")

    def _write_rounded(self) -> None:
        """Give the model the masters in its own dtype."""
        for name, tensor in self.tensors.items():
            tensor.data.copy_(shard.part(self.masters[name], tensor))


def batches(trees: Sequence[pack.Tree], rows: int, seed: int) -> list[list[pack.Tree]]:
    """The batches of one epoch: whole groups, in an order drawn from `seed`, with at most `rows` rows a batch.

    A group with more rows is a batch of its own.
    """
    import torch

    order = torch.randperm(len(trees), generator=torch.Generator().manual_seed(seed)).tolist()
    filled: list[list[pack.Tree]] = [[]]
    for tree in (trees[index] for index in order):
        if filled[-1] and sum(other.rows for other in [*filled[-1], tree]) > rows:
            filled.append([])
        filled[-1].append(tree)
    return filled


def evenly(trees: Sequence[pack.Tree], rows: int) -> list[pack.Tree]:
    """Groups spread evenly through `trees`, with about `rows` rows in total, or all groups if they have fewer."""
    share = min(1.0, rows / sum(tree.rows for tree in trees))
    count = max(1, round(share * len(trees)))
    return [trees[at * len(trees) // count] for at in range(count)]


def lowest(validation: Sequence[Validation]) -> Validation:
    """The first validation with the lowest loss. The one before the first step counts only if it is the only one."""
    return min(validation[1:] or validation, key=lambda one: one.loss)


def is_over(validation: Sequence[Validation], patience: int) -> bool:
    """Whether training ends: `patience` validations have passed since the lowest. Patience 0 never ends it."""
    return 0 < patience <= len(validation) - 1 - validation.index(lowest(validation))


def _is_due(step: int, epoch: float, train: params.Train) -> bool:
    """Whether to validate before this step. The end of training is always validated."""
    return step % train.validate_every == 0 if train.validate_every else epoch.is_integer()


def _mix(*numbers: int) -> int:
    """A seed for one step or epoch of one run (the run's seed comes first), unrelated to those of other numbers."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, numbers)).encode()).digest()[:8], "big") >> 1
