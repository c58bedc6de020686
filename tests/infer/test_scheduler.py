"""The scheduler writes what one prompt alone gets, and computes nothing twice or for nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pipeline.infer import scheduler
from pipeline.model import attention

STOPS = [7, 30, 61, 83, 111, 140, 170, 200, 222, 250]
VOCABULARY = 261


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A random Llama with a head of its own: with tied embeddings a random model repeats its last token for ever."""
    settings = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=False,
        attn_implementation=attention.NAME,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: torch.nn.Module = LlamaForCausalLM(settings)
        for parameter in made.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def config(**changes: Any) -> GenerationConfig:
    settings = {
        "max_new_tokens": 24, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
        "eos_token_id": STOPS, "pad_token_id": 1, "use_cache": True,
    }  # fmt: skip
    return GenerationConfig(**settings | changes)


def families(before: int = 0) -> list[scheduler.Family]:
    """Prompts of 1 to 60 tokens in families of 1 to 5 that share nothing, something, or all but the last token.

    `before` tokens stand before all of them alike.
    """
    generator = torch.Generator().manual_seed(3)
    common = torch.randint(5, VOCABULARY, (before,), generator=torch.Generator().manual_seed(4)).tolist()

    def draw(length: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()

    made = []
    for number, (size, shared, rest) in enumerate(
        [(3, 40, 12), (1, 0, 60), (5, 9, 3), (2, 0, 20), (1, 0, 1), (4, 30, 1)]
    ):
        prefix = common + draw(shared)
        made.append([scheduler.Request(f"{number}/{n}", prefix + draw(rest + n * (rest > 1))) for n in range(size)])
    return made


def one_by_one(model: Any, config: GenerationConfig, before: int = 0) -> dict[str, list[int]]:
    """The definition: each prompt alone through transformers."""
    answers = {}
    for request in (request for family in families(before) for request in family):
        ids = torch.tensor([request.prompt])
        mask = torch.ones_like(ids)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers[request.name] = output[0, len(request.prompt) :].tolist()
    return answers


def scheduled(
    model: Any, config: GenerationConfig, rows: int, tokens: int = 100_000, before: int = 0
) -> dict[str, list[int]]:
    return {request.name: request.new for request in scheduler.decode(model, config, families(before), rows, tokens)}


@pytest.mark.parametrize(
    ("rows", "tokens"), [(1, 10_000), (2, 10_000), (3, 10_000), (7, 10_000), (64, 10_000), (64, 300), (64, 1)]
)
def test_every_prompt_gets_what_it_gets_alone(model: Any, rows: int, tokens: int) -> None:
    expected = one_by_one(model, config())
    lengths = {len(answer) for answer in expected.values()}
    assert len(lengths) > 5  # they end at different steps, so slots are left and taken over
    assert scheduled(model, config(), rows, tokens) == expected


def test_penalties_act_as_on_a_prompt_alone(model: Any) -> None:
    plain = one_by_one(model, config(eos_token_id=[1]))
    for changes in ({"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        settings = config(eos_token_id=[1], **changes)
        expected = one_by_one(model, settings)
        assert expected != plain
        assert scheduled(model, settings, 5) == expected


@pytest.fixture
def forwards(model: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Rows and width of each pass through the model's first layer."""
    seen: list[tuple[int, int]] = []
    layer = model.get_submodule("model.layers.0")
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape[:2])))
    yield seen
    handle.remove()


def test_a_finished_sequence_is_computed_no_further(model: Any, forwards: list[tuple[int, int]]) -> None:
    answers = scheduled(model, config(), 4)
    steps = [rows for rows, width in forwards if width == 1]
    # One row of one step for each new token; prefill passes of width 1 add none here.
    assert sum(steps) == sum(map(len, answers.values()))
    assert max(steps) == 4


def test_a_shared_beginning_is_computed_once(model: Any, forwards: list[tuple[int, int]]) -> None:
    prefix = list(range(20, 60))
    family = [scheduler.Request(str(n), [*prefix, 70 + n, 80, 81]) for n in range(4)]
    list(scheduler.decode(model, config(max_new_tokens=1), [family], 8, 10_000))
    assert forwards == [(1, 40), (4, 2), (4, 1)]


@pytest.mark.parametrize(("rows", "tokens"), [(1, 10_000), (3, 10_000), (7, 10_000), (64, 10_000), (64, 300)])
def test_a_beginning_of_all_prompts_is_held_once_and_changes_no_answer(
    model: Any, rows: int, tokens: int, forwards: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "COMMON", 32)
    expected = one_by_one(model, config(), before=50)
    forwards.clear()
    lengths: list[int] = []
    attend = attention._attend_behind

    def noted(beginning: Any, *rest: Any) -> torch.Tensor:
        lengths.append(beginning[0].shape[1])
        return attend(beginning, *rest)

    monkeypatch.setattr(attention, "_attend_behind", noted)
    assert scheduled(model, config(), rows, tokens, before=50) == expected
    assert forwards[0] == (1, 50)
    assert all(width <= 60 for _, width in forwards[1:])
    assert set(lengths) == {50}
    assert len(lengths) == 3 * (len(forwards) - 1)  # layers


def test_a_beginning_of_all_prompts_takes_no_room_of_the_slots(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "COMMON", 32)
    columns: list[int] = []
    original = scheduler.Slots.__init__

    def noted(self: scheduler.Slots, rows: int, width: int) -> None:
        columns.append(width)
        original(self, rows, width)

    monkeypatch.setattr(scheduler.Slots, "__init__", noted)
    assert len(scheduled(model, config(), 4, before=200)) == 16
    assert max(columns[2:]) == 96  # 60 tokens of the longest prompt behind the beginning, 24 new ones, whole vectors


def test_memory_is_bounded_by_the_tokens_and_used_for_more_rows_once_prompts_are_short(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    original = scheduler.Slots.__init__

    def noted(self: scheduler.Slots, rows: int, columns: int) -> None:
        sizes.append((rows, columns))
        original(self, rows, columns)

    monkeypatch.setattr(scheduler.Slots, "__init__", noted)
    assert len(scheduled(model, config(), 64, 400)) == 16
    sizes = sizes[1:]
    assert len(sizes) > 1
    assert all(rows * columns <= 400 for rows, columns in sizes)
    assert [rows for rows, _ in sizes] == sorted({rows for rows, _ in sizes})


def test_the_cache_does_not_grow_with_the_number_of_prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = scheduler.Slots.__init__

    def noted(self: scheduler.Slots, rows: int, columns: int) -> None:
        sizes.append(rows * columns)
        original(self, rows, columns)

    monkeypatch.setattr(scheduler.Slots, "__init__", noted)

    def many(count: int) -> list[scheduler.Family]:
        return [[scheduler.Request(str(n), [20 + n % 50, 21, 22])] for n in range(count)]

    assert len(list(scheduler.decode(model, config(), many(8), 8, 10_000))) == 8
    few = max(sizes)
    sizes.clear()
    assert len(list(scheduler.decode(model, config(), many(40), 8, 10_000))) == 40
    assert max(sizes) == few
