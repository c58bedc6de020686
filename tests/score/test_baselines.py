"""The variants of the base as the comparison reads them: which rows, what they are called, and equal conditions."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.core import baseline, contracts, paths, records
from pipeline.core.contracts import Skipped
from pipeline.core.errors import UserError
from pipeline.core.records import Decoding, Demonstrations, Prediction
from pipeline.score import baselines
from pipeline.score.evaluate import score_baseline
from pipeline.score.significance import Interval
from tests.made.experiment import EVALUATE, compared, examples, plant, scores_of
from tests.made.records import base_facts

MOST = 8
SHOWN = Demonstrations(3, "random", 17, [["t1/a", "t1/b", "t1/c"]], [90] * MOST)


def write(variant: str, **change: Any) -> None:
    """The outputs of a variant, whose answers are the base's, with changes to its decoding."""
    rows = baseline.rows(examples(), MOST)
    base = contracts.read(paths.decoding("base"), Decoding)
    predictions = records.read_rows(paths.predictions("base"), Prediction)
    records.write_rows(paths.predictions(variant), [predictions[row] for row in rows])
    own: dict[str, Any] = {"model_sha256": "e" * 64} if variant == paths.UNQUANTIZED else {"demonstrations": SHOWN}
    made = replace(base, **{"variant": variant, "rows": rows, "prompts_sha256": "f" * 64} | own | change)
    contracts.write(paths.decoding(variant), made)
    score_baseline(variant, EVALUATE, MOST)


@pytest.fixture
def project(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant(examples(), {"base": 0.3, "tuned-17": 0.8})
    contracts.write(paths.BASE_FACTS, base_facts())


@pytest.mark.usefixtures("project")
def test_both_are_read_with_their_rows_and_names() -> None:
    for variant in baselines.VARIANTS:
        write(variant)
    plain, shots = baselines.read()
    assert (plain.name, plain.label) == ("base-unquantized", "the base without quantization")
    assert (shots.name, shots.label) == ("base-shots", "the base with 3 demonstrations")
    test, base = examples(), scores_of("base")
    for one in (plain, shots):
        assert one.rows == baseline.rows(test, MOST)
        assert [row.id for row in one.predictions] == [test[row].id for row in one.rows]
        assert one.scores.examples == [base.examples[row] for row in one.rows]
        assert (one.scores.n, one.scores.groups, one.scores.test_sha256) == (8, 4, base.test_sha256)


@pytest.mark.usefixtures("project")
def test_what_is_left_out_is_none_of_them() -> None:
    assert baselines.read() == []
    write(paths.UNQUANTIZED)
    contracts.write(paths.decoding(paths.SHOTS), Skipped(paths.SHOTS, "baseline.shots is 0"))
    score_baseline(paths.SHOTS, EVALUATE, MOST)
    assert [one.name for one in baselines.read()] == ["base-unquantized"]
    assert [baselines.why_off(variant) for variant in baselines.VARIANTS] == [None, "baseline.shots is 0"]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "generation": ({"generation": {"num_beams": 4}}, "generation: .* base has"),
    "device": ({"device": "cuda"}, "device: .* has cuda, base has cpu"),
    "threads": ({"threads": 16}, "threads: .* has 16, base has 2"),
    "dtype": ({"dtype": "bfloat16"}, "dtype: .* has bfloat16, base has float32"),
    "thinking": ({"thinking": True}, "thinking: .* has True, base has False"),
    "model": ({"model_sha256": "9" * 64}, "model_sha256: .* was decoded with 9999"),
    "adapter": ({"adapter_sha256": "9" * 64}, "was decoded with an adapter"),
}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("variant", baselines.VARIANTS)
@pytest.mark.parametrize("fault", CHANGES)
def test_other_conditions_are_refused(fault: str, variant: str) -> None:
    change, message = CHANGES[fault]
    write(variant, **change)
    with pytest.raises(UserError, match=message):
        baselines.read()


@pytest.mark.usefixtures("project")
def test_other_prompts_than_the_bases_are_refused() -> None:
    write(paths.UNQUANTIZED)
    path = paths.predictions(paths.UNQUANTIZED)
    rows = records.read_rows(path, Prediction)
    records.write_rows(path, [replace(rows[0], prompt_sha256="other"), *rows[1:]])
    with pytest.raises(UserError, match=f"1 prompts of base-unquantized are not those of base, .* {rows[0].id}"):
        baselines.read()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 1, 4, 5, 6, 7, 8, 9], None])
def test_other_rows_than_asked_for_are_not_scored(rows: list[int] | None) -> None:
    with pytest.raises(UserError, match="which are not the 8 of baseline.rows: run `dvc repro`"):
        write(paths.SHOTS, rows=rows)


@pytest.mark.usefixtures("project")
def test_predictions_of_other_rows_are_refused() -> None:
    write(paths.SHOTS)
    path = paths.predictions(paths.SHOTS)
    rows = records.read_rows(path, Prediction)
    for wrong in (rows[:-1], rows[::-1], [*rows[:-1], replace(rows[-1], id="p1/challenge")]):
        records.write_rows(path, wrong)
        with pytest.raises(UserError, match="base-shots"):
            baselines.read()
        with pytest.raises(UserError, match="base-shots"):
            score_baseline(paths.SHOTS, EVALUATE, MOST)


@pytest.mark.usefixtures("project")
def test_the_comparison_holds_each_against_base_and_tuned_on_its_rows() -> None:
    for variant in baselines.VARIANTS:
        write(variant)
    found = compared()
    assert [(one.label, one.n, one.groups) for one in found.baselines] == [
        ("the base without quantization", 8, 4),
        ("the base with 3 demonstrations", 8, 4),
    ]
    one, rows = found.baselines[0], baseline.rows(examples(), MOST)
    base, tuned = (scores_of(name).examples for name in ("base", "tuned-17"))
    # Its answers are those of the base.
    assert one.gain["rouge1"].diff == Interval(0, 0, 0)
    ahead = [tuned[row].scores["rouge1"] - base[row].scores["rouge1"] for row in rows]
    assert one.tuned["rouge1"].diff.value == pytest.approx(sum(ahead) / 8)
    assert one.tuned["rouge1"].direction == "few"
    assert one.output.variant == "base-unquantized"


@pytest.mark.usefixtures("project")
def test_the_variants_are_compared_with_each_other() -> None:
    write(paths.UNQUANTIZED)
    write(paths.SHOTS)
    rows = baseline.rows(examples(), MOST)
    tuned = records.read_rows(paths.predictions("tuned-17"), Prediction)
    records.write_rows(paths.predictions(paths.SHOTS), [tuned[row] for row in rows])
    score_baseline(paths.SHOTS, EVALUATE, MOST)
    plain, shots = compared().baselines
    assert plain.ahead == {}
    assert shots.ahead["rouge1"].diff == shots.gain["rouge1"].diff  # the former's answers are those of the base
    assert shots.ahead["rouge1"].diff.value > 10
