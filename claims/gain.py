"""Claims about the gain by tuning: answers of the base and of the tuned models, scored and compared by the pipeline.

Intervals cover the choice of test examples and of training seeds (`pipeline.score.intervals`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from claims import evidence, lab, training, variants
from claims.evidence import Evidence, Value
from pipeline.core import contracts, records
from pipeline.core.errors import listing
from pipeline.core.records import Decoding, Example, Prediction
from pipeline.score import compare, metrics, reference_lines, side_by_side
from pipeline.score.contrast import contrast
from pipeline.score.tables import Table


def measure(task: str) -> Evidence:
    """`<metric>_base`, `<metric>_tuned` and `<metric>_gain`, in points, and tuned minus each reference line as
    `<metric>_over_<line>`. The lines are those of the report: constant, lead or copy, wrong_aspect, base_cut."""
    experiment = lab.experiment(task)
    test = variants.rows(task, "test")
    seeds = [str(seed) for seed in training.load().training_seeds]
    base, *tuned = answers(task, seeds, test)
    chosen = metrics.chosen(experiment.evaluate)
    groups = np.array([row.group for row in test])
    references = [row.references for row in test]
    base_table, *tuned_tables = (
        Table(chosen, [metric.statistics(texts, references) for metric in chosen]) for texts in (base, *tuned)
    )
    values: dict[str, Value] = {}
    for name, result in contrast([base_table], tuned_tables, groups, experiment.compare).items():
        values |= {f"{name}_base": result.base, f"{name}_tuned": result.tuned, f"{name}_gain": result.deciding}
    for line in reference_lines.texts(
        test, [[text] for text in base], variants.rows(task, "train"), experiment.evaluate
    ):
        kept = [i for i, some in enumerate(line.texts) if some]
        if len(set(groups[kept])) > 1:  # else there is nothing to resample
            table = Table.mean([line.texts[i] for i in kept], [test[i] for i in kept], chosen)
            there = [one.rows(kept) for one in tuned_tables]
            for name, result in contrast([table], there, groups[kept], experiment.compare).items():
                values[f"{name}_over_{line.key}"] = result.deciding
    note = f"{len(test)} test rows in {len(set(groups))} groups, {len(seeds)} seeds"
    uses = [(variants.folder(task, name) / variants.PREDICTIONS).as_posix() for name in (variants.BASE, *seeds)]
    return Evidence(values, [note, metrics.signature(experiment.evaluate, references)], uses)


def answers(task: str, seeds: Sequence[str], test: Sequence[Example]) -> list[list[str]]:
    """The answers of the base and of each seed's model, in the order of the test split.

    UserError if answers are missing, or if decoding differed in more than the adapter.
    """
    texts: list[list[str]] = []
    decodings: list[Decoding] = []
    problems: list[str] = []
    for name, called in ((variants.BASE, "base"), *((seed, f"seed {seed}") for seed in seeds)):
        folder = variants.folder(task, name)
        rows = records.read_rows(folder / variants.PREDICTIONS, Prediction)
        side_by_side.require_same_rows(called, [row.id for row in rows], [row.id for row in test], "test")
        texts.append([row.text for row in rows])
        decodings.append(contracts.read(folder / variants.DECODING, Decoding))
        problems += compare.unequal(called, decodings[-1], decodings[0])
    if problems:
        headline = f"base and tuned of {task} were decoded under different conditions; run `dvc repro claims/dvc.yaml`:"
        raise listing(problems, headline)
    return texts


MEASUREMENTS: dict[str, Callable[[], Evidence]] = {
    "tuned-beats-base": partial(measure, "default"),
    "tuned-beats-base-mt": partial(measure, "ui-fr-en"),
}

if __name__ == "__main__":
    evidence.main(MEASUREMENTS)
