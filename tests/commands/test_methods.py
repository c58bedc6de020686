"""The report of a comparison of methods says what is shown after correction, and what each method costs."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.commands import methods
from pipeline.commands.methods import Arm
from pipeline.record.runs import FINISHED, Stored
from pipeline.report import figures
from pipeline.search.arms import Arms, Chosen
from tests.made.comparison import result
from tests.made.experiment import COMPARE

PLAN = Arms(
    reference="lora",
    common={"data.limits.train": 150},
    rates=[5e-4, 1e-3],
    rate_seed=17,
    seeds=[17, 18, 19],
    arms={"lora": {}, "dora": {"lora.dora": True}, "small": {"lora.r": 4}},
)


def arm(name: str, score: float, low: float | None, p: float, parameters: int = 1000) -> Arm:
    """An arm whose ROUGE-1 is `score`, 10 points above its base; against the reference the interval begins at `low`."""
    over = None if low is None else {"rouge1": result(30.0, score, low, low + 4), "rouge2": result(9, 9, -1, 1)}
    return Arm(
        tested=Chosen(name, 1e-3, {5e-4: 2.5, 1e-3: 2.25}, f"methods-{name}-tested", "d" * 64),
        run=Stored("1" * 32, name, FINISHED, {}, {}, {}),
        base={"rouge1": result(score - 10, score, 8, 12), "rouge2": result(5, 9, 3, 5)},
        over=over,
        p={} if over is None else {"rouge1": p, "rouge2": 0.9},
        parameters=parameters,
        seconds=12.4,
        memory=None,
        forgetting={"encyclopedia": 0.0123},
    )


FOUND = [arm("lora", 30.0, None, 1.0, 4000), arm("dora", 33.0, 1.0, 0.004, 5000), arm("small", 29.0, -3.0, 0.4)]


def test_what_is_shown_is_the_first_sentence() -> None:
    assert methods.verdict(PLAN, FOUND, COMPARE) == (
        "dora is shown to be higher than lora in ROUGE-1. For small no difference is shown."
    )
    none = [FOUND[0], replace(FOUND[1], p={"rouge1": 0.06, "rouge2": 0.9}), FOUND[2]]
    assert none[1].over is not None
    assert none[1].over["rouge1"].direction == "higher"  # which the correction takes back
    assert methods.verdict(PLAN, none, COMPARE) == (
        "Of 2 methods none is shown to differ from lora in ROUGE-1 and ROUGE-2."
    )
    both = [*FOUND[:2], arm("worse", 20.0, -12.0, 0.001), arm("bad", 19.0, -13.0, 0.001)]
    assert methods.verdict(PLAN, both, COMPARE) == (
        "dora is shown to be higher than lora in ROUGE-1. worse and bad are shown to be lower than lora in ROUGE-1."
    )


def test_too_few_groups_show_nothing() -> None:
    few = replace(FOUND[1], over={"rouge1": replace(result(30, 33, 1, 5), direction="few")}, p={"rouge1": 0.004})
    settings = COMPARE.model_copy(update={"decide_by": ["rouge1"]})
    assert few.shown("rouge1", 0.95) == "few"
    said = methods.verdict(PLAN, [FOUND[0], few], settings)
    assert said == "There are too few groups of examples to say which methods differ."


def test_the_table_has_scores_differences_and_costs() -> None:
    text = methods.markdown(Path("sweeps/methods.yaml"), PLAN, FOUND, COMPARE)
    assert "`data.limits.train: 150`" in text
    assert "![Scores over trainable parameters](methods.svg)" in text
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()
            if line.startswith("| `")}  # fmt: skip
    assert rows["`dora`"] == [
        "0.001", "33.0 (32.0 to 34.0)", "9.0 (8.0 to 10.0)", "+3.0 (+1.0 to +5.0)", "+0.0 (−1.0 to +1.0)",
        "higher in ROUGE-1", "5,000", "12", "n/a", "+0.012",
    ]  # fmt: skip
    assert rows["`lora`"][3:6] == ["—", "—", "reference"]
    assert rows["`small`"][5] == "no"
    assert "- `small`: `lora.r: 4`" in text
    assert "- `lora`: the parameters as they are" in text
    assert "- `dora`: 0.0005: 2.5000, 0.001: 2.2500" in text


def test_the_numbers_are_in_a_file_too() -> None:
    rows = list(csv.DictReader(methods.table(FOUND, COMPARE).splitlines()))
    assert len(rows) == 6
    [dora] = [row for row in rows if (row["arm"], row["metric"]) == ("dora", "rouge1")]
    assert (float(dora["over_reference"]), float(dora["low"]), dora["shown"]) == (3.0, 1.0, "higher")
    assert (dora["forgetting"], dora["p_holm"]) == ("encyclopedia=0.0123", "0.004")
    assert rows[0]["over_reference"] == rows[0]["p_holm"] == ""


def test_the_picture_joins_what_nothing_cheaper_beats() -> None:
    document = methods.drawing(FOUND, COMPARE)
    assert document == methods.drawing(FOUND, COMPARE)
    assert all(f">{name}<" in document for name in ("lora", "dora", "small", "trainable parameters", "the reference"))
    points = [
        figures.Point(str(cost), cost, score, score, score, "none") for cost, score in ((1, 5), (2, 4), (3, 9), (3, 8))
    ]
    rows = [{"cost": one.cost, "score": one.score} for one in points]
    front = [row for row in rows if not any(figures._beats(other, row) for other in rows)]
    assert [row["cost"] for row in front] == [1, 3]
    assert re.search(r"<path[^>]*stroke-width=\"2\"", document)


@pytest.mark.parametrize(("cost", "score", "beaten"), [(1, 5, False), (2, 5, True), (1, 4, True), (0.5, 4, False)])
def test_one_method_beats_another_by_being_no_worse_and_once_better(cost: float, score: float, beaten: bool) -> None:
    assert figures._beats({"cost": 1, "score": 5}, {"cost": cost, "score": score}) is beaten
