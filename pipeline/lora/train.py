"""LoRA training: the adapter alone is optimized, on a frozen and possibly 4-bit base (QLoRA, arXiv 2305.14314).

The loss of a step is the mean over all supervised tokens of its batch, however the batch is split for memory. The
adapter computes in the model's dtype; gradients are summed and the update is made in float32. Order, dropout and
learning rate of a step depend on the seed and the step's number alone, so training can stop and go on anywhere.

Several processes (`pipeline.model.processes`) divide the groups of each step's batch, and of validation, among them,
and
sum gradients and losses over the supervised tokens of all: up to rounding, what one process computes. Dropout alone
differs, since each process draws of its own.

Overfitting is watched by the loss on the validation split. With `early_stopping`, training ends once that has not
fallen for so many validations, and the adapter of the lowest is kept; what is kept is among the states after the first
step, since the state before it is the base. The training loss beside it is of the same kind: in evaluation mode, by the
adapter that is kept, over training groups spread evenly through the split, with about as many rows as validation has.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.core.progress import bar, publish_validation, say
from pipeline.lora import adapter, optimizer
from pipeline.model import checkpoint, loss, memory, pack, packed, resume, shard
from pipeline.model import device as devices
from pipeline.model import load as models
from pipeline.model import processes as distributed
from pipeline.model.prompt import Encoder, Row

if TYPE_CHECKING:
    import torch

SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the training curve. `loss` is in nats a supervised token; `tokens` were computed, not padded."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    rows: int
    tokens: int


def train(seed: int, prompt: params.Prompt, lora: params.Lora, train: params.Train, runtime: params.Runtime) -> None:
    """Train the adapter of one seed; write it with its summary and its curve.

    UserError for rows that do not fit, a target module that is not there, or a loss that is not finite.
    """
    from pipeline.model import attention

    facts = records.read_json(paths.QUANTIZED_FACTS)
    encoder = Encoder(checkpoint.tokenizer(), prompt, facts["context"])
    everything = _rows(encoder, "train")
    rows = [row for row in everything if encoder.fits(row.prompt) and encoder.holds(row)]
    dropped = len(everything) - len(rows)
    validation_rows = _rows(encoder, "validation")
    longest_answer = max(len(row.completion) for row in validation_rows)
    encoder.require_fit({row.id: row.prompt for row in validation_rows}, "validation", longest_answer)
    if dropped > train.max_dropped_share * (len(rows) + dropped) or not rows:
        raise UserError(
            f"{dropped} of {len(rows) + dropped} training prompts are longer than prompt.max_tokens = "
            f"{prompt.max_tokens}, above train.max_dropped_share = {train.max_dropped_share}: raise one of them, "
            f"or set prompt.truncate_source to true"
        )
    epochs = [batches(pack.trees(rows), train.batch_size, _mix(seed, -1 - epoch)) for epoch in range(train.epochs)]
    # Every step's batch, and how many epochs lie before it.
    plan = [(epoch + at / len(steps), batch) for epoch, steps in enumerate(epochs) for at, batch in enumerate(steps)]
    validated = [step for step, (epoch, _) in enumerate(plan) if _is_due(step, epoch, train)] + [len(plan)]
    if train.early_stopping >= len(validated) - 1 > 0:
        raise UserError(
            f"train.early_stopping = {train.early_stopping}, but training has {len(validated) - 1} validations after "
            f"its first step, too few to wait so long: lower it, raise train.epochs, or validate more often with "
            f"train.validate_every (training has {len(plan)} steps)"
        )
    groups = max(len(batch) for _, batch in plan)
    if groups < distributed.processes() and runtime.sharding != "tensor":
        raise UserError(
            f"runtime.processes = {distributed.processes()}, but a step's batch has {groups} groups of rows at most to "
            f"divide among them: lower it, or raise train.batch_size"
        )
    validation = pack.trees(validation_rows)
    device = devices.choose(runtime)
    devices.require(device, facts["dtype"])
    optimizer.require(train.optimizer, device)
    base = memory.held(memory.base(paths.QUANTIZED, facts), runtime, device)
    steps = [*(batch for _, batch in plan), validation]
    largest = memory.load(steps, train.micro_batch_tokens)
    memory.require_training(device, base, lora, train, largest, runtime.gradient_checkpointing)
    sample = evenly(pack.trees(rows), len(validation_rows))
    identity = {
        "seed": seed,
        "model": facts["sha256"],
        "data": [records.sha256_file(paths.split(name)) for name in ("train", "validation")],
        "params": [section.model_dump(mode="json") for section in (prompt, lora, train)],
        "runtime": runtime.model_dump(mode="json"),
        "effective": [device.type, devices.threads(device)],
    }
    distributed.require_same(resume.key("train", identity), "experiment")
    with resume.folder(f"train-{seed}", identity) as scratch:
        model = adapter.attach(models.load(device, runtime.keep_dequantized, runtime.sharding), lora, seed)
        if runtime.gradient_checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        trainer = Trainer(model, train, seed, len(plan))
        trainer.resume(scratch)
        distributed.require_same(len(trainer.log), "checkpoint")
        say(
            f"train {seed}: {len(rows)} rows ({dropped} dropped), {len(plan)} steps, "
            f"{trainer.parameters:,} trainable parameters"
        )
        last_saved = time.monotonic()
        with bar(f"train {seed}", len(plan), "steps") as advance:
            advance(len(trainer.log))
            while len(trainer.log) < len(plan):
                epoch, batch = plan[len(trainer.log)]
                if _is_due(len(trainer.log), epoch, train):
                    trainer.validate(validation)
                    if is_over(trainer.validation, train.early_stopping):
                        break
                    # Not the last one: when a search may end a trial does not depend on how fast it looks.
                    publish_validation(seed, len(trainer.log), trainer.validation[-1]["loss"])
                trainer.step(batch, epoch)
                advance(1)
                if distributed.rank() == 0 and time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS:
                    trainer.save(scratch)
                    last_saved = time.monotonic()
        trainer.validate(validation)
        trainer.keep_best()
        training_loss = trainer.loss(sample, "training rows")
        trainer.write_masters()
        logit_change = adapter.logit_change(model.eval())
        if distributed.rank() > 0:
            return
        adapter.save(model, trainer.masters, paths.adapter(seed), facts["sha256"])
        curve = records.csv_text(list(Step.__dataclass_fields__), map(astuple, trainer.log))
        records.write_text(paths.training_log(seed), curve)
        best = lowest(trainer.validation)
        kept = best if train.early_stopping else trainer.validation[-1]
        records.write_json(
            paths.training_summary(seed),
            {
                "seed": seed,
                "device": device.type,
                "threads": devices.threads(device),
                "attention": attention.describe(device.type),
                "rows": len(rows),
                "dropped": dropped,
                "validation_rows": len(validation_rows),
                "steps": len(trainer.log),
                "planned_steps": len(plan),
                "epochs": _epochs_at(plan, len(trainer.log), train.epochs),
                "stopped_early": len(trainer.log) < len(plan),
                "prompts_checked": len(everything) + len(validation_rows),
                "shortest_answer": min(len(row.completion) for row in rows),
                "repacked_layers": packed.repacked(model),
                "largest_grad_norm": max(step.grad_norm for step in trainer.log),
                "trainable_parameters": trainer.parameters,
                "adapter_bytes": (paths.adapter(seed) / adapter.WEIGHTS).stat().st_size,
                "supervised_tokens": sum(tree.supervised for _, batch in plan[: len(trainer.log)] for tree in batch),
                "tokens": sum(step.tokens for step in trainer.log),
                "final_loss": trainer.log[-1].loss,
                "validation": trainer.validation,
                "best_step": best["step"],
                "best_epoch": _epochs_at(plan, best["step"], train.epochs),
                "best_loss": best["loss"],
                "kept_step": kept["step"],
                "kept_epoch": _epochs_at(plan, kept["step"], train.epochs),
                "kept_loss": kept["loss"],
                "training_loss": training_loss,
                "training_loss_rows": sum(len(tree.branches) for tree in sample),
                "gap": kept["loss"] - training_loss,
                "logit_change": logit_change,
            },
        )
    stopped = f", stopped at step {len(trainer.log)} of {len(plan)}" if len(trainer.log) < len(plan) else ""
    say(
        f"train {seed}: validation loss {trainer.validation[0]['loss']:.4f} -> {kept['loss']:.4f} "
        f"at step {kept['step']}{stopped}, training loss {training_loss:.4f}"
    )


class Trainer:
    """The state of a training run, and the three things done to it: a step, a validation, a checkpoint."""

    def __init__(self, model: Any, train: params.Train, seed: int, steps: int) -> None:
        self.model, self.train, self.seed, self.steps = model, train, seed, steps
        self.tensors = adapter.tensors(model)
        self.masters = {name: shard.whole(tensor.detach()).float().clone() for name, tensor in self.tensors.items()}
        for tensor in self.tensors.values():
            tensor.data = tensor.data.to(model.dtype)
        self.optimizer = optimizer.build(list(self.masters.values()), train)
        self.log: list[Step] = []
        self.validation: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] = {}

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.masters.values())

    def step(self, batch: Sequence[pack.Tree], epoch: float) -> None:
        """One optimizer step on one batch; UserError when the loss or the gradient is not finite."""
        import torch

        number = len(self.log)
        self.model.train()
        torch.manual_seed(_mix(self.seed, number) + distributed.rank())  # of dropout
        supervised = sum(tree.supervised for tree in batch)
        gradients = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        total = 0.0
        own = distributed.share(batch, lambda tree: tree.tokens)
        # In float16 the gradient of a mean would be lost below 6e-8: there it is that of the sum, divided in float32.
        unit = 1 / supervised if self.model.dtype is torch.float16 else 1.0
        with shard.together(self.model, backward=True):
            for part in pack.micro_batches(own, self.train.micro_batch_tokens):
                part_loss = loss.summed(self.model, pack.pack(part, self.model.device)) / supervised
                with devices.repeatable(self.model.device):
                    (part_loss if unit == 1.0 else part_loss / unit).backward()
                total += part_loss.item()
                for name, tensor in self.tensors.items():
                    if tensor.grad is not None:
                        gradient = shard.whole(tensor.grad)
                        gradients[name] += gradient if unit == 1.0 else gradient.float() * unit
                        tensor.grad = None
        self.model.zero_grad()  # what came of waiting
        total = distributed.add_up(total, list(gradients.values()))
        norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise UserError(
                f"training diverged at step {number}: loss {total}, gradient norm {norm}; lower train.learning_rate"
            )
        scale = min(1.0, self.train.max_grad_norm / (norm + 1e-6))
        for name, master in self.masters.items():
            master.grad = gradients[name].mul_(scale)
        rate = learning_rate(number, self.steps, self.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._write(self.masters)
        rows = sum(len(tree.branches) for tree in batch)
        self.log.append(Step(number, epoch, total, rate, norm, rows, sum(tree.tokens for tree in batch)))

    def validate(self, trees: Sequence[pack.Tree]) -> None:
        """Append the mean loss over all validation rows; with early stopping, hold on to the best state."""
        if any(entry["step"] == len(self.log) for entry in self.validation) or not trees:
            return
        distributed.require_same(self.masters, "adapter")
        mean = self.loss(trees, "validate")
        if not math.isfinite(mean):
            raise UserError(f"the validation loss at step {len(self.log)} is {mean}; lower train.learning_rate")
        self.validation.append({"step": len(self.log), "loss": mean})
        if self.train.early_stopping and lowest(self.validation)["step"] == len(self.log):
            self.best = {name: master.clone() for name, master in self.masters.items()}

    def loss(self, trees: Sequence[pack.Tree], label: str) -> float:
        """The mean loss over the supervised tokens of all rows; dropout is off and nothing is changed."""
        import torch

        self.model.eval()
        own = distributed.share(trees, lambda tree: tree.tokens)
        parts = pack.micro_batches(own, self.train.micro_batch_tokens)
        total = 0.0
        progress = bar(f"{label} {self.seed}", len(parts), "parts")
        with torch.no_grad(), shard.together(self.model), progress as advance:
            for part in parts:
                total += loss.summed(self.model, pack.pack(part, self.model.device)).item()
                advance(1)
        return distributed.add_up(total) / sum(tree.supervised for tree in trees)

    def keep_best(self) -> None:
        """With early stopping, go back to the state whose validation loss was the lowest."""
        for name, tensor in self.best.items():
            self.masters[name].copy_(tensor)
        self._write(self.masters)

    def write_masters(self) -> None:
        """Give the model the float32 masters, which are what is saved."""
        for name, tensor in self.tensors.items():
            tensor.data = shard.part(self.masters[name].clone(), tensor)

    def save(self, scratch: Path) -> None:
        """Write the state whole, or leave the earlier one."""
        import torch

        state = {
            "masters": self.masters,
            "optimizer": self.optimizer.state_dict(),
            "log": [asdict(step) for step in self.log],
            "validation": self.validation,
            "best": self.best,
        }
        with records.replacing(scratch / "state.pt") as temporary:
            torch.save(state, temporary)

    def resume(self, scratch: Path) -> None:
        """Go on from the state in `scratch`, if there is one."""
        import torch

        file = scratch / "state.pt"
        if not file.is_file():
            return
        state = torch.load(file, map_location=self.model.device, weights_only=True)
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = [Step(**step) for step in state["log"]]
        self.validation, self.best = state["validation"], state["best"]
        for entry in self.validation:
            publish_validation(self.seed, int(entry["step"]), entry["loss"])
        self._write(self.masters)
        say(f"train {self.seed}: going on from step {len(self.log)}")

    def _write(self, masters: "dict[str, torch.Tensor]") -> None:
        for name, tensor in self.tensors.items():
            tensor.data.copy_(shard.part(masters[name], tensor))


def batches(trees: Sequence[pack.Tree], rows: int, seed: int) -> list[list[pack.Tree]]:
    """One epoch: all groups in an order drawn from `seed`, whole groups a batch, at most `rows` rows unless one group
    has more."""
    import torch

    order = torch.randperm(len(trees), generator=torch.Generator().manual_seed(seed)).tolist()
    filled: list[list[pack.Tree]] = [[]]
    for tree in (trees[index] for index in order):
        if filled[-1] and sum(len(other.branches) for other in [*filled[-1], tree]) > rows:
            filled.append([])
        filled[-1].append(tree)
    return filled


def evenly(trees: Sequence[pack.Tree], rows: int) -> list[pack.Tree]:
    """Groups spread evenly through `trees`, with about `rows` rows together; all of them where there are fewer."""
    share = min(1.0, rows / sum(len(tree.branches) for tree in trees))
    count = max(1, round(share * len(trees)))
    return [trees[at * len(trees) // count] for at in range(count)]


def lowest(validation: Sequence[dict[str, float]]) -> dict[str, float]:
    """The validation with the lowest loss, the first of equal ones, of those after a step where there are any."""
    return min(validation[1:] or validation, key=lambda entry: entry["loss"])


def is_over(validation: Sequence[dict[str, float]], patience: int) -> bool:
    """Whether so many validations have passed since the lowest that training ends; patience 0 never ends it."""
    return 0 < patience <= len(validation) - 1 - validation.index(lowest(validation))


def _is_due(step: int, epoch: float, train: params.Train) -> bool:
    """Whether to validate before this step; the end of training is due in any case."""
    return step % train.validate_every == 0 if train.validate_every else epoch.is_integer()


def _epochs_at(plan: Sequence[tuple[float, Any]], step: float, epochs: int) -> float:
    """How many epochs had passed once so many steps were made."""
    return plan[int(step)][0] if step < len(plan) else float(epochs)


def learning_rate(step: int, steps: int, train: params.Train) -> float:
    """The rate of step `step` of `steps`, counted from 0: warm-up, then the schedule."""
    warmup = round(train.warmup * steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    decay = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}
    return train.learning_rate * decay[train.schedule]


def _rows(encoder: Encoder, split: str) -> list[Row]:
    return [encoder.row(example) for example in records.read_rows(paths.split(split), records.Example)]


def _mix(seed: int, number: int) -> int:
    """A seed for one step or epoch of one run: the same for the same two numbers, unrelated for others."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8], "big") >> 1
