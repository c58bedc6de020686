"""What training knows of the test split is counted."""

import pytest

from pipeline.score import known
from pipeline.score.known import Known
from tests.made.experiment import example

ANSWER = "The proposed model outperforms all baselines on three datasets."


@pytest.mark.parametrize(
    ("source", "answer", "expected"),
    [
        ("a source of its own", "another answer of its own that is long enough", Known(0, 0)),
        ("a source of its own", ANSWER, Known(1, 0)),
        ("a source of its own", f" {ANSWER.upper()[:-1]} ", Known(1, 0)),
        ("a source of its own", "positive", Known(0, 0)),  # a label
        ("Page 3 of 12", "a", Known(0, 1)),
        ("page 7 of 9.", "a", Known(0, 1)),
        ("Page three of 12", "a", Known(0, 0)),
        # A long one is the leak guard's.
        ("one two three four five six seven eight 9", "a", Known(0, 0)),
    ],
)
def test_counted(source: str, answer: str, expected: Known) -> None:
    training = [
        example("1", "1", "a", "Page 1 of 2", ANSWER, ""),
        example("2", "2", "a", "one two three four five six seven eight 8", "positive", ""),
    ]
    assert known.counted([example("t", "t", "b", source, answer, "")], training) == expected
