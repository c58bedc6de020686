"""The verdict on what the deciding metrics show together."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.score.contrast import verdict
from tests.made.comparison import NOT_SPECIFIC, SPECIFIC, result

SHOWN = replace(SPECIFIC["rouge1"], direction="higher")
LOST = replace(SPECIFIC["rouge1"], direction="lower")


@pytest.mark.parametrize(
    ("shown", "within", "expected"),
    [
        (["higher", "higher"], None, "better"),
        (["lower", "lower"], None, "worse"),
        (["none", "none"], None, "none"),
        (["none", "none"], False, "none"),
        (["none", "none"], True, "equivalent"),
        (["higher", "none"], True, "partly-better"),
        (["none", "lower"], None, "partly-worse"),
        (["higher", "lower"], None, "mixed"),
        (["none", "higher", "lower"], None, "mixed"),
        (["few", "few"], True, "few"),
    ],
)
def test_of_metrics(shown: list[Any], within: bool | None, expected: str) -> None:
    results = [replace(result(1, 2, 0, 2), direction=one, within_margin=within) for one in shown]
    assert verdict(results) == expected


@pytest.mark.parametrize(
    ("shown", "specific", "expected"),
    [
        (["higher", "higher"], [NOT_SPECIFIC["rouge1"], SHOWN], "better"),
        (["higher", "higher"], [NOT_SPECIFIC["rouge1"], LOST], "unspecific"),
        (["higher", "none"], [LOST, LOST], "unspecific"),
        (["lower", "lower"], [LOST, LOST], "worse"),
        (["none", "none"], [LOST, LOST], "none"),
    ],
)
def test_a_gain_that_any_source_shows_is_not_better(shown: list[Any], specific: list[Any], expected: str) -> None:
    assert verdict([replace(result(1, 2, 0, 2), direction=one) for one in shown], specific) == expected
