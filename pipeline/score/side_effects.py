"""The cost of fine-tuning besides time: forgetting, overfitting, and the adapter's size.

All of it is equal on machines that compute equal outputs. Time, memory and energy are not; the MLflow run has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core import contracts, params, paths
from pipeline.core.errors import UserError
from pipeline.score import significance
from pipeline.score.estimates import Estimate, Judged
from pipeline.score.significance import Direction, Interval

ROSE = 0.01
"""If the kept validation loss exceeds the lowest by more than this share, the report says that training went too
far."""


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Losses on one probe in nats a token, as means over seeds (`pipeline.forget`).

    `diff` is tuned minus base. `kl` is `cross_entropy` minus the base's entropy. Intervals cover the choice of `units`,
    which are texts, conversations, or windows of a single text, and the choice of seeds if there are several. There are
    `groups` of these. `p` is
    that of no difference in loss, and `p_holm` is corrected for the number of probes. `direction` is what is shown of
    the difference, by its interval and by `p_holm`. `read` says how the text was read.
    """

    name: str
    source: str
    tokens: int
    window: int
    bos: bool
    read: str
    texts: int
    units: str
    groups: int
    base_loss: float
    tuned_loss: float
    base_perplexity: float
    tuned_perplexity: float
    diff: Interval
    cross_entropy: Interval
    kl: Interval
    p: float
    p_holm: float
    direction: Direction

    @property
    def rose(self) -> bool:
        """Whether it is shown that the adapter makes the model worse at this text."""
        return self.direction == "higher"

    @property
    def of(self) -> str:
        """What was read, in words: `33 texts`."""
        kind = "text" if self.units == "windows of one text" else self.units.removesuffix("s")
        return f"{self.texts:,} {kind}{'' if self.texts == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Training:
    """One seed's training (`pipeline.lora.train`), with losses in nats a supervised token.

    On validation rows: `first_loss` of the untrained model, `best_loss`, `last_loss`, and `kept_loss` of the kept
    adapter. `training_loss` is the kept adapter's on training rows, and `gap` is `kept_loss` minus that.
    """

    seed: int
    epochs: float
    steps: int
    planned_steps: int
    first_loss: float
    best_loss: float
    best_epoch: float
    last_loss: float
    kept_loss: float
    kept_epoch: float
    training_loss: float
    gap: float

    @property
    def stopped_early(self) -> bool:
        return self.steps < self.planned_steps

    @property
    def overfitted(self) -> bool:
        """Whether the kept adapter's validation loss is clearly above the lowest (`ROSE`)."""
        return self.kept_loss > (1 + ROSE) * self.best_loss


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one experiment. `forgetting` has one entry a probe (`forget.probes`). Bytes are one adapter's."""

    trainable_parameters: int
    adapter_bytes: int
    training: list[Training]
    forgetting: list[Forgetting]


def read(seeds: Sequence[int], settings: params.Compare) -> Cost:
    """The cost of the experiment in the working directory. UserError if an output is missing."""
    forgetting = [contracts.read(paths.forgetting(seed), contracts.Forgetting) for seed in seeds]
    summaries = [contracts.read(paths.training_summary(seed), contracts.TrainingSummary) for seed in seeds]
    return Cost(
        trainable_parameters=summaries[0].trainable_parameters,
        adapter_bytes=summaries[0].adapter_bytes,
        training=[_training(summary) for summary in summaries],
        forgetting=_forgetting(forgetting, settings),
    )


def _training(summary: contracts.TrainingSummary) -> Training:
    return Training(
        seed=summary.seed,
        epochs=summary.epochs,
        steps=summary.steps,
        planned_steps=summary.planned_steps,
        first_loss=summary.validation[0].loss,
        best_loss=summary.best_loss,
        best_epoch=summary.best_epoch,
        last_loss=summary.validation[-1].loss,
        kept_loss=summary.kept_loss,
        kept_epoch=summary.kept_epoch,
        training_loss=summary.training_loss,
        gap=summary.gap,
    )


def _forgetting(found: Sequence[contracts.Forgetting], settings: params.Compare) -> list[Forgetting]:
    """Each probe over all seeds, which read the same windows. UserError if they read different probes."""
    names = [[probe.name for probe in one.probes] for one in found]
    if any(one != names[0] for one in names):
        raise UserError(f"the seeds were measured on different probes of forgetting ({names}): run `dvc repro`")
    several = [[one.probes[at] for one in found] for at in range(len(names[0]))]
    judged = [_judged(probes, settings) for probes in several]
    corrected = significance.holm([one.p_values[0] for one in judged])
    return [_probe(*three) for three in zip(several, judged, corrected, strict=True)]


def _judged(probes: Sequence[contracts.Probed], settings: params.Compare) -> Judged:
    """The difference in loss, the cross-entropy and the KL divergence of one probe, over its texts and the seeds."""
    first = probes[0]
    groups = [one.place if first.texts > 1 else str(i) for i, one in enumerate(first.windows)]
    tokens = np.array([one.tokens for one in first.windows], np.float64)
    changes = [
        np.array([(w.tuned - w.base, w.cross_entropy, w.cross_entropy - w.entropy) for w in one.windows], np.float64)
        for one in probes
    ]
    return Judged(Estimate.mean([Estimate.ratios(one, tokens, groups) for one in changes]), settings)


def _probe(probes: Sequence[contracts.Probed], judged: Judged, p_holm: float) -> Forgetting:
    first = probes[0]
    tuned_loss = float(np.mean([one.tuned_loss for one in probes]))
    units = "conversations" if first.style == "chat" else "texts"
    alone = judged.direction(0)
    return Forgetting(
        name=first.name,
        source=first.source,
        tokens=first.tokens,
        window=first.window,
        bos=first.bos,
        read=first.read,
        texts=first.texts,
        units=units if first.texts > 1 else "windows of one text",
        groups=judged.studentized.groups,
        base_loss=first.base_loss,
        tuned_loss=tuned_loss,
        base_perplexity=first.base_perplexity,
        tuned_perplexity=float(np.exp(tuned_loss)),
        diff=judged.deciding(0),
        cross_entropy=judged.deciding(1),
        kl=judged.deciding(2),
        p=judged.p_values[0],
        p_holm=p_holm,
        direction="none" if alone != "few" and p_holm > 1 - judged.settings.confidence else alone,
    )
