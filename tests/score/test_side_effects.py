"""What an experiment cost, out of what its stages left: the same windows for all seeds, resampled by text."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.core import contracts, params, paths
from pipeline.core.contracts import Forgetting, GeneralText, Window
from pipeline.score import side_effects
from tests.made.experiment import COMPARE
from tests.made.records import training


def measured(seed: int, rise: float, places: list[str]) -> Forgetting:
    """Windows of ten tokens each, of which every second rises by a little more."""
    windows = [
        Window(place, 10, base=30.0 + i, tuned=30.0 + i + 10 * rise + i % 2, cross_entropy=29.0 + i % 3, entropy=28.0)
        for i, place in enumerate(places)
    ]
    tokens = 10 * len(windows)
    base, tuned = sum(one.base for one in windows) / tokens, sum(one.tuned for one in windows) / tokens
    perplexities = float(np.exp(base)), float(np.exp(tuned))
    losses = (base, tuned, *perplexities, 2.9, 2.8, 0.1)
    text = GeneralText("cpu", 2, tokens, 128, True, len(set(places)), *losses, windows)
    return Forgetting(seed, "some", "b" * 64, "c" * 64, text)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(rises: dict[int, float], places: list[str], compare: params.Compare = COMPARE) -> side_effects.Cost:
    for seed, rise in rises.items():
        contracts.write(paths.training_summary(seed), training(seed))
        contracts.write(paths.forgetting(seed), measured(seed, rise, places))
    return side_effects.read(list(rises), compare)


PLACES = [f"text {i // 2}" for i in range(40)]


def test_the_difference_is_over_tokens_and_its_interval_over_texts() -> None:
    found = read({17: 0.3}, PLACES).forgetting
    assert found is not None
    assert (found.tokens, found.texts, found.units) == (400, 20, "texts")
    assert found.diff.value == pytest.approx(found.tuned_loss - found.base_loss)
    assert found.diff.value == pytest.approx(0.35)
    # Both windows of a text go together, and each text rises by as much: texts differ by nothing.
    assert [found.diff.low, found.diff.high] == pytest.approx([0.35, 0.35])
    assert found.kl.value == pytest.approx(0.1 + 0.1 * np.mean([i % 3 for i in range(40)]))
    assert found.kl.low < found.kl.value < found.kl.high
    assert found.cross_entropy.value - found.kl.value == pytest.approx(2.8)
    assert found.rose
    assert found == read({17: 0.3}, PLACES).forgetting


def test_within_one_text_windows_are_resampled() -> None:
    found = read({17: 0.3}, ["only"] * 40).forgetting
    assert found is not None
    assert found.units == "windows of one text"
    assert found.diff.low < found.diff.value < found.diff.high


def test_several_seeds_widen_the_interval() -> None:
    found = read({17: 0.2, 18: 0.4}, PLACES).forgetting
    assert found is not None
    assert found.diff.value == pytest.approx(0.35)
    assert found.diff.high - found.diff.low > 0.5
    assert not found.rose


def test_what_was_kept_is_past_its_best_or_not() -> None:
    contracts.write(paths.forgetting(17), Forgetting(17, None, "b" * 64, "c" * 64))
    for kept, expected in ((2.6, True), (2.5, False), (2.52, False)):
        contracts.write(paths.training_summary(17), training(17, kept_loss=kept))
        found = side_effects.read([17], COMPARE)
        assert found.forgetting is None
        assert found.training[0].overfitted is expected
        assert not found.training[0].stopped_early
