"""The cost of fine-tuning besides time: forgetting, overfitting, and the adapter's size.

All of it is equal on machines that compute equal outputs. Time, memory and energy are not; the MLflow run has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core import contracts, params, paths
from pipeline.score.estimates import Estimate, Judged
from pipeline.score.significance import Interval

ROSE = 0.01
"""If the kept validation loss exceeds the lowest by more than this share, the report says that training went too
far."""


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Losses on general text in nats a token, as means over seeds (`pipeline.forget`).

    `diff` is tuned minus base. `kl` is `cross_entropy` minus the base's entropy. Intervals cover the choice of `units`,
    which are texts, or windows of a single text, and the choice of seeds if there are several. A window has at most
    `window` tokens, and begins with a BOS if `bos` is true.
    """

    source: str
    tokens: int
    window: int
    bos: bool
    texts: int
    units: str
    base_loss: float
    tuned_loss: float
    base_perplexity: float
    tuned_perplexity: float
    diff: Interval
    cross_entropy: Interval
    kl: Interval

    @property
    def read(self) -> str:
        """How the text was read, in words."""
        return contracts.windows_read(self.window, self.bos)

    @property
    def rose(self) -> bool:
        return self.diff.low > 0


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
    """The cost of one experiment. `forgetting` is None if `forget.source` is null. Bytes are those of one adapter."""

    trainable_parameters: int
    adapter_bytes: int
    training: list[Training]
    forgetting: Forgetting | None


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


def _forgetting(found: Sequence[contracts.Forgetting], settings: params.Compare) -> Forgetting | None:
    """The losses of all seeds, which read the same windows; intervals cover texts (or windows of one), and seeds."""
    source, measured = found[0].source, [one.measured for one in found if one.measured is not None]
    if source is None or not measured:
        return None
    first = measured[0]
    several = first.texts > 1
    groups = [one.place if several else str(i) for i, one in enumerate(first.windows)]
    tokens = np.array([one.tokens for one in first.windows], np.float64)
    changes = [
        np.array([(w.tuned - w.base, w.cross_entropy, w.cross_entropy - w.entropy) for w in one.windows], np.float64)
        for one in measured
    ]
    judged = Judged(Estimate.mean([Estimate.ratios(one, tokens, groups) for one in changes]), settings)
    tuned_loss = float(np.mean([one.tuned_loss for one in measured]))
    return Forgetting(
        source=source,
        tokens=first.tokens,
        window=first.window,
        bos=first.bos,
        texts=first.texts,
        units="texts" if several else "windows of one text",
        base_loss=first.base_loss,
        tuned_loss=tuned_loss,
        base_perplexity=first.base_perplexity,
        tuned_perplexity=float(np.exp(tuned_loss)),
        diff=judged.deciding(0),
        cross_entropy=judged.deciding(1),
        kl=judged.deciding(2),
    )
