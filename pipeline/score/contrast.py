"""Two sides of a comparison in each metric, paired by rows: what their difference is, and whether it is shown.

A difference is shown where both its interval and its p-value say so (`pipeline.score.intervals`), and the test examples
have ten groups at least. "Better" needs this of all metrics in `decide_by`. Demanding all of them only makes that
verdict rarer, so it needs no correction for several metrics.

Dimensions: m metrics, n rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import params
from pipeline.score import significance
from pipeline.score.comparison import Result, SpecificGain, Spread, Verdict
from pipeline.score.estimates import Estimate, Judged
from pipeline.score.significance import Interval
from pipeline.score.tables import Corpus, Table


def contrast(
    base: Sequence[Table], tuned: Sequence[Table], groups: NDArray[Any], settings: params.Compare
) -> dict[str, Result]:
    """Each metric's result: the mean over the seeds of `tuned` against that over `base`, paired by rows.

    `groups` names the group of each row. UserError with a single group.
    """
    here, there = (Estimate.mean([Estimate.of(Corpus.of(one, groups)) for one in side]) for side in (base, tuned))
    judged = Judged(there - here, settings)
    alone = [Judged(one, settings) for one in (here, there)]
    gain_mxn = significance.difference(*(np.mean([one.each() for one in side], axis=0) for side in (tuned, base)))
    rows = np.arange(len(groups))
    results = {}
    for m, metric in enumerate(tuned[0].metrics):
        sd = judged.seed_sd(m)
        results[metric.name] = Result(
            base=_in_points(alone[0].over_texts(m)),
            tuned=_in_points(alone[1].over_texts(m)),
            diff=judged.over_texts(m),
            seeds=None if sd is None else Spread(sd, judged.deciding(m)),
            direction=judged.direction(m),
            within_margin=judged.within(m),
            p=judged.p_values[m],
            effect=significance.effect_size(gain_mxn[m], groups),
            effect_of_rows=significance.effect_size(gain_mxn[m], rows),
            detectable=significance.detectable(judged.error(m), settings.confidence),
            wins=float(np.mean(gain_mxn[m] > 0)),
            ties=float(np.mean(gain_mxn[m] == 0)),
            losses=float(np.mean(gain_mxn[m] < 0)),
        )
    return results


def _in_points(one: Interval) -> Interval:
    """The interval of a score, which lies within [0, 100]."""
    return Interval(one.value, max(0.0, one.low), min(100.0, one.high))


def verdict(results: Sequence[Result], specific: Sequence[SpecificGain] = ()) -> Verdict:
    """What the deciding metrics show together. `specific` are their specific gains, if they are known.

    - few: their groups are too few.
    - better, worse: all are higher, or all lower.
    - partly-better, partly-worse: some are, and of the others no difference is shown.
    - mixed: some are higher and some lower.
    - unspecific: it would be better or partly-better, but no gain is shown to be specific to the source.
    - equivalent: no difference is shown, and all are within `compare.margin`.
    - none: no difference is shown.
    """
    found = {one.direction for one in results}
    if "few" in found:
        return "few"
    if found >= {"higher", "lower"}:
        return "mixed"
    if "higher" in found:
        if specific and not any(one.direction == "higher" for one in specific):
            return "unspecific"
        return "better" if found == {"higher"} else "partly-better"
    if "lower" in found:
        return "worse" if found == {"lower"} else "partly-worse"
    return "equivalent" if all(one.within_margin for one in results) else "none"
