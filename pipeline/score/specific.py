"""How much of a gain is specific to the source: the part that is lost where an output is about another one.

Each variant's outputs are scored against the references of other sources of the same aspect too. A variant that writes
what any source would get scores as well there. The gain that is specific to the source is

    (tuned, own source - tuned, another source) - (base, own source - base, another source).

Groups of an aspect stand in a circle, in an order that depends on their names alone. The output of each row is taken
from the groups that follow by one, two, ... places (a derangement each), and their scores are averaged. An interval
must know that a group takes part twice, by its references and by its outputs: the jackknife leaves out both (Arvesen
1969).

Dimensions: n rows, p pairs of a row and another row's output, k statistics, g groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import params, records
from pipeline.core.records import Example
from pipeline.score import significance
from pipeline.score.comparison import Specific, SpecificGain
from pipeline.score.estimates import Estimate, Judged
from pipeline.score.intervals import member_sums
from pipeline.score.metrics import Floats, Metric
from pipeline.score.tables import Corpus, Table

OTHERS = 4
"""The most other sources whose outputs a row is compared with."""
LEAST = 3
"""The fewest groups of an aspect: without one of two groups there is no pair, and so no interval."""
MOST_PAIRS = 4000
"""The most pairs of a row and another row's output; above, each row has fewer others, but one at least."""


@dataclass(frozen=True)
class Variant:
    """One variant's outputs, one or several a row, and the table of their scores in the deciding metrics."""

    texts: Sequence[Sequence[str]]
    table: Table


def measured(
    test: Sequence[Example], base: Variant, tuned: Sequence[Variant], settings: params.Compare
) -> list[Specific]:
    """The specific gain over all rows, then over those of each aspect if there are several.

    Rows whose aspect fewer than `LEAST` groups have are left out; it is empty if no rows are left.
    """
    pairs = Pairs.of(test)
    variants = [base, *tuned]
    elsewhere = [pairs.statistics(one.texts, test, one.table.metrics) for one in variants]
    aspects = list(dict.fromkeys(test[i].aspect for i in pairs.rows()))
    found = []
    for aspect in (None, *aspects) if len(aspects) > 1 else [None] * len(aspects):
        kept = pairs.only([aspect is None or test[i].aspect == aspect for i in pairs.row_p])
        rows = kept.rows()
        groups = np.array([test[i].group for i in rows])
        own = [Estimate.of(Corpus.of(one.table.rows(rows), groups)) for one in variants]
        other = [
            Estimate.of(kept.corpus([columns[kept.number_p] for columns in statistics], one.table.metrics))
            for one, statistics in zip(variants, elsewhere, strict=True)
        ]
        found.append(_specific(aspect, len(rows), own, other, base.table.metrics, settings))
    return _corrected(found, settings)


def _specific(
    aspect: str | None,
    rows: int,
    own: Sequence[Estimate],
    other: Sequence[Estimate],
    chosen: Sequence[Metric],
    settings: params.Compare,
) -> Specific:
    """The specific gain of the variants, of which base is the first, by their scores for own and other sources."""
    parts = [here - there for here, there in zip(own, other, strict=True)]
    judged = Judged(Estimate.mean(parts[1:]) - parts[0], settings)
    return Specific(
        aspect,
        rows,
        len(parts[0].values_gxm),
        {
            metric.name: SpecificGain(
                base_own=float(own[0].scores_m[m]),
                base_other=float(other[0].scores_m[m]),
                tuned_own=float(np.mean([one.scores_m[m] for one in own[1:]])),
                tuned_other=float(np.mean([one.scores_m[m] for one in other[1:]])),
                gain=judged.deciding(m),
                direction=judged.direction(m),
                p=judged.p_values[m],
            )
            for m, metric in enumerate(chosen)
        },
    )


def _corrected(found: Sequence[Specific], settings: params.Compare) -> list[Specific]:
    """The same with the p-values and directions of aspects corrected for the number of aspects and metrics (Holm)."""
    keys = [(i, name) for i, one in enumerate(found) if one.aspect is not None for name in one.results]
    p_holm = dict(zip(keys, significance.holm([found[i].results[name].p for i, name in keys]), strict=True))

    def corrected(i: int, name: str, one: SpecificGain) -> SpecificGain:
        p = p_holm.get((i, name), one.p)
        lost = one.direction in ("higher", "lower") and p > 1 - settings.confidence
        return replace(one, p=p, direction="none" if lost else one.direction)

    return [
        replace(one, results={name: corrected(i, name, gain) for name, gain in one.results.items()})
        for i, one in enumerate(found)
    ]


@dataclass(frozen=True)
class Pairs:
    """Rows (by number), each with the rows whose outputs are held against its references.

    The pairs of a row together weigh as one row. `number_p` are their places among the pairs of all rows.
    """

    row_p: list[int]
    weight_p: Floats
    group_p: NDArray[Any]
    other_p: list[int]
    other_group_p: NDArray[Any]
    number_p: list[int]

    @classmethod
    def of(cls, test: Sequence[Example]) -> "Pairs":
        """Each row with the rows of its aspect in the groups that follow in the circle, up to `OTHERS` of them."""
        rows_of: dict[str, dict[str, list[int]]] = {}
        for i, row in enumerate(test):
            rows_of.setdefault(row.aspect, {}).setdefault(row.group, []).append(i)
        most = min(OTHERS, max(1, MOST_PAIRS // max(1, len(test))))
        pairs, weights = [], []
        for groups in rows_of.values():
            circle = sorted(groups, key=records.sha256_text)
            places = min(most, len(circle) - 1) if len(circle) >= LEAST else 0
            for at, name in enumerate(circle):
                for number, here in enumerate(groups[name]):
                    for place in range(1, places + 1):
                        there = groups[circle[(at + place) % len(circle)]]
                        pairs.append((here, there[number % len(there)]))
                        weights.append(1 / places)
        return cls(
            [here for here, _ in pairs],
            np.array(weights),
            np.array([test[here].group for here, _ in pairs]),
            [there for _, there in pairs],
            np.array([test[there].group for _, there in pairs]),
            list(range(len(pairs))),
        )

    def rows(self) -> list[int]:
        """The rows that have pairs, in order."""
        return sorted(set(self.row_p))

    def only(self, kept_p: Sequence[bool]) -> "Pairs":
        """The pairs that are kept."""
        at = np.flatnonzero(kept_p)
        row_p, other_p, number_p = ([some[i] for i in at] for some in (self.row_p, self.other_p, self.number_p))
        return Pairs(row_p, self.weight_p[at], self.group_p[at], other_p, self.other_group_p[at], number_p)

    def statistics(
        self, texts: Sequence[Sequence[str]], test: Sequence[Example], chosen: Sequence[Metric]
    ) -> list[Floats]:
        """Each metric's statistics (pxk) of the other rows' texts against the rows' references."""
        return Table.mean([texts[i] for i in self.other_p], [test[i] for i in self.row_p], chosen).statistics

    def corpus(self, statistics: Sequence[Floats], chosen: Sequence[Metric]) -> Corpus:
        """The corpus of all pairs. Without a group it has neither the group's references nor its outputs."""
        sums, lost = [], []
        for columns in (*statistics, np.ones((len(self.row_p), 1))):
            weighted_pxk = self.weight_p[:, None] * columns
            sums.append(weighted_pxk.sum(axis=0))
            twice = [member_sums(weighted_pxk, names)[0] for names in (self.group_p, self.other_group_p)]
            lost.append(twice[0] + twice[1])
        return Corpus.from_sums(chosen, sums[:-1], lost[:-1], float(sums[-1][0]), lost[-1][:, 0])
