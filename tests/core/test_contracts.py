"""Records between stages: what is written is read back, and a file of another version is one clear error."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import contracts
from pipeline.core.contracts import (
    Contamination,
    DataCard,
    Forgetting,
    Probed,
    QuantizedFacts,
    Step,
    TrainingSummary,
    Window,
)
from pipeline.core.errors import UserError
from pipeline.score.comparison import Comparison
from tests.made import records
from tests.made.comparison import ORDER, comparison, several_seeds

WINDOWS = [Window("a", 10, 30.0, 31.0, 32.0, 29.0)]
PROBED = Probed("general", "plain", "some", "cpu", 2, 10, 128, True, 1, 3.0, 3.1, 20.1, 22.2, 3.2, 2.9, 0.3, WINDOWS)
WHOLE: list[Any] = [
    records.data_card(source=["a", "b"], sha256=["0" * 64, None]),
    records.base_facts(),
    records.quantized_facts(int8_threshold=6.0),
    records.training(17),
    Forgetting(17, "b" * 64, "c" * 64, [PROBED]),
    Contamination("b" * 64, tested=ORDER),
    Contamination("b" * 64, not_tested="contamination.shards is 0"),
    records.decoding("base"),
    records.scores("base"),
    comparison(),
    several_seeds(),
]


@pytest.mark.parametrize("record", WHOLE, ids=lambda one: type(one).__name__)
def test_a_record_is_read_as_it_was_written_and_written_as_it_was_read(record: Any, tmp_path: Path) -> None:
    contracts.write(tmp_path / "a.json", record)
    again = contracts.read(tmp_path / "a.json", type(record))
    assert again == record
    contracts.write(tmp_path / "b.json", again)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_none_is_left_out_where_it_is_the_default_and_written_where_it_is_a_value() -> None:
    assert "int8_threshold" not in contracts.content(records.quantized_facts())
    assert "left_out" not in contracts.content(PROBED)
    assert contracts.content(records.decoding("base"))["adapter_sha256"] is None


@pytest.mark.parametrize(
    ("contract", "record", "field", "value", "told"),
    [
        (TrainingSummary, records.training(17), "kept_loss", None, r"kept_loss: Field required\): run `dvc repro`"),
        (
            QuantizedFacts,
            records.quantized_facts(),
            "layers",
            {"a": "much"},
            r"layers.a: Input should be",
        ),
        (DataCard, records.data_card(), "splits", {"train": {"rows": 1}}, r"splits.train.files: Field required"),
        (Comparison, comparison(), "verdict", "wonderful", r"verdict: Input should be 'better', 'partly-better'"),
    ],
)
def test_a_file_of_another_version_is_one_error_that_names_the_field(
    contract: type[Any], record: Any, field: str, value: Any, told: str, tmp_path: Path
) -> None:
    content = contracts.content(record)
    content.pop(field) if value is None else content.update({field: value})
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"x.json does not hold what this version writes there \({told}"):
        contracts.read(tmp_path / "x.json", contract)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        contracts.write(tmp_path / "x.json", replace(records.training(17), gap=float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    curve = [Step(step, step / 3, 3.0 - step / 7, 1e-3, 1.1, 12, 900) for step in range(5)]
    (tmp_path / "17.csv").write_text(contracts.curve_text(curve))
    assert contracts.read_curve(tmp_path / "17.csv") == curve
    (tmp_path / "17.csv").write_text("step,loss\n1,2.0\n")
    with pytest.raises(
        UserError, match=r"17.csv does not hold what this version writes there \(0.epoch: Field required"
    ):
        contracts.read_curve(tmp_path / "17.csv")
    with pytest.raises(UserError, match="18.csv is missing: run `dvc repro`"):
        contracts.read_curve(tmp_path / "18.csv")
