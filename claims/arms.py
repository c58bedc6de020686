"""Stage arm: tune in one way with each training seed, and evaluate the models: `out/claims/arms/<arm>.json`.

The training step (`pipeline.lora.train.Trainer`) and the batches are the pipeline's own. For the same seed, all arms
see the same rows in the same order. That order is drawn from the seed itself, but the pipeline draws it from a hash of
seed and epoch: with the pipeline's order, earlier figures could not be compared, and the learning rates would have to
be chosen again.

An arm reports the sum of losses for each group of validation rows, so that differences between arms can be resampled
over texts. An arm that is watched also reports the distance from the base's own distribution on general text
(`pipeline.forget`) at several steps. The weights are not kept.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from claims import full_tuning, lab, results, training
from claims.results import UNTUNED, Look, Run
from claims.training import Arm, Cut
from pipeline import forget, probes
from pipeline.core import contracts, params, paths, records, stage
from pipeline.core.contracts import QuantizedFacts
from pipeline.core.progress import bar, say
from pipeline.lora import start, train
from pipeline.model import checkpoint, devices, load, loss, pack, resume, windows
from pipeline.model.prompt import Encoder, Row

RESULT = Path("arm.json")
"""The result of an arm, in its lab."""


@dataclass(frozen=True)
class Bench:
    """The inputs of one arm: its own settings, the settings that all arms share, and the rows, packed by group."""

    arm: Arm
    cut: Cut
    experiment: params.Params
    training: list[pack.Tree]
    validation: list[pack.Tree]
    general: list[Row]


def run(name: str) -> None:
    """Tune and evaluate an arm with every seed. A killed run continues after the last seed that was finished.

    UserError for an arm that is not declared, and for rows that do not fit into the model's context.
    """
    declared = training.load()
    arm, cut, experiment = training.one(declared.arms, name, "arms"), declared.cut, lab.experiment()
    seeds = [UNTUNED] if arm.learning_rate is None else [str(seed) for seed in declared.training_seeds]
    facts = lab.quantized(arm.base).with_suffix(".json")
    links = {paths.DATA: lab.data("default"), paths.QUANTIZED: lab.quantized(arm.base), paths.QUANTIZED_FACTS: facts}
    code = [records.sha256_file(Path(str(file))) for file in (__file__, full_tuning.__file__, results.__file__)]
    with lab.lab(f"arm-{name}", links, {RESULT: results.path(name)}):
        examples = {
            split: training.spread(records.read_rows(paths.split(split), records.Example), count)
            for split, count in (("train", cut.train), ("validation", cut.validation))
        }
        bench, groups = prepared(arm, cut, experiment, examples)
        identity = {
            "settings": [section.model_dump(mode="json") for section in (arm, cut, experiment)],
            "seeds": seeds,
            "model": contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts).sha256,
            "rows": records.sha256_tree(paths.DATA),
            "code": code,
        }
        with resume.folder(f"arm-{name}", identity) as scratch:
            for seed in seeds:
                if not (scratch / f"{seed}.json").exists():
                    records.write_json(scratch / f"{seed}.json", asdict(tuned(bench, seed)))
            runs = {seed: records.read_json(scratch / f"{seed}.json") for seed in seeds}
            records.write_json(
                RESULT,
                {
                    "groups": groups,
                    "tokens": [tree.supervised for tree in bench.validation],
                    "rows": len(examples["train"]),
                    "runs": runs,
                },
            )


def prepared(
    arm: Arm, cut: Cut, experiment: params.Params, examples: dict[str, list[records.Example]]
) -> tuple[Bench, list[str]]:
    """The inputs of the arm, and the names of the validation groups; UserError for rows that do not fit."""
    tokenizer = checkpoint.tokenizer()
    encoder = Encoder(tokenizer, experiment.prompt, contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts).context)
    rows: dict[str, list[Row]] = {split: [encoder.row(one) for one in some] for split, some in examples.items()}
    for split, some in rows.items():
        encoder.require_fit({row.id: row.prompt for row in some}, split, max(len(row.completion) for row in some))
    general = []
    if arm.watch:
        probe = lab.general_text(experiment)
        cuts = windows.cut(tokenizer, probes.texts(probe), cut.general_tokens, probe.window)
        general = [one.row() for one in cuts]
    groups = list(dict.fromkeys(row.group for row in rows["validation"]))
    trees = {split: pack.trees(some) for split, some in rows.items()}
    return Bench(arm, cut, experiment, trees["train"], trees["validation"], general), groups


def tuned(bench: Bench, seed: str) -> Run:
    """Train one model of the arm, unless its learning rate is null, and evaluate it."""
    device = devices.choose(bench.experiment.runtime)
    budget = bench.experiment.train.micro_batch_tokens
    if bench.arm.learning_rate is None:
        model = load.quantized(device, bench.experiment.runtime.keep_dequantized)
        return Run(0, 0, sums(model, bench.validation, budget), [])
    given = bench.experiment.train.model_copy(
        update={"learning_rate": bench.arm.learning_rate, "batch_size": bench.cut.batch_size}
    )
    number = int(seed)
    if bench.arm.lora is None:
        both = full_tuning.load(device)
        model, trained = both, both.tuned
    else:
        lora = bench.experiment.lora.model_copy(update=bench.arm.lora.model_dump())
        base = load.quantized(device, bench.experiment.runtime.keep_dequantized)
        model = trained = start.attach(base, lora, number)
    plan = [
        (epoch + at / len(steps), batch)
        for epoch in range(given.epochs)
        for steps in [train.batches(bench.training, given.batch_size, number + epoch * 2**32)]
        for at, batch in enumerate(steps)
    ]
    trainer = train.Trainer(trained, given, number, len(plan))
    say(f"arm, seed {seed}: {len(plan)} steps, {trainer.parameters:,} trainable parameters")
    looks: list[Look] = []
    found: list[float] = []
    with bar(f"arm {seed}", len(plan), "steps") as advance:
        for at, (epoch, batch) in enumerate(plan, start=1):
            trainer.step(batch, epoch)
            advance(1)
            is_due = bench.arm.watch and at % bench.cut.watch_every == 0
            if is_due or at == len(plan):
                trained.eval()
                found = sums(model, bench.validation, budget)
                if bench.arm.watch:
                    looks.append(_look(model, bench, at, found))
    return Run(trainer.parameters, len(plan), found, looks)


def sums(model: Any, trees: Sequence[pack.Tree], budget: int) -> list[float]:
    """The loss of each group's supervised tokens, in nats, in the order of `trees`. `model` is in evaluation mode."""
    import torch

    found: dict[int, float] = {}
    with torch.no_grad():
        for part in pack.micro_batches(trees, budget):
            packed = pack.pack(part, model.device)
            logits_NxV = loss.logits(model, packed)[0].float()
            nats_N = torch.nn.functional.cross_entropy(logits_NxV, packed.target_N, reduction="none").double()
            for tree, nats in zip(part, nats_N.split([tree.supervised for tree in part]), strict=True):
                found[id(tree)] = float(nats.sum())
    return [found[id(tree)] for tree in trees]


def _look(model: Any, bench: Bench, step: int, found: Sequence[float]) -> Look:
    measured = forget.measure(model, bench.general, f"general text, step {step}")
    tokens = sum(one.tokens for one in measured)
    return Look(
        step=step,
        loss=sum(found) / sum(tree.supervised for tree in bench.validation),
        general_loss=sum(one.tuned for one in measured) / tokens,
        cross_entropy=sum(one.cross_entropy for one in measured) / tokens,
        entropy=sum(one.entropy for one in measured) / tokens,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm")
    arm = parser.parse_args().arm
    stage.process(f"claims-arm-{arm}", lambda: run(arm), result=results.path(arm))
