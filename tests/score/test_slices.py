"""Slices are thirds of the rows; equal values stay together."""

from dataclasses import replace

from pipeline.score import slices
from tests.made.experiment import example

ROW = example("1", "1", "a", "the cat sat on the mat", "the cat sat", "")


def test_thirds_by_length() -> None:
    rows = [replace(ROW, source="w " * (1 + i % 9), target="one two") for i in range(36)]
    found = {name: {len(rows[i].source.split()) for i in part} for name, part in slices.of(rows).items()}
    assert found == {
        "sources of 1 to 3 words": {1, 2, 3},
        "sources of 4 to 6 words": {4, 5, 6},
        "sources of 7 to 9 words": {7, 8, 9},
    }


def test_every_row_is_in_one_slice_of_each_measure_and_equal_values_stay_together() -> None:
    rows = [replace(ROW, source="w " * (1 if i < 25 else i), target="a " * (1 + i)) for i in range(40)]
    found = slices.of(rows)
    assert sorted(i for name, part in found.items() if name.startswith("sources") for i in part) == list(range(40))
    assert found["sources of 1 words"] == list(range(25))
    assert found["sources of 26 to 39 words"] == list(range(26, 40))


def test_novelty_is_the_share_of_pairs_that_the_source_lacks() -> None:
    assert slices.novelty(ROW) == 0
    assert slices.novelty(replace(ROW, target="The mat sat on the cat")) == 100 * 1 / 5
    assert slices.novelty(replace(ROW, target="word")) == 0


def test_few_rows_and_equal_rows_have_no_slices() -> None:
    assert slices.of([replace(ROW, source="w " * i) for i in range(slices.LEAST_ROWS - 1)]) == {}
    assert slices.of([ROW] * 40) == {}
