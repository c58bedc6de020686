"""Any experiments side by side: the right order, every pair once, corrected, and refusals of what does not compare."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import experiments, params, paths, records, scores
from pipeline.errors import UserError
from pipeline.experiments import Experiment
from pipeline.records import Example, Prediction
from tests.test_compare import COMPARE, examples, plant

GIVEN = {
    "evaluate.metrics": '["rouge1", "rouge2", "rougeL"]',
    "evaluate.use_stemmer": "false",
    "evaluate.rouge_tokenizer": "latin",
    "evaluate.bleu_tokenizer": "13a",
    "evaluate.language": "null",
    "lora.alpha": "32",
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Experiment]:
    """Three experiments on one test set: weak and strong with one seed, and two seeds about as good as strong."""
    monkeypatch.chdir(tmp_path)
    shares = {"tuned-1": 0.4, "tuned-2": 0.9, "tuned-3": 0.88, "tuned-4": 0.9}
    plant(examples(40), {"base": 0.3, **shares})
    base = scores.read("base")
    references = {row.id: row.target for row in records.read_rows(paths.split("test"), Example)}
    one = {variant: scores.read(variant) for variant in shares}

    def experiment(name: str, rank: str, *tuned: str) -> Experiment:
        given = {**GIVEN, "lora.r": rank, "seeds": "[1]"}
        texts = {row.id: row.text for row in records.read_rows(paths.predictions(tuned[0]), Prediction)}
        return Experiment(name, given, base, [one[key] for key in tuned], references, texts, {})

    found = [
        experiment("weak", "1", "tuned-1"),
        experiment("strong", "16", "tuned-2"),
        experiment("two seeds", "64", "tuned-3", "tuned-4"),
    ]
    return {item.name: item for item in found}


def test_they_are_ranked_and_every_pair_is_compared_once(made: dict[str, Experiment]) -> None:
    ranking = experiments.rank(list(made.values()), COMPARE)
    assert ranking.names[-1] == "weak"
    assert {(pair.first, pair.second) for pair in ranking.pairs} == {
        (ranking.names[0], ranking.names[1]),
        (ranking.names[0], "weak"),
        (ranking.names[1], "weak"),
    }
    assert {pair.metric for pair in ranking.pairs} == {"rouge1", "rouge2"}
    raw = sorted(pair.result.p for pair in ranking.pairs)
    assert min(pair.p_holm for pair in ranking.pairs) == pytest.approx(6 * raw[0])
    page = experiments.page(list(made.values()), ranking, COMPARE)
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row.split("|")[2].strip() for row in rows[1:4]] == ranking.names
    assert "lora.r" in rows[0]
    assert "lora.alpha" not in rows[0]
    verdicts = {(row.split("|")[1].strip(), row.split("|")[2].strip()): row.split("|")[7].strip() for row in rows[5:11]}
    assert verdicts["strong − weak", "ROUGE-1"] == "strong is better"
    top = f"{ranking.names[0]} − {ranking.names[1]}"
    assert verdicts[top, "ROUGE-1"] == verdicts[top, "ROUGE-2"] == "no difference shown"
    assert "With one seed" in page


def test_the_examples_on_which_the_best_two_differ_most_are_shown(made: dict[str, Experiment]) -> None:
    found = [made["strong"], made["weak"]]
    page = experiments.page(found, experiments.rank(found, COMPARE), COMPARE)
    gains = {
        row["id"]: row["rouge1"] - other["rouge1"]
        for row, other in zip(found[0].tuned[0].examples, found[1].tuned[0].examples, strict=True)
    }
    rows = [line for line in page.splitlines() if "<br>" in line]
    shown = [row.split("<br>")[0].removeprefix("| ") for row in rows]
    ordered = sorted(gains.values())
    losses = [gain for gain in ordered[: COMPARE.examples] if gain < 0]
    assert [gains[name] for name in shown] == [*ordered[::-1][: COMPARE.examples], *losses]
    for name, row in zip(shown, rows, strict=True):
        assert f"| {found[0].references[name]} | {found[0].texts[name]} | {found[1].texts[name]} |" in row


def test_a_pair_has_the_difference_that_its_rows_have(made: dict[str, Experiment]) -> None:
    ranking = experiments.rank([made["weak"], made["strong"]], COMPARE)
    [pair] = [pair for pair in ranking.pairs if pair.metric == "rouge1"]
    gain = made["weak"].tuned[0].corpus["rouge1"] - made["strong"].tuned[0].corpus["rouge1"]
    assert (pair.first, pair.second) == ("strong", "weak")
    assert pair.result.diff.value == pytest.approx(gain)
    assert f"| +{-gain:.1f} " in experiments.page(list(made.values())[:2], ranking, COMPARE)


def test_what_was_tested_or_scored_otherwise_is_refused(made: dict[str, Experiment], tmp_path: Path) -> None:
    weak, strong = made["weak"], made["strong"]
    scored = replace(weak, base=replace(weak.base, signature="x"), tuned=[replace(weak.tuned[0], signature="x")])
    with pytest.raises(UserError, match="weak is scored as x, strong as rouge-score"):
        experiments.rank([strong, scored], COMPARE)
    (tmp_path / "other").mkdir()
    rows = [replace(row, target=random.Random(1).choice(["a b", "c d"]), references=[]) for row in examples(40)]
    plant(rows, {"base": 0.3, "tuned-1": 0.4})
    other = replace(weak, base=scores.read("base"), tuned=[scores.read("tuned-1")])
    with pytest.raises(UserError, match="weak was tested on other examples than strong"):
        experiments.rank([strong, other], COMPARE)
    with pytest.raises(UserError, match="strong is named twice"):
        experiments.rank([strong, strong], COMPARE)


def test_a_metric_that_was_not_computed_is_refused(made: dict[str, Experiment]) -> None:
    wanted = COMPARE.model_copy(update={"decide_by": ["chrf"]})
    with pytest.raises(UserError, match="compare.decide_by names chrf, which these experiments did not compute"):
        experiments.rank(list(made.values()), wanted)


@pytest.mark.usefixtures("made")
def test_the_workspace_without_a_result_is_one_clear_error() -> None:
    tracking = params.Tracking(uri=None, experiment="x")
    with pytest.raises(UserError, match=r"dvc.lock is missing: run `dvc repro`"):
        experiments.find(experiments.HERE, tracking)
    paths.DVC_LOCK.write_text("schema: '2.0'\nstages: {}\n")
    with pytest.raises(UserError, match="holds no finished comparison"):
        experiments.find(experiments.HERE, tracking)
