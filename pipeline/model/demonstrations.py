"""Demonstrations: training rows with their answers that stand before a question in the prompt (`baseline.shots`).

In-context learning as in Brown et al. 2020 (arXiv 2005.14165, section 2). The nearest rows are found by BM25 (Robertson
and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", equation 3.15, with the idf of Lucene,
which is never negative).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pipeline.core import params, records
from pipeline.core.errors import UserError
from pipeline.core.records import Demonstrations, Example
from pipeline.core.text import canonical, runs, words
from pipeline.model.prompt import Encoder, Prompt

K1, B = 1.2, 0.75
"""The parameters of BM25: the usual values, within the ranges that section 3.4 recommends."""

Group = list[Example]


def prompts(
    encoder: Encoder,
    questions: Sequence[Example],
    made: Sequence[Prompt],
    pool: "Pool",
    baseline: params.Baseline,
    new_tokens: int,
) -> tuple[dict[str, list[int]], Demonstrations]:
    """The prompts of `questions` after demonstrations out of `pool`, by id, and what the demonstrations are.

    `made` holds the questions' own prompts, in order. A prompt and `new_tokens` of an answer stay within the model's
    context: if they would not, there are fewer groups of demonstrations, for all prompts if all have the same.
    UserError if no group fits.
    """
    room = encoder.context - new_tokens

    def fitting(asked: Sequence[tuple[Example, Prompt]], groups: list[Group]) -> tuple[list[list[int]], list[Example]]:
        """The prompts after the first groups that fit before all of them; the first group stands last."""
        for count in range(len(groups), 0, -1):
            shown = [row for group in reversed(groups[:count]) for row in group]
            found = [encoder.after(shown, *one) for one in asked]
            if max(map(len, found)) <= room:
                return found, shown
        name, own = max(((one.id, len(prompt.ids)) for one, prompt in asked), key=lambda item: item[1])
        raise UserError(
            f"baseline.shots = {baseline.shots}, but not one group of demonstrations fits into the model's context of "
            f"{encoder.context} tokens beside {name} with {own} tokens and {new_tokens} of an answer: set "
            "baseline.shots to 0, or baseline.seed or baseline.choice to another value"
        )

    both = list(zip(questions, made, strict=True))
    if baseline.choice == "random":
        ids, shown = fitting(both, pool.drawn(baseline.shots, baseline.seed))
        names = [[row.id for row in shown]]
    else:
        ids, names = [], []
        for one in both:
            [own], shown = fitting([one], pool.nearest(one[0].source, baseline.shots))
            ids.append(own)
            names.append([row.id for row in shown])
    tokens = [len(after) - len(one.ids) for after, one in zip(ids, made, strict=True)]
    found = Demonstrations(baseline.shots, baseline.choice, baseline.seed, names, tokens)
    return {one.id: after for one, after in zip(questions, ids, strict=True)}, found


class Pool:
    """The training groups that demonstrations are chosen from: those that are not in the split that is asked."""

    def __init__(self, train: Sequence[Example], asked: Sequence[Example]) -> None:
        """UserError if every training group is in `asked` too, which holds the questions."""
        tested = {example.group for example in asked}
        self.groups: dict[str, Group] = {}
        for row in train:
            if row.group not in tested:
                self.groups.setdefault(row.group, []).append(row)
        if not self.groups:
            raise UserError(
                "baseline.shots needs training rows of groups that are not in the split that is asked, and there are "
                "none: set baseline.shots to 0"
            )
        self._scores: Callable[[str], dict[str, float]] | None = None

    def drawn(self, rows: int, seed: int) -> list[Group]:
        """Groups of `rows` rows together at most, drawn by `seed`. The other groups do not matter for the order of two.

        If every group has more rows, the first rows of one.
        """
        return self._taken(sorted(self.groups, key=lambda name: records.sha256_text(f"{seed} {name}")), rows)

    def nearest(self, source: str, rows: int) -> list[Group]:
        """Groups of `rows` rows together at most, those most similar to `source` first; equal ones by name.

        If every group has more rows, the first rows of one.
        """
        if self._scores is None:
            sources = {name: dict.fromkeys(row.source for row in group) for name, group in self.groups.items()}
            self._scores = bm25({name: "\n".join(own) for name, own in sources.items()})
        scores = self._scores(source)
        return self._taken(sorted(self.groups, key=lambda name: (-scores.get(name, 0.0), name)), rows)

    def _taken(self, order: Sequence[str], rows: int) -> list[Group]:
        """The first groups of `order` that have `rows` rows together at most; if each has more, a part of the first."""
        taken: list[Group] = []
        for name in order:
            group = self.groups[name]
            if len(group) <= rows:
                taken.append(group)
                rows -= len(group)
            if not rows:
                break
        return taken or [self.groups[order[0]][:rows]]


def bm25(texts: Mapping[str, str]) -> Callable[[str], dict[str, float]]:
    """A function that gives the BM25 scores of `texts`, by name, for a query. Texts without a word of it are left out.

    Words are compared without regard to case. A word that the query has twice counts twice.
    """
    counts = {name: Counter(_terms(text)) for name, text in texts.items()}
    holding: dict[str, list[tuple[str, int]]] = {}
    for name, found in counts.items():
        for term, times in found.items():
            holding.setdefault(term, []).append((name, times))
    lengths = {name: found.total() for name, found in counts.items()}
    mean = sum(lengths.values()) / len(lengths) or 1.0

    def score(query: str) -> dict[str, float]:
        scores: dict[str, list[float]] = {}
        for term, asked in Counter(_terms(query)).items():
            some = holding.get(term, [])
            idf = math.log(1 + (len(texts) - len(some) + 0.5) / (len(some) + 0.5))
            for name, times in some:
                weight = times / (times + K1 * (1 - B + B * lengths[name] / mean))
                scores.setdefault(name, []).append(asked * idf * weight)
        return {name: math.fsum(parts) for name, parts in scores.items()}

    return score


def _terms(text: str) -> list[str]:
    return [term for word in words(canonical(text).casefold()) for term in runs(word)]
