"""What a metric needs of each text, as a table: the scores of a variant, of its rows, and without one of its groups.

Dimensions: n rows, k statistics of a row, m metrics, g groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.contracts import Scores
from pipeline.core.records import Example
from pipeline.score.intervals import member_sums
from pipeline.score.metrics import Floats, Metric
from pipeline.score.significance import require_groups


@dataclass(frozen=True)
class Table:
    """The statistics of one variant's texts: an nxk array for each metric."""

    metrics: Sequence[Metric]
    statistics: list[Floats]

    @classmethod
    def of(cls, scores: Scores, chosen: Sequence[Metric]) -> "Table":
        """The statistics of a scored variant for the metrics `chosen`."""
        rows = [
            scores.statistics[one.name] if one.counted else [[row.scores[one.name]] for row in scores.examples]
            for one in chosen
        ]
        found = [np.array(table, np.float64) for table in rows]
        return cls(chosen, [table.reshape(-1, one.width) for table, one in zip(found, chosen, strict=True)])

    @classmethod
    def mean(cls, texts: Sequence[Sequence[str]], rows: Sequence[Example], chosen: Sequence[Metric]) -> "Table":
        """The statistics of each row, as the mean over its texts, against the row's references."""
        flat = [text for some in texts for text in some]
        references = [row.references for some, row in zip(texts, rows, strict=True) for _ in some]
        ends = np.cumsum([len(some) for some in texts])[:-1]
        found = []
        for metric in chosen:
            parts = np.split(metric.statistics(flat, references), ends)[: len(texts)]  # of no texts it makes one part
            found.append(np.array([part.mean(axis=0) for part in parts]).reshape(len(texts), metric.width))
        return cls(chosen, found)

    def rows(self, chosen: Sequence[int]) -> "Table":
        """The table of the rows with these numbers."""
        return Table(self.metrics, [columns[list(chosen)] for columns in self.statistics])

    def only(self, names: Sequence[str]) -> "Table":
        """The table of the metrics with these names, in the table's order."""
        kept = [i for i, metric in enumerate(self.metrics) if metric.name in names]
        return Table([self.metrics[i] for i in kept], [self.statistics[i] for i in kept])

    def each(self) -> Floats:
        """The score of each row by itself, mxn."""
        return np.array([metric.each(table) for metric, table in zip(self.metrics, self.statistics, strict=True)])


@dataclass(frozen=True)
class Corpus:
    """The scores of a corpus in m metrics, and those of the same corpus without each of its g groups, gxm."""

    scores_m: Floats
    without_gxm: Floats

    @classmethod
    def of(cls, table: Table, groups: NDArray[Any]) -> "Corpus":
        """The corpus of all rows of a table. `groups` names the group of each row."""
        parts = [member_sums(columns, groups) for columns in table.statistics]
        sums = [columns.sum(axis=0) for columns in table.statistics]
        return cls.from_sums(table.metrics, sums, [lost for lost, _ in parts], float(len(groups)), parts[0][1])

    @classmethod
    def from_sums(
        cls, chosen: Sequence[Metric], sums: Sequence[Floats], sums_of: Sequence[Floats], rows: float, rows_g: Floats
    ) -> "Corpus":
        """The corpus with these sums of each metric's statistics (k) over its `rows`.

        `sums_of` (gxk) and `rows_g` are what it loses without each group. UserError for a single group.
        """
        require_groups(len(rows_g))
        scores, without = [], []
        for metric, sums_k, sums_gxk in zip(chosen, sums, sums_of, strict=True):
            found = metric.corpus(np.concatenate([sums_k[None], sums_k - sums_gxk]), np.append(rows, rows - rows_g))
            scores.append(found[0])
            without.append(found[1:])
        return cls(np.array(scores), np.array(without).T)
