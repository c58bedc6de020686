"""Intervals for the choice of texts, by the pipeline's bootstrap (`pipeline.score.significance`).

Dimensions: n rows, k columns, b resamples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import params
from pipeline.score import significance
from pipeline.score.significance import Floats, Interval


def over_texts(
    value: float,
    columns_nxk: Floats,
    texts: Sequence[Any] | NDArray[Any],
    of: Callable[[Floats, Floats], Floats],
    compare: params.Compare,
) -> Interval:
    """`value` with its interval.

    `texts` names the text of each row. A resample takes all rows and columns of a text together, so that comparisons
    are paired. `of` computes the value of each resample from the bxk sums of its columns and its b numbers of rows.
    """
    sums_bxk, rows_b = significance.resampled_sums(
        columns_nxk, np.array(texts), compare.bootstrap_samples, compare.seed
    )
    return significance.percentiles(value, of(sums_bxk, rows_b), compare.confidence)
