"""How sure a measured value is, as far as the choice of texts goes: the pipeline's bootstrap
(`pipeline.score.significance`).

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
    """The value with its interval. `texts` names the text of each row; a resample takes all rows and columns of a text
    together, so that what is compared is paired. `of` gives the value of every resample, by the bxk sums of its columns
    and its b numbers of rows."""
    sums_bxk, rows_b = significance.resampled_sums(
        columns_nxk, np.array(texts), compare.bootstrap_samples, compare.seed
    )
    return significance.percentiles(value, of(sums_bxk, rows_b), compare.confidence)
