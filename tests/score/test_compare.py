"""Whole comparisons with known answers, reference lines by hand, refusals of unequal variants."""

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import sacrebleu

from pipeline.core import contracts, paths, records
from pipeline.core.contracts import Gone
from pipeline.core.errors import UserError
from pipeline.core.records import Example, Prediction
from pipeline.score import compare, metrics
from pipeline.score.evaluate import score_variant
from pipeline.score.significance import Interval
from tests.made.experiment import (
    ASPECTS,
    COMPARE,
    EVALUATE,
    GENERATION,
    WORDS,
    compared,
    example,
    examples,
    plant,
    scores_of,
)
from tests.made.records import data_card

TRANSLATION = EVALUATE.model_copy(update={"metrics": ["rouge1", "chrf", "bleu"]})
KEEP = {"base": 0.3, "tuned-17": 0.8}


# --- whole comparisons ---


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("project")
def test_what_the_test_split_lost_is_part_of_the_comparison() -> None:
    plant(examples(), KEEP)
    assert compared().not_scored is None
    assert "not_scored" not in contracts.content(compared())
    card = data_card()
    test = replace(card.splits["test"], left_out={"fuzzy entries": 2}, dropped={"duplicate": Gone(3, ["a"])})
    train = replace(card.splits["train"], left_out={"fuzzy entries": 5}, dropped={"duplicate": Gone(7, ["b"])})
    splits = card.splits | {"test": test, "train": train}
    contracts.write(paths.DATA_CARD, replace(card, splits=splits))
    assert compared().not_scored == {"fuzzy entries": 2, "duplicate": 3}
    # Held-out rows are of the training files.
    contracts.write(paths.DATA_CARD, replace(card, splits=splits | {"test": replace(test, held_out=1)}))
    assert compared().not_scored == {"fuzzy entries": 7, "duplicate": 3}


@pytest.mark.usefixtures("project")
def test_what_the_card_says_of_the_data_is_in_the_comparison() -> None:
    rows = examples()
    plant([replace(rows[0], references=["cafe\u0301", "caf\u00e9"]), *rows[1:]], KEEP)
    assert (compared().shared_groups, compared().not_nfc) == ([], 0)
    as_written = EVALUATE.model_copy(update={"normal_form": "none"})
    plant([replace(rows[0], references=["cafe\u0301", "caf\u00e9"]), *rows[1:]], KEEP, as_written)
    assert compare.compare_variants((17,), as_written, COMPARE).not_nfc == 1
    plant(rows, KEEP)
    shared = [contracts.SharedGroups("test", "train", 1, 12, ["p1"])]
    gone = {"duplicate": contracts.Gone(3, ["a", "b", "c"])}
    card = data_card(shared_groups=shared)
    splits = {name: replace(split, dropped=gone, filtered=gone) for name, split in card.splits.items()}
    contracts.write(paths.DATA_CARD, replace(card, splits=splits))
    assert compared().shared_groups == shared


def test_a_normal_form_matters_to_metrics_of_code_points_alone() -> None:
    change = {"rouge_tokenizer": "unicode", "use_stemmer": False, "metrics": ["rouge1"], "normal_form": "none"}
    unicode = EVALUATE.model_copy(update=change)
    assert not metrics.sees_code_points(unicode)
    assert metrics.sees_code_points(unicode.model_copy(update={"metrics": ["rouge1", "chrf"]}))
    assert metrics.sees_code_points(unicode.model_copy(update={"metrics": ["bleu"]}))
    assert metrics.sees_code_points(unicode.model_copy(update={"rouge_tokenizer": "latin"}))
    assert not metrics.sees_code_points(unicode.model_copy(update={"metrics": []}))
    answers = {"metrics": ["exact_match", "token_f1"], "rouge_tokenizer": "latin"}
    assert not metrics.sees_code_points(unicode.model_copy(update=answers))
    for form in ("NFC", "NFKC"):
        changed = {"metrics": ["rouge1", "chrf", "bleu"], "rouge_tokenizer": "latin", "normal_form": form}
        assert not metrics.sees_code_points(unicode.model_copy(update=changed))


@pytest.mark.usefixtures("project")
def test_a_better_adapter_is_called_better_and_its_mirror_worse() -> None:
    plant(examples(), {"base": 0.3, "tuned-17": 0.8})
    better = compared()
    plant(examples(), {"tuned-17": 0.3, "base": 0.8})
    worse = compared()
    assert (better.verdict, worse.verdict) == ("better", "worse")
    one = better.results["rouge1"]
    assert one.diff.low <= one.diff.value <= one.diff.high
    assert one.diff.value == pytest.approx(one.tuned.value - one.base.value)
    assert one.wins + one.ties + one.losses == pytest.approx(1)
    assert (better.n, better.groups, better.samples) == (24, 12, 2000)
    assert [(aspect.name, aspect.n) for aspect in better.aspects] == [("challenge", 12), ("approach", 12)]
    halves = [aspect.results["rouge1"].diff.value for aspect in better.aspects]
    assert sum(halves) / 2 == pytest.approx(one.diff.value)


@pytest.mark.usefixtures("project")
def test_the_gain_at_equal_length() -> None:
    """Every word of its own costs tuned as much as its length gains: at equal length nothing is left."""
    rows = [example(f"{i}", f"{i}", "a", "s", " ".join(WORDS[:8]), "") for i in range(12)]
    plant(rows, KEEP)
    lengths = {"base": [4] * 12, "tuned-17": [3, 4, 5, 6] * 3}
    for name, some in lengths.items():
        texts = [Prediction(row.id, "", 9, " ".join(WORDS[:n]), 9, "stop") for row, n in zip(rows, some, strict=True)]
        records.write_rows(paths.predictions(name), texts)
        score_variant(name, EVALUATE)
    found = compared()
    assert found.equal_length is not None
    assert found.results["rouge1"].diff.value > 3
    assert found.equal_length.ratio == pytest.approx((5 * 6) ** 0.5 / 5)
    assert found.equal_length.gains["rouge1"].value == pytest.approx(0, abs=0.5)
    # Where all outputs are longer, the line would have to be drawn beyond them.
    texts = [Prediction(row.id, "", 9, " ".join(WORDS[:n]), 9, "stop") for row, n in zip(rows, [5, 6] * 6, strict=True)]
    records.write_rows(paths.predictions("tuned-17"), texts)
    score_variant("tuned-17", EVALUATE)
    assert compared().equal_length is None


@pytest.mark.usefixtures("project")
def test_equal_outputs_differ_by_nothing() -> None:
    plant(examples(), {"base": 0.5, "tuned-17": 0.5})
    records.write_rows(paths.predictions("tuned-17"), records.read_rows(paths.predictions("base"), Prediction))
    score_variant("tuned-17", EVALUATE)
    found = compared()
    assert found.verdict == "none"
    for result in found.results.values():
        assert result.diff == Interval(0, 0, 0)
        assert (result.wins, result.ties, result.losses) == (0, 1, 0)
    assert (found.best, found.worst) == ([], [])


@pytest.mark.usefixtures("project")
def test_rounding_of_the_mean_over_seeds_is_no_gain() -> None:
    # Three times .1, summed and divided by three, is more than .1; so are scores, here and there.
    plant(examples(), {"base": 0.5, "tuned-1": 0.5, "tuned-2": 0.5, "tuned-3": 0.5})
    for seed in (1, 2, 3):
        records.write_rows(paths.predictions(f"tuned-{seed}"), records.read_rows(paths.predictions("base"), Prediction))
    for variant in ("base", "tuned-1", "tuned-2", "tuned-3"):
        edit(
            variant,
            examples=[
                replace(row, scores=row.scores | {"rouge1": 0.1, "rouge2": 0.1}) for row in scores_of("base").examples
            ],
        )
    assert sum([0.1] * 3) / 3 > 0.1
    found = compared(1, 2, 3)
    assert found.verdict == "none"
    assert found.results["rouge1"].ties == 1


@pytest.mark.usefixtures("project")
def test_order_of_groups_does_not_matter() -> None:
    rows = examples()
    plant(rows, {"base": 0.3, "tuned-17": 0.8})
    here = compared()
    order = random.Random(3).sample(range(len(rows)), len(rows))
    for path, record in (
        (paths.split("test"), Example),
        *((paths.predictions(variant), Prediction) for variant in ("base", "tuned-17")),
    ):
        lines: list[Any] = records.read_rows(path, record)
        records.write_rows(path, [lines[i] for i in order])
    score_variant("base", EVALUATE)
    score_variant("tuned-17", EVALUATE)
    there = compared()
    for name in EVALUATE.metrics:
        assert asdict(here.results[name].diff) == pytest.approx(asdict(there.results[name].diff))
    assert [pair.id for pair in here.best] == [pair.id for pair in there.best]


@pytest.mark.usefixtures("project")
def test_several_seeds_are_averaged_example_by_example() -> None:
    plant(examples(), {"base": 0.3, "tuned-1": 0.6, "tuned-2": 0.9})
    both, first, second = compared(1, 2), compared(1), compared(2)
    for name in EVALUATE.metrics:
        a, b = (one.results[name].tuned.value for one in (first, second))
        assert both.results[name].tuned.value == pytest.approx((a + b) / 2)
        spread = both.results[name].seeds
        assert spread is not None
        assert spread.sd == pytest.approx(abs(a - b) / 2**0.5)
        assert spread.both.high - spread.both.low > both.results[name].diff.high - both.results[name].diff.low
        assert first.results[name].seeds is None
    assert [one.variant for one in both.tuned] == ["tuned-1", "tuned-2"]


@pytest.mark.usefixtures("project")
def test_seeds_that_disagree_take_the_verdict_back() -> None:
    """By the examples alone it is better, and each seed is; two seeds that differ as much are no proof."""
    plant(examples(), {"base": 0.3, "tuned-1": 0.45, "tuned-2": 0.95})
    found = compared(1, 2)
    assert all(found.results[name].diff.low > 0 for name in COMPARE.decide_by)
    assert found.verdict == "none"
    assert all(found.results[name].p > 0.05 for name in COMPARE.decide_by)
    plant(examples(), {"base": 0.3, "tuned-1": 0.85, "tuned-2": 0.9, "tuned-3": 0.87})
    assert compared(1, 2, 3).verdict == "better"


@pytest.mark.usefixtures("project")
def test_aspects_are_corrected_for_their_number() -> None:
    plant(examples(), {"base": 0.45, "tuned-17": 0.6})
    found = compared()
    raw = {(one.name, name): one.results[name].p for one in found.aspects for name in COMPARE.decide_by}
    adjusted = {(one.name, name): one.p_holm[name] for one in found.aspects for name in COMPARE.decide_by}
    assert adjusted.keys() == raw.keys()
    assert all(adjusted[key] >= raw[key] for key in raw)
    smallest = min(raw, key=lambda key: raw[key])
    assert adjusted[smallest] == pytest.approx(min(1, 4 * raw[smallest]))


@pytest.mark.usefixtures("project")
def test_translation_is_compared_by_corpus_scores() -> None:
    rows = [replace(row, source=row.target.upper()) for row in examples()]
    plant(rows, KEEP, TRANSLATION)
    found = compare.compare_variants((17,), TRANSLATION, COMPARE.model_copy(update={"decide_by": ["rouge1", "chrf"]}))
    targets = [row.target for row in rows]
    for variant, get in (("base", "base"), ("tuned-17", "tuned")):
        texts = [row.text for row in records.read_rows(paths.predictions(variant), Prediction)]
        expected = sacrebleu.BLEU().corpus_score(texts, [targets]).score
        assert getattr(found.results["bleu"], get).value == pytest.approx(expected)
    result = found.results["chrf"]
    assert result.diff.low < result.diff.value < result.diff.high
    assert result.diff.value == pytest.approx(result.tuned.value - result.base.value)
    assert found.verdict == "better"
    # The floor of a translation is its source as it is: ROUGE does not see the case, chrF does.
    copy = next(line for line in found.lines if line.key == "copy")
    assert copy.scores["rouge1"] == pytest.approx(100)
    assert copy.scores["chrf"] == sacrebleu.CHRF().corpus_score([row.source for row in rows], [targets]).score


@pytest.mark.usefixtures("project")
def test_extremes_are_ordered_and_disjoint() -> None:
    plant(examples(), {"base": 0.5, "tuned-17": 0.5})
    found = compared(compare_by=COMPARE.model_copy(update={"examples": 100}))
    gains = [pair.tuned_score - pair.base_score for pair in found.best]
    losses = [pair.tuned_score - pair.base_score for pair in found.worst]
    assert gains == sorted(gains, reverse=True)
    assert losses == sorted(losses)
    assert min(gains) > 0 > max(losses)
    assert not {pair.id for pair in found.best} & {pair.id for pair in found.worst}
    assert compared(compare_by=COMPARE.model_copy(update={"examples": 0})).best == []


@pytest.mark.usefixtures("project")
def test_no_wrong_aspect_and_no_table_without_aspects() -> None:
    plant([replace(row, id=f"{i}", group=f"{i}", aspect="default") for i, row in enumerate(examples())], KEEP)
    found = compared()
    assert [line.key for line in found.lines] == ["constant", "lead", "base_cut"]
    assert found.aspects == []


@pytest.mark.usefixtures("project")
def test_a_lead_that_is_the_whole_source_is_no_line() -> None:
    rows = [replace(row, source="แมวกำลังนอน อยู่", lead="แมวกำลังนอน  อยู่") for row in examples()]
    plant(rows, KEEP)
    assert [line.key for line in compared().lines] == ["constant", "wrong_aspect", "base_cut"]
    assert any("no reference line “Lead”" in one for one in scores_of("base").notices)
    two = [replace(row, source="One. Two.", lead="One.") for row in rows[:2]]
    plant([*two, *rows[2:]], KEEP)
    assert [line.key for line in compared().lines] == ["constant", "lead", "wrong_aspect", "base_cut"]


@pytest.mark.usefixtures("project")
def test_an_aspect_within_one_group_has_no_interval_and_no_row() -> None:
    rows = examples()
    plant([*rows, replace(rows[0], id="p0/outcome", aspect="outcome")], KEEP)
    assert [aspect.name for aspect in compared().aspects] == list(ASPECTS)


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts_sha256": "c" * 64}, f"prompts_sha256: tuned-17 has {'c' * 64}, base has {'a' * 64}"),
        ({"model_sha256": "c" * 64}, "model_sha256: tuned-17"),
        (
            {"generation": GENERATION | {"num_beams": 4}},
            "generation: tuned-17 has {'num_beams': 4}, base has {'num_beams': 1}",
        ),
        (
            {"generation": GENERATION | {"backend": "llama.cpp"}},
            "tuned-17 has {'backend': 'llama.cpp'}",
        ),
        ({"device": "cuda"}, "device: tuned-17 has cuda, base has cpu"),
        ({"dtype": "bfloat16"}, "dtype: tuned-17 has bfloat16, base has float32"),
        ({"threads": 4}, "threads: tuned-17 has 4, base has 2"),
        ({"adapter_sha256": None}, "tuned-17 was decoded without an adapter"),
    ],
)
@pytest.mark.usefixtures("project")
def test_unequal_conditions_are_refused(change: dict[str, Any], said: str) -> None:
    plant(examples(), KEEP, **change)
    with pytest.raises(UserError) as refusal:
        compared()
    assert said in str(refusal.value)


@pytest.mark.usefixtures("project")
def test_all_differences_are_listed_at_once() -> None:
    plant(examples(), KEEP, prompts_sha256="c" * 64, dtype="bfloat16")
    for variant in KEEP:
        edit(variant, signature="rouge-score 0.0.1")
    with pytest.raises(UserError) as refusal:
        compared()
    assert len(str(refusal.value).splitlines()) == 1 + 2 + 2


@pytest.mark.usefixtures("project")
def test_base_with_an_adapter_is_refused() -> None:
    plant(examples(), KEEP)
    edit("base", decoding=scores_of("tuned-17").decoding)
    with pytest.raises(UserError, match="base was decoded with an adapter"):
        compared()


@pytest.mark.parametrize("what", ["scores", "predictions"])
@pytest.mark.usefixtures("project")
def test_other_rows_are_refused(what: str) -> None:
    plant(examples(), KEEP)
    if what == "scores":
        edit("tuned-17", examples=scores_of("tuned-17").examples[::-1])
    else:
        rows = records.read_rows(paths.predictions("tuned-17"), Prediction)
        records.write_rows(paths.predictions("tuned-17"), rows[1:])
    with pytest.raises(UserError, match=rf"tuned-17 \({what}\)"):
        compared()


@pytest.mark.parametrize("bad", ["NaN", "Infinity"])
@pytest.mark.usefixtures("project")
def test_a_score_that_is_no_number_is_refused(bad: str) -> None:
    plant(examples(), KEEP)
    content = json.loads(paths.scores("tuned-17").read_text())
    content["examples"][3]["scores"]["rouge2"] = float(bad)
    paths.scores("tuned-17").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a finite number"):
        compared()


@pytest.mark.usefixtures("project")
def test_missing_scores_and_missing_seeds_are_refused() -> None:
    plant(examples(), KEEP)
    with pytest.raises(UserError, match=r"tuned-18\.jsonl is missing"):
        compared(17, 18)
    with pytest.raises(UserError, match="no tuned variant"):
        compare.compare_variants([], EVALUATE, COMPARE)


@pytest.mark.usefixtures("project")
def test_files_that_params_do_not_name_are_not_read() -> None:
    plant(examples(), {**KEEP, "tuned-99": 1.0})
    with_stray = compared()
    for path in (paths.scores("tuned-99"), paths.predictions("tuned-99")):
        path.unlink()
    assert compared() == with_stray


@pytest.mark.usefixtures("project")
def test_seeds_in_any_order_give_the_same_result() -> None:
    plant(examples(), {"base": 0.3, "tuned-1": 0.6, "tuned-2": 0.9, "tuned-3": 0.7})
    found = [compared(*seeds).results["rouge1"].diff for seeds in itertools.permutations((1, 2, 3))]
    assert len(found) == 6
    assert all(asdict(one) == pytest.approx(asdict(found[0])) for one in found)


def edit(variant: str, **change: Any) -> None:
    contracts.write(paths.scores(variant), replace(scores_of(variant), **change))
