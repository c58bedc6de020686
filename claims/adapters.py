"""Claims about adapters: how quantization, target layers and rank change what is learned and what is forgotten.

The models are the arms of `claims/training.yaml`. Losses are means over the supervised tokens of the validation rows,
in nats. Lists hold one value for each training seed. `..._over_...` is the first value minus the second.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, variance

import numpy as np

from claims import evidence, lab, resampling, results
from claims.evidence import Evidence, Value
from claims.results import UNTUNED, Look, Result
from pipeline.core import params
from pipeline.score.estimates import Estimate, Judged
from pipeline.score.significance import Interval


def qlora_recovers() -> Evidence:
    """The gap that NF4 opens in the validation loss, before and after tuning. A gap after tuning counts as recovered up
    to the larger of the SD between seeds and a quarter of the gap before; `excess` is what it has beyond that."""
    before, before_nf4, after, after_nf4 = (results.read(name) for name in ("untuned", "untuned-nf4", "r16", "r16-nf4"))
    gap_before = difference(before_nf4, before, lab.experiment().compare)
    gap_after = [there - here for there, here in zip(after_nf4.losses(), after.losses(), strict=True)]
    seed_sd = (fmean([variance(after.losses()), variance(after_nf4.losses())])) ** 0.5
    allowed = max(seed_sd, gap_before.value / 4)
    return Evidence(
        {
            "loss_before": before.losses()[0],
            "loss_before_nf4": before_nf4.losses()[0],
            "loss_after": after.losses(),
            "loss_after_nf4": after_nf4.losses(),
            "gap_before": gap_before,
            "gap_after": gap_after,
            "gap_after_mean": fmean(gap_after),
            "seed_sd": seed_sd,
            "excess": [gap - allowed for gap in gap_after],
        },
        setting(after),
        uses("untuned", "untuned-nf4", "r16", "r16-nf4"),
    )


def all_linear() -> Evidence:
    """The validation loss with adapters on all linear layers, and on queries and values only."""
    everything, queries = results.read("r16"), results.read("qv")
    return Evidence(
        {
            "loss_untuned": results.read("untuned").losses()[0],
            "loss_all_linear": everything.losses(),
            "loss_qv": queries.losses(),
            "qv_over_all_linear": mean_difference(queries, everything, lab.experiment().compare),
            "parameters_all_linear": float(parameters(everything)),
            "parameters_qv": float(parameters(queries)),
        },
        setting(everything),
        uses("untuned", "r16", "qv"),
    )


def small_rank() -> Evidence:
    """The validation loss by rank. `spread`: the difference between the best and the worst rank from 4 on.
    `quarter_of_gain`: a quarter of the loss that r = 4 takes off the base's."""
    untuned = results.read("untuned").losses()[0]
    found = {rank: results.read(f"r{rank}") for rank in (1, 4, 16, 64)}
    losses = {rank: result.losses() for rank, result in found.items()}
    larger = list(zip(losses[4], losses[16], losses[64], strict=True))
    values: dict[str, Value] = {f"loss_r{rank}": some for rank, some in losses.items()}
    return Evidence(
        {
            "loss_untuned": untuned,
            **values,
            "spread": [max(some) - min(some) for some in larger],
            "quarter_of_gain": [(untuned - loss) / 4 for loss in losses[4]],
            **{
                f"r1_over_r{rank}": mean_difference(found[1], found[rank], lab.experiment().compare)
                for rank in (4, 16, 64)
            },
        },
        setting(found[4]),
        uses("untuned", *(f"r{rank}" for rank in found)),
    )


def forgets_less() -> Evidence:
    """Cross-entropy against the base's own distribution on general text: at the end of training, and (`_matched`) where
    each arm first reached a validation loss that all three reach."""
    names = ("full", "r64", "r8")
    found = {name: results.read(name) for name in names}
    untuned = results.read("untuned").losses()[0]
    curves = {name: [curve(untuned, run.looks) for run in result.runs.values()] for name, result in found.items()}
    levels = [max(some[-1][0] for some in seed) for seed in zip(*curves.values(), strict=True)]
    entropy = found["full"].runs[next(iter(found["full"].runs))].looks[0].entropy
    values: dict[str, Value] = {"loss_untuned": untuned, "loss_matched": levels, "entropy_base": entropy}
    for name in names:
        last = [run.looks[-1] for run in found[name].runs.values()]
        values |= {
            f"loss_{name}": found[name].losses(),
            f"general_loss_{name}": [look.general_loss for look in last],
            f"cross_entropy_{name}": [look.cross_entropy for look in last],
            f"cross_entropy_{name}_matched": [
                at_loss(one, level) for one, level in zip(curves[name], levels, strict=True)
            ],
        }
    return Evidence(values, setting(found["full"]), uses("untuned", *names))


def setting(result: Result) -> list[str]:
    """The note that goes with the values of tuned arms."""
    (steps,) = {run.steps for run in result.runs.values()}
    rows, texts = result.rows, len(result.groups)
    return [f"{steps} steps on {rows} rows, evaluated on {texts} texts; {len(result.runs)} seeds"]


def uses(*names: str) -> list[str]:
    """The files of the arms that a measurement reads. Their cost is part of its own."""
    return [results.path(name).as_posix() for name in names]


def difference(here: Result, there: Result, compare: params.Compare) -> Interval:
    """The loss of one untuned model minus that of another, with its interval over texts (paired bootstrap)."""
    columns_nx3 = np.array([here.runs[UNTUNED].sums, there.runs[UNTUNED].sums, here.tokens]).T
    value = here.losses()[0] - there.losses()[0]
    return resampling.over_texts(
        value, columns_nx3, here.groups, lambda sums_bx3, _: (sums_bx3[:, 0] - sums_bx3[:, 1]) / sums_bx3[:, 2], compare
    )


def mean_difference(here: Result, there: Result, compare: params.Compare) -> Interval:
    """One arm's loss minus another's, as the mean over seeds, with an interval that covers the choice of texts and of
    seeds (`pipeline.score.estimates`). Both are paired: all models read the same texts, and two models of one seed have
    seen the same rows in the same order."""
    tokens = np.array(here.tokens, np.float64)
    by_seed = [
        Estimate.ratios(np.array(one.sums)[:, None], tokens, here.groups)
        - Estimate.ratios(np.array(other.sums)[:, None], tokens, here.groups)
        for one, other in zip(here.runs.values(), there.runs.values(), strict=True)
    ]
    return Judged(Estimate.mean(by_seed), compare).deciding(0)


def parameters(result: Result) -> int:
    (found,) = {run.parameters for run in result.runs.values()}
    return found


def curve(untuned: float, looks: Sequence[Look]) -> list[tuple[float, float]]:
    """(validation loss, cross-entropy) before the first step, where the latter is the base's entropy, and by look."""
    return [(untuned, looks[0].entropy), *((look.loss, look.cross_entropy) for look in looks)]


def at_loss(curve: Sequence[tuple[float, float]], level: float) -> float:
    """The cross-entropy where a curve first reaches a validation loss, on straight lines between looks."""
    for (before, here), (after, there) in pairwise(curve):
        if after <= level:
            share = (before - level) / (before - after) if before > after else 1.0
            return here + min(max(share, 0.0), 1.0) * (there - here)
    raise ValueError(f"the curve does not come down to {level}")


MEASUREMENTS: dict[str, Callable[[], Evidence]] = {
    "qlora-recovers": qlora_recovers,
    "all-linear": all_linear,
    "small-rank": small_rank,
    "forgets-less": forgets_less,
}

if __name__ == "__main__":
    evidence.main(MEASUREMENTS)
