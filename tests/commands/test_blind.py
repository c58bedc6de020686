"""A blind sheet does not tell, and a filled one gives the share of votes."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands import blind
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.core.records import Prediction
from pipeline.score import side_by_side
from pipeline.score.evaluate import score_variant
from tests import ROOT
from tests.made.experiment import EVALUATE, examples, plant

SHEET = Path("sheet.csv")


@pytest.fixture(autouse=True)
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> params.Params:
    """Twelve groups of two rows; tuned writes "tuned <id>", base "=base <id>", a text that looks like a formula."""
    monkeypatch.chdir(tmp_path)
    plant(examples(), {"base": 0.3, "tuned-17": 0.8})
    for name, word in (("base", "=base"), ("tuned-17", "tuned")):
        texts = [Prediction(row.id, "", 9, f"{word} {row.id}\n", 9, "stop") for row in examples()]
        records.write_rows(paths.predictions(name), texts)
        score_variant(name, EVALUATE)
    return params.load(ROOT / "params.yaml")


def filled(choose: Callable[[dict[str, str]], str], delimiter: str = ",") -> None:
    """Fill the sheet, as a spreadsheet would."""
    rows = list(csv.DictReader(io.StringIO(SHEET.read_text("utf-8-sig"), newline="")))
    out = io.StringIO()
    writer = csv.DictWriter(out, blind.HEADER, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(row | {"better": choose(row)} for row in rows)
    SHEET.write_bytes(out.getvalue().encode("utf-8"))


def tuned(row: dict[str, str]) -> str:
    return "a" if row["A"].startswith("tuned") else "B"


def test_a_sheet_shows_both_outputs_in_an_order_that_the_seed_decides(
    given: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    blind.write(SHEET, 50, 1, given)
    assert "24 of 24 test rows (0 have the same two outputs)" in capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(SHEET.read_text("utf-8-sig"), newline="")))
    assert all({row["A"], row["B"]} == {f"tuned {row['id']}", f"'=base {row['id']}"} for row in rows)
    assert 4 < sum(row["A"].startswith("tuned") for row in rows) < 20
    assert "tuned" not in SHEET.read_text("utf-8-sig").splitlines()[0]
    assert rows[0]["question"] == given.prompt.instructions["challenge"]
    other = Path("other.csv")
    blind.write(other, 50, 2, given)
    assert other.read_bytes() != SHEET.read_bytes()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_votes_are_counted_whoever_saved_the_file(
    delimiter: str, given: params.Params, capsys: pytest.CaptureFixture[str]
) -> None:
    blind.write(SHEET, 50, 1, given)
    filled(tuned, delimiter)
    capsys.readouterr()
    blind.read(SHEET, 1, given)
    assert capsys.readouterr().out.splitlines() == [
        "tuned 24, base 0, neither 0 of 24 judged rows",
        "tuned is preferred: tuned wins 100 % (a tie counts half), 95 % interval 100 to 100 %, p ≤ 0.001, over 12 "
        "groups",
    ]


def test_a_tie_counts_half_and_an_empty_cell_nothing(given: params.Params, capsys: pytest.CaptureFixture[str]) -> None:
    blind.write(SHEET, 50, 1, given)
    votes = {
        row.example.id: choice for row, choice in zip(side_by_side.read([17]), ["t", "=", "b", " "] * 6, strict=True)
    }

    def choose(row: dict[str, str]) -> str:
        vote = votes[row["id"]]
        return vote if vote in "= " else tuned(row) if vote == "t" else "AB"[tuned(row) == "a"]

    filled(choose)
    capsys.readouterr()
    blind.read(SHEET, 1, given)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "tuned 6, base 6, neither 6 of 18 judged rows; 6 rows have no vote"
    assert re.match(r"no preference is shown: tuned wins 50 % .* p \d\.\d{3}, over 12 groups", second)


def test_rows_are_spread_and_equal_outputs_left_out(given: params.Params) -> None:
    texts = records.read_rows(paths.predictions("base"), Prediction)
    records.write_rows(
        paths.predictions("tuned-17"),
        [Prediction(one.id, "", 9, one.text if i % 2 else "other", 9, "stop") for i, one in enumerate(texts)],
    )
    score_variant("tuned-17", EVALUATE)
    blind.write(SHEET, 4, 1, given)
    rows = list(csv.DictReader(io.StringIO(SHEET.read_text("utf-8-sig"), newline="")))
    assert [row["id"] for row in rows] == ["p0/challenge", "p3/challenge", "p6/challenge", "p9/challenge"]


class TestRefusals:
    def test_a_sheet_that_exists_is_not_overwritten(self, given: params.Params) -> None:
        SHEET.write_text("work of hours")
        with pytest.raises(UserError, match="exists, and may hold people's work"):
            blind.write(SHEET, 5, 1, given)
        assert SHEET.read_text() == "work of hours"

    def test_another_seed_or_another_experiment(self, given: params.Params) -> None:
        blind.write(SHEET, 50, 1, given)
        filled(tuned)
        with pytest.raises(UserError, match="A and B are not this experiment's outputs in the order of seed 2"):
            blind.read(SHEET, 2, given)
        records.write_rows(paths.predictions("base"), records.read_rows(paths.predictions("tuned-17"), Prediction))
        score_variant("base", EVALUATE)
        with pytest.raises(UserError, match="line 2: A and B are not this experiment's outputs"):
            blind.read(SHEET, 1, given)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"better": "tuned"}, "line 2: better = 'tuned', which is not A, B, = or empty"),
            ({"id": "p99"}, "line 2: 'p99' is no test row"),
            ({"id": "p0/approach"}, "stands twice"),
        ],
    )
    def test_a_line_that_says_something_else(self, change: dict[str, str], said: str, given: params.Params) -> None:
        blind.write(SHEET, 50, 1, given)
        rows = list(csv.DictReader(io.StringIO(SHEET.read_text("utf-8-sig"), newline="")))
        rows[0] |= change
        SHEET.write_text(records.csv_text(blind.HEADER, ([row[name] for name in blind.HEADER] for row in rows)))
        with pytest.raises(UserError, match=re.escape(said)):
            blind.read(SHEET, 1, given)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"id,source\n", "has no column question, A, B, better"),
            (b"\xff\xfe", "not UTF-8"),
            (None, "is missing"),
        ],
    )
    def test_no_sheet(self, content: bytes | None, said: str, given: params.Params) -> None:
        if content is not None:
            SHEET.write_bytes(content)
        with pytest.raises(UserError, match=said):
            blind.read(SHEET, 1, given)

    def test_nobody_has_voted(self, given: params.Params) -> None:
        blind.write(SHEET, 50, 1, given)
        with pytest.raises(UserError, match="has no vote"):
            blind.read(SHEET, 1, given)

    def test_all_outputs_are_the_same(self, given: params.Params) -> None:
        records.write_rows(paths.predictions("base"), records.read_rows(paths.predictions("tuned-17"), Prediction))
        score_variant("base", EVALUATE)
        with pytest.raises(UserError, match="nothing to judge"):
            blind.write(SHEET, 50, 1, given)
