"""What an experiment cost, out of what its stages left: the same windows for all seeds, resampled by text."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.core import contracts, params, paths
from pipeline.core.contracts import Forgetting, Probed, Window
from pipeline.core.errors import UserError
from pipeline.score import side_effects
from tests.made.experiment import COMPARE
from tests.made.records import training


def probed(rise: float, places: list[str], name: str = "general", style: str = "plain") -> Probed:
    """Windows of ten tokens each, of which every second rises by a little more."""
    windows = [
        Window(place, 10, base=30.0 + i, tuned=30.0 + i + 10 * rise + i % 2, cross_entropy=29.0 + i % 3, entropy=28.0)
        for i, place in enumerate(places)
    ]
    tokens = 10 * len(windows)
    base, tuned = sum(one.base for one in windows) / tokens, sum(one.tuned for one in windows) / tokens
    losses = (base, tuned, float(np.exp(base)), float(np.exp(tuned)), 2.9, 2.8, 0.1)
    return Probed(name, style, "some", "cpu", 2, tokens, 128, True, len(set(places)), *losses, windows)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(probes: dict[int, list[Probed]], compare: params.Compare = COMPARE) -> list[side_effects.Forgetting]:
    for seed, some in probes.items():
        contracts.write(paths.training_summary(seed), training(seed))
        contracts.write(paths.forgetting(seed), Forgetting(seed, "b" * 64, "c" * 64, some))
    return side_effects.read(list(probes), compare).forgetting


PLACES = [f"text {i // 2}" for i in range(40)]


def test_the_difference_is_over_tokens_and_its_interval_over_texts() -> None:
    (found,) = read({17: [probed(0.3, PLACES)]})
    assert (found.name, found.tokens, found.texts, found.units, found.groups) == ("general", 400, 20, "texts", 20)
    assert found.diff.value == pytest.approx(found.tuned_loss - found.base_loss)
    assert found.diff.value == pytest.approx(0.35)
    # Both windows of a text go together, and each text rises by as much: texts differ by nothing.
    assert [found.diff.low, found.diff.high] == pytest.approx([0.35, 0.35])
    assert found.kl.value == pytest.approx(0.1 + 0.1 * np.mean([i % 3 for i in range(40)]))
    assert found.kl.low < found.kl.value < found.kl.high
    assert found.cross_entropy.value - found.kl.value == pytest.approx(2.8)
    assert found.rose
    assert found.p == found.p_holm
    assert [found] == read({17: [probed(0.3, PLACES)]})


def test_within_one_text_windows_are_resampled() -> None:
    (found,) = read({17: [probed(0.3, ["only"] * 40)]})
    assert (found.units, found.groups) == ("windows of one text", 40)
    assert found.diff.low < found.diff.value < found.diff.high


def test_several_seeds_widen_the_interval() -> None:
    (found,) = read({17: [probed(0.2, PLACES)], 18: [probed(0.4, PLACES)]})
    assert found.diff.value == pytest.approx(0.35)
    assert found.diff.high - found.diff.low > 0.5
    assert not found.rose


def noisy(mean: float, count: int, name: str) -> Probed:
    """Conversations whose losses rise by `mean` nats a token, in the mean, with a spread of one."""
    draws = np.random.default_rng(7).normal(size=count)
    one = probed(0.0, [f"talk {i}" for i in range(count)], name, "chat")
    draws = (draws - draws.mean()) / draws.std()
    rises = zip(one.windows, draws, strict=True)
    return replace(one, windows=[replace(w, tuned=w.base + 10 * (mean + draw)) for w, draw in rises])


def test_what_one_probe_shows_must_hold_for_the_number_of_probes() -> None:
    """A rise that a single probe would show by a little is not shown by one of several."""
    rise = noisy(0.32, 50, "a")
    (alone,) = read({17: [rise]})
    assert 0.02 < alone.p < 0.05
    assert alone.rose
    several = read({17: [rise, noisy(0.0, 50, "b"), noisy(0.0, 50, "c")]})
    assert several[0].p == alone.p
    assert several[0].p_holm == pytest.approx(3 * alone.p)
    assert [one.direction for one in several] == ["none"] * 3
    assert [one.units for one in several] == ["conversations"] * 3
    sure = read({17: [noisy(2.0, 50, "a"), noisy(-2.0, 50, "b"), noisy(0.0, 50, "c")]})
    assert [(one.name, one.direction) for one in sure] == [("a", "higher"), ("b", "lower"), ("c", "none")]


def test_a_probe_of_few_texts_shows_nothing() -> None:
    (found,) = read({17: [probed(5.0, PLACES[:18])]})
    assert (found.groups, found.direction, found.rose) == (9, "few", False)
    (found,) = read({17: [probed(5.0, PLACES[:20])]})
    assert (found.groups, found.direction, found.rose) == (10, "higher", True)


def test_seeds_that_read_different_probes_are_refused() -> None:
    with pytest.raises(UserError, match=r"different probes of forgetting \(\[\['a'\], \['b'\]\]\): run `dvc repro`"):
        read({17: [probed(0.1, PLACES, "a")], 18: [probed(0.1, PLACES, "b")]})


def test_what_was_kept_is_past_its_best_or_not() -> None:
    contracts.write(paths.forgetting(17), Forgetting(17, "b" * 64, "c" * 64, []))
    for kept, expected in ((2.6, True), (2.5, False), (2.52, False)):
        contracts.write(paths.training_summary(17), training(17, kept_loss=kept))
        found = side_effects.read([17], COMPARE)
        assert found.forgetting == []
        assert found.training[0].overfitted is expected
        assert not found.training[0].stopped_early
