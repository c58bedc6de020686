"""Any experiments side by side: the right order, every pair once, corrected, and refusals of what does not compare."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.commands import compare
from pipeline.commands.compare import Experiment
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.core.records import Example, Prediction
from pipeline.record.runs import Stored
from tests.made.experiment import COMPARE, examples, plant, scores_of

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
    base = scores_of("base")
    references = {row.id: row.target for row in records.read_rows(paths.split("test"), Example)}
    one = {variant: scores_of(variant) for variant in shares}

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
    ranking = compare.rank(list(made.values()), COMPARE)
    assert ranking.names[-1] == "weak"
    assert {(pair.first, pair.second) for pair in ranking.pairs} == {
        (ranking.names[0], ranking.names[1]),
        (ranking.names[0], "weak"),
        (ranking.names[1], "weak"),
    }
    assert {pair.metric for pair in ranking.pairs} == {"rouge1", "rouge2"}
    raw = sorted(pair.result.p for pair in ranking.pairs)
    assert min(pair.p_holm for pair in ranking.pairs) == pytest.approx(6 * raw[0])
    page = compare.page(list(made.values()), ranking, COMPARE)
    overview, *rest = tables(page)
    assert [row[1] for row in overview[1:]] == ranking.names
    assert "lora.r" in overview[0]
    assert "lora.alpha" not in overview[0]
    assert [table[0][2] for table in rest[::2]] == ["ROUGE-1", "ROUGE-2"]
    for reached, pairs in zip(rest[::2], rest[1::2], strict=True):
        assert [row[:2] for row in reached[1:]] == [[f"#{place}", name] for place, name in enumerate(ranking.names, 1)]
        assert [row[0] for row in pairs[1:]] == ["#1 − #2", "#1 − #3", "#2 − #3"]
        assert pairs[1][-1] == "no difference shown"
        # Two seeds say little about their spread.
        words = {"strong": "strong is better", "two seeds": "no difference shown"}
        assert [row[-1] for row in pairs[2:]] == [words[name] for name in ranking.names[:2]]
    assert "corrected for all 6 comparisons (Holm)" in page
    assert "With one seed" in page
    best = ranking.results[ranking.names[0]]["rouge1"]
    assert "#1 is the best of 3 that were scored on this test split. With intervals of 98.33 %" in page
    assert ranking.best["rouge1"].diff.value == best.diff.value
    assert ranking.best["rouge1"].diff.low < best.diff.low < best.diff.high < ranking.best["rouge1"].diff.high
    assert "Validation losses are not known of all these experiments." in page
    # More experiments that were scored on it were candidates too, whether they are named or not.
    wider = compare.rank(list(made.values()), COMPARE, seen=40)
    assert wider.candidates == 40
    assert wider.best["rouge1"].diff.low < ranking.best["rouge1"].diff.low


def tables(page: str) -> list[list[list[str]]]:
    """The cells of each table, without the line below its header."""
    found: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
        elif not line.startswith("|"):
            found.append([])
    return [table for table in found if table]


def test_no_table_is_wider_than_a_terminal(made: dict[str, Experiment]) -> None:
    costs = {"trainable": 4_884_480.0, "train s": 1234.0, "peak MB": 3100.0}
    names = ["tacit-jays", "gummy-owls", "local-tier"]
    found = [replace(one, name=name, costs=costs) for name, one in zip(names, made.values(), strict=True)]
    page = compare.page(found, compare.rank(found, COMPARE), COMPARE)
    assert max(len(line) for line in page.splitlines() if line.startswith("|")) <= 80
    assert "| lora.r | seeds | ROUGE-1 | trainable | train s | peak MB |" in page
    [overview] = [table for table in tables(page) if "trainable" in table[0]]
    assert {row[-3] for row in overview[1:]} == {"4,884,480"}
    long = {"prompt.template": "{source}\n\n{instruction}", "data.source": "pip:one==1.0/one/data"}
    found[1] = replace(found[1], params=found[1].params | long)
    page = compare.page(found, compare.rank(found, COMPARE), COMPARE)
    assert max(len(line) for line in page.splitlines() if line.startswith("|")) <= 80
    place = 1 + compare.rank(found, COMPARE).names.index("gummy-owls")
    assert f"- #{place}: data.source = pip:one==1.0/one/data, lora.r = 16, prompt.template = {{source}}<br>" in page


def test_the_examples_on_which_the_best_two_differ_most_are_shown(made: dict[str, Experiment]) -> None:
    found = [made["strong"], made["weak"]]
    page = compare.page(found, compare.rank(found, COMPARE), COMPARE)
    gains = {
        row.id: row.scores["rouge1"] - other.scores["rouge1"]
        for row, other in zip(found[0].tuned[0].examples, found[1].tuned[0].examples, strict=True)
    }
    rows = page.partition("furthest apart in ROUGE-1")[2].split("\n- ")[1:]
    shown = [row.split("\n")[0] for row in rows]
    ordered = sorted(gains.values())
    losses = [gain for gain in ordered[: COMPARE.examples] if gain < 0]
    assert [gains[name] for name in shown] == [*ordered[::-1][: COMPARE.examples], *losses]
    for name, row in zip(shown, rows, strict=True):
        assert f"\n  - reference: {found[0].references[name]}\n" in row
        assert [line.partition(": ")[2] for line in row.splitlines()[2:4]] == [one.texts[name] for one in found]


def test_a_pair_has_the_difference_that_its_rows_have(made: dict[str, Experiment]) -> None:
    ranking = compare.rank([made["weak"], made["strong"]], COMPARE)
    [pair] = [pair for pair in ranking.pairs if pair.metric == "rouge1"]
    gain = made["weak"].tuned[0].corpus["rouge1"] - made["strong"].tuned[0].corpus["rouge1"]
    assert (pair.first, pair.second) == ("strong", "weak")
    assert pair.result.diff.value == pytest.approx(gain)
    assert f"| #1 − #2 | +{-gain:.1f} (" in compare.page(list(made.values())[:2], ranking, COMPARE)


def test_what_was_tested_or_scored_otherwise_is_refused(made: dict[str, Experiment], tmp_path: Path) -> None:
    weak, strong = made["weak"], made["strong"]
    scored = replace(weak, base=replace(weak.base, signature="x"), tuned=[replace(weak.tuned[0], signature="x")])
    with pytest.raises(UserError, match=r"weak is scored as x, strong as form:NFC\|rouge-score"):
        compare.rank([strong, scored], COMPARE)
    (tmp_path / "other").mkdir()
    rows = [replace(row, target=random.Random(1).choice(["a b", "c d"]), references=[]) for row in examples(40)]
    plant(rows, {"base": 0.3, "tuned-1": 0.4})
    other = replace(weak, base=scores_of("base"), tuned=[scores_of("tuned-1")])
    with pytest.raises(UserError, match="weak was tested on other examples than strong$"):
        compare.rank([strong, other], COMPARE)
    plant(rows[:30], {"base": 0.3, "tuned-1": 0.4})
    fewer = replace(weak, base=scores_of("base"), tuned=[scores_of("tuned-1")])
    with pytest.raises(UserError, match=r"weak was tested on other examples than strong \(30, not 80\)"):
        compare.rank([strong, fewer], COMPARE)
    with pytest.raises(UserError, match="strong is named twice"):
        compare.rank([strong, strong], COMPARE)


def test_a_metric_that_was_not_computed_is_refused(made: dict[str, Experiment]) -> None:
    wanted = COMPARE.model_copy(update={"decide_by": ["chrf"]})
    with pytest.raises(UserError, match="compare.decide_by names chrf, which these experiments did not compute"):
        compare.rank(list(made.values()), wanted)


@pytest.mark.usefixtures("made")
def test_the_workspace_without_a_result_is_one_clear_error() -> None:
    tracking = params.Tracking(uri=None, experiment="x")
    with pytest.raises(UserError, match=r"dvc.lock is missing: run `dvc repro`"):
        compare.find(compare.HERE, tracking)
    paths.DVC_LOCK.write_text("schema: '2.0'\nstages: {}\n")
    with pytest.raises(UserError, match="holds no finished comparison"):
        compare.find(compare.HERE, tracking)


def test_validation_losses_are_offered_for_choosing(made: dict[str, Experiment]) -> None:
    losses = {"weak": 2.5, "strong": 2.25, "two seeds": 2.0}
    found = [replace(one, loss=losses[name]) for name, one in made.items()]
    ranking = compare.rank(found, COMPARE)
    place = {name: f"#{ranking.names.index(name) + 1} ({losses[name]:.4f})" for name in losses}
    told = f"By validation loss, from the lowest: {place['two seeds']}, {place['strong']}, {place['weak']}."
    assert told in compare.page(found, ranking, COMPARE)


def test_what_the_base_scores_without_training_is_no_seed_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant(examples(12), {"base": 0.3, "tuned-17": 0.8})
    folder = Path("artifacts")
    shutil.copytree(paths.SCORES, folder / "scores")
    assert {path.stem for path in (folder / "scores").iterdir()} > {"base-shots", "base-unquantized"}
    ids = [row.id for row in examples(12)]
    table = {"columns": ["id", "reference", "tuned"], "data": [[name, "r", "t"] for name in ids]}
    records.write_json(folder / "tables" / "predictions.json", table)
    metrics = {"training/kept_loss": 2.5}
    run = Stored("0" * 32, "run", "FINISHED", {}, {**GIVEN, "seeds": "[17]"}, metrics)
    found = compare.of_artifacts(run, folder)
    assert (found.base.variant, [one.variant for one in found.tuned], found.loss) == ("base", ["tuned-17"], 2.5)
    (folder / "scores" / "tuned-17.json").unlink()
    with pytest.raises(UserError, match="holds no scores"):
        compare.of_artifacts(run, folder)
