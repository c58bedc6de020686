"""Intervals for the choice of texts, by the pipeline's own method (`pipeline.score.intervals`).

Dimensions: n rows, k columns, b corpora.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import params
from pipeline.score import intervals
from pipeline.score.significance import Floats, Interval


def over_texts(
    value: float,
    columns_nxk: Floats,
    texts: Sequence[Any] | NDArray[Any],
    of: Callable[[Floats, Floats], Floats],
    compare: params.Compare,
) -> Interval:
    """`value` with its interval.

    `texts` names the text of each row. All rows and columns of a text belong together, so that comparisons are paired.
    `of` computes the values of b corpora from the bxk sums of their columns and their b numbers of rows.
    """
    values_g = intervals.pseudo_values(of, *intervals.member_sums(columns_nxk, np.array(texts)))
    found = intervals.Studentized.of(values_g[:, None], compare.bootstrap_samples, compare.seed)
    return found.interval(0, value, compare.confidence)
