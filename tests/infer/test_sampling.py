"""Drawn answers follow the model's probabilities, depend on nothing but their seed, and are scored as a mean."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from pipeline.core import contracts, params, paths, records
from pipeline.core.params import Sampling
from pipeline.core.records import Prediction
from pipeline.infer import infer, sampling
from pipeline.score import evaluate, metrics
from tests.made.experiment import EVALUATE, scores_of

DRAWING = Sampling(samples=3, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=17)


def drawn(
    project: params.Params, variant: str = "base", drawing: Sampling = DRAWING, **changes: Any
) -> list[Prediction]:
    generation = project.generation.model_copy(update={"sampling": drawing, **changes})
    infer.decode(variant, project.prompt, generation, project.runtime)
    return records.read_rows(paths.predictions(variant), Prediction)


def answers(rows: list[Prediction]) -> list[list[str]]:
    return [row.texts for row in rows]


@pytest.mark.parametrize(
    "change", [{}, {"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.6}]
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers(change: dict[str, Any]) -> None:
    drawing = DRAWING.model_copy(update=change)
    scores = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.5, 2.5, -9.0]])
    config = GenerationConfig(do_sample=True, **drawing.model_dump(exclude={"samples", "seed"}))
    expected = scores
    for warper in _of_transformers(config):
        expected = warper(None, expected)
    grid = (np.arange(20_000) + 0.5) / 20_000
    found = Counter(sampling.drawn(sampling.warpers(drawing)(None, scores).expand(len(grid), -1), list(grid)))
    shares = [found[token] / len(grid) for token in range(scores.shape[1])]
    assert shares == pytest.approx(torch.softmax(expected, -1)[0].tolist(), abs=1e-4)
    assert drawing.top_k == 0 or len(found) <= drawing.top_k


def _of_transformers(config: GenerationConfig) -> Any:
    """The warpers that `generate` makes of a configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(small)._get_logits_processor(config)


def test_the_ends_of_the_line_are_tokens_that_can_be_drawn() -> None:
    scores = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    assert sampling.drawn(scores.expand(2, -1), [0.0, 1 - 2**-53]) == [1, 2]


def test_draws_depend_on_seed_and_answer_alone() -> None:
    first = [next(sampling.draws("0 a", 17)) for _ in range(2)]
    assert first[0] == first[1]
    others = [next(sampling.draws(label, seed)) for label, seed in (("1 a", 17), ("0 b", 17), ("0 a", 18))]
    assert len({first[0], *others}) == 4
    many = list(itertools.islice(sampling.draws("0 a", 17), 10_000))
    assert 0 <= min(many) < max(many) < 1
    assert np.mean(many) == pytest.approx(0.5, abs=0.02)


def test_ids_with_spaces_are_told_from_numbers() -> None:
    assert [sampling.example(one, DRAWING) for one in sampling.labels("a b 1", DRAWING)] == [
        ("a b 1", 0), ("a b 1", 1), ("a b 1", 2),
    ]  # fmt: skip
    assert sampling.labels("a b", None) == ["a b"]
    assert sampling.example("2 a", None) == ("2 a", 0)


def test_each_prompt_gets_its_answers_whatever_the_batch(quantized: params.Params) -> None:
    rows = drawn(quantized)
    assert [row.id for row in rows] == [row.id for row in records.read_rows(paths.split("test"), records.Example)]
    assert all(len(row.texts) == len(row.finishes) == 3 for row in rows)
    assert any(len(set(row.texts)) > 1 for row in rows)
    for size in (1, 5, 64):
        assert answers(drawn(quantized, batch_size=size)) == answers(rows)
    assert answers(drawn(quantized, drawing=DRAWING.model_copy(update={"seed": 18}))) != answers(rows)
    made = records.read_json(paths.decoding("base"))["generation"]
    assert (made["do_sample"], made["temperature"]) == (True, 1.5)
    assert made["sampling"]["samples"] == 3


def test_base_and_tuned_have_the_same_draws(quantized: params.Params) -> None:
    assert answers(drawn(quantized)) == answers(drawn(quantized, "tuned-17"))  # without an adapter the same model


def test_the_coldest_draw_is_greedy(quantized: params.Params) -> None:
    infer.decode("base", quantized.prompt, quantized.generation, quantized.runtime)
    greedy = records.read_rows(paths.predictions("base"), Prediction)
    assert '"more"' not in paths.predictions("base").read_text()
    cold = drawn(quantized, drawing=DRAWING.model_copy(update={"temperature": 1e-6}))
    assert answers(cold) == [[row.text] * 3 for row in greedy]


def test_a_row_scores_the_mean_over_its_answers(quantized: params.Params) -> None:
    rows = drawn(quantized)
    settings = EVALUATE.model_copy(update={"metrics": ["rouge1", "bleu"]})
    evaluate.score_variant("base", settings)
    found = scores_of("base")
    references = [row.references for row in records.read_rows(paths.split("test"), records.Example)]
    rouge, bleu = metrics.chosen(settings)
    each = [rouge.statistics(list(some), references)[:, 0] for some in zip(*answers(rows), strict=True)]
    assert [row.scores["rouge1"] for row in found.examples] == pytest.approx(np.mean(each, axis=0))
    assert found.corpus["rouge1"] == pytest.approx(np.mean(each))
    assert found.samples == 3
    assert found.samples_sd["rouge1"] == pytest.approx(np.std([one.mean() for one in each], ddof=1))
    assert np.shape(found.statistics["bleu"]) == (len(rows), bleu.width)
    capped = [one for row in rows for one in row.finishes].count("length")
    assert found.stopped_by_cap == pytest.approx(capped / (3 * len(rows)))
    assert contracts.read(paths.scores("base"), contracts.Scores) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_beams": 2}, "sampling draws each token, and num_beams = 2 searches"),
        ({"backend": "llama.cpp"}, "sampling: backend 'llama.cpp' can only decode greedily"),
        ({"backend": "vllm"}, "sampling: backend 'vllm' can only decode greedily"),
    ],
)
def test_what_cannot_draw_is_refused(changes: dict[str, Any], said: str, project: params.Params) -> None:
    content = project.generation.model_dump() | {"sampling": DRAWING.model_dump()} | changes
    with pytest.raises(ValueError, match=said):
        params.Generation.model_validate(content)
