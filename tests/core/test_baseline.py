"""Which rows of the test split the variants of `baseline` answer."""

import pytest

from pipeline.core import baseline
from pipeline.core.records import Example


def split(*sizes: int) -> list[Example]:
    return [Example(f"{g}/{n}", f"g{g}", "", "s", "t", "s") for g, size in enumerate(sizes) for n in range(size)]


def groups_of(rows: list[int], test: list[Example]) -> set[str]:
    return {test[row].group for row in rows}


@pytest.mark.parametrize("most", [1, 3, 4, 7, 50, 99, 150, 299])
@pytest.mark.parametrize("sizes", [(3,) * 100, (1,) * 300, (7, 1, 2) * 30, (200, 1, 1, 1)])
def test_whole_groups_within_the_limit_in_the_order_of_the_split(sizes: tuple[int, ...], most: int) -> None:
    test = split(*sizes)
    rows = baseline.rows(test, most)
    assert rows == sorted(set(rows)) != []
    assert [place for place, one in enumerate(test) if one.group in groups_of(rows, test)] == rows
    assert len(rows) <= most or len(groups_of(rows, test)) == 1


@pytest.mark.parametrize("most", [None, 6, 1000])
def test_all_rows_where_there_is_no_limit_below(most: int | None) -> None:
    assert baseline.rows(split(3, 3), most) == list(range(6))


def test_rows_are_spread_evenly() -> None:
    test = split(*(3,) * 100)
    assert baseline.rows(test, 150) == [3 * group + n for group in range(0, 100, 2) for n in range(3)]


def test_a_group_whose_rows_are_apart_is_taken_whole() -> None:
    test = [Example(str(n), f"g{n % 3}", "", "s", "t", "s") for n in range(9)]
    assert baseline.rows(test, 4) == [0, 3, 6]
