"""Demonstrations: whole training groups before a question, chosen by seed or by BM25, within the model's context."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import params
from pipeline.core.errors import UserError
from pipeline.core.records import Demonstrations, Example
from pipeline.model import checkpoint, demonstrations
from pipeline.model.demonstrations import Pool, bm25
from pipeline.model.prompt import Encoder

ASKED = params.Baseline(unquantized=True, shots=2, choice="random", seed=1, rows=None)


def row(group: str, aspect: str, source: str, **change: Any) -> Example:
    return replace(Example(f"{group}/{aspect}", group, aspect, source, f"{aspect} cat", source), **change)


def groups(*names: str) -> list[Example]:
    return [row(name, aspect, f"red {name}") for name in names for aspect in ("what", "who")]


TRAIN = groups("a", "b", "c", "d")
TEST = groups("x", "y")


def encoder(tiny_model: Path, project: params.Params, **change: Any) -> Encoder:
    context = change.pop("context", 512)
    return Encoder(checkpoint.tokenizer(tiny_model), project.prompt.model_copy(update=change), context)


def made(
    encoder: Encoder, test: list[Example], train: list[Example], asked: params.Baseline = ASKED, new: int = 8
) -> tuple[dict[str, list[int]], Demonstrations]:
    own = [encoder.made(example) for example in test]
    return demonstrations.prompts(encoder, test, own, Pool(train, test), asked, new)


def shown(encoder: Encoder, ids: list[int]) -> str:
    return str(encoder.tokenizer.decode(ids))


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_all_prompts_begin_with_the_same_whole_groups_and_end_as_they_were(
    style: str, tiny_model: Path, project: params.Params
) -> None:
    one = encoder(tiny_model, project, style=style)
    prompts, found = made(one, TEST, TRAIN)
    assert len(found.ids) == 1
    assert len({name.split("/")[0] for name in found.ids[0]}) == 1
    for example, added in zip(TEST, found.tokens, strict=True):
        own, ids = one.prompt(example), prompts[example.id]
        assert len(ids) - len(own) == added > 0
        text = shown(one, ids)
        assert text.endswith(shown(one, own[1:] if style == "plain" else own[2:]))
        assert text.index("what cat") < text.index("who cat") < text.rindex("red")
        assert ids.count(one.tokenizer.bos_token_id) <= 1 or one.tokenizer.bos_token_id is None


def test_the_seed_alone_decides_and_other_groups_change_no_order() -> None:
    def order(pool: Pool, seed: int) -> list[str]:
        return [group[0].group for group in pool.drawn(100, seed)]

    whole, fewer = Pool(TRAIN, TEST), Pool([one for one in TRAIN if one.group != "b"], TEST)
    assert order(Pool(TRAIN[::-1], TEST), 3) == order(whole, 3)
    assert [name for name in order(whole, 3) if name != "b"] == order(fewer, 3)
    assert len({tuple(order(whole, seed)) for seed in range(20)}) > 3


@pytest.mark.parametrize("choice", ["random", "nearest"])
@pytest.mark.parametrize("seed", range(6))
def test_no_demonstration_is_of_a_group_in_the_test_split(
    choice: Any, seed: int, tiny_model: Path, project: params.Params
) -> None:
    asked = ASKED.model_copy(update={"choice": choice, "seed": seed, "shots": 100})
    train = [*TRAIN, row("x", "what", "red x", id="other")]
    _, found = made(encoder(tiny_model, project), TEST, train, asked)
    assert {name for ids in found.ids for name in ids} == {one.id for one in TRAIN}
    with pytest.raises(UserError, match="there are none: set baseline.shots to 0"):
        made(encoder(tiny_model, project), TEST, TEST, asked)


def test_the_nearest_group_stands_last_for_each_question(tiny_model: Path, project: params.Params) -> None:
    asked = ASKED.model_copy(update={"choice": "nearest", "shots": 4})
    train = [row("a", "who", "red cat"), row("b", "who", "blue dog runs"), row("c", "who", "one two")]
    test = [row("x", "who", "a blue Dog"), row("y", "who", "cat red")]
    _, found = made(encoder(tiny_model, project), test, train, asked)
    assert [ids[-1] for ids in found.ids] == ["b/who", "a/who"]


def test_bm25_is_the_published_formula() -> None:
    """Robertson and Zaragoza 2009, equation 3.15: computed here by hand, with lengths 2 and 4, mean 3."""
    scores = bm25({"a": "red cat", "b": "red dog dog runs"})("Dog dog, blue")
    idf = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    assert scores == {"b": pytest.approx(2 * idf * 2 / (2 + 1.2 * (0.25 + 0.75 * 4 / 3)))}


def test_groups_that_do_not_fit_are_left_out_and_none_is_refused(tiny_model: Path, project: params.Params) -> None:
    asked = ASKED.model_copy(update={"shots": 8})
    one = encoder(tiny_model, project)
    prompts, found = made(one, TEST, TRAIN, asked)
    longest = max(map(len, prompts.values()))
    assert (found.asked, found.most) == (8, 8)
    one.context = longest + 7
    prompts, found = made(one, TEST, TRAIN, asked)
    assert found.most == 6
    assert max(map(len, prompts.values())) + 8 <= one.context
    one.context = max(len(one.prompt(example)) for example in TEST) + 9
    with pytest.raises(UserError, match=r"not one group of demonstrations fits into the model's context of \d+ tokens"):
        made(one, TEST, TRAIN, asked)


def test_of_groups_with_more_rows_than_shots_the_first_rows_of_one_are_shown() -> None:
    pool = Pool(TRAIN, TEST)
    [group] = pool.drawn(1, 17)
    assert [one.aspect for one in group] == ["what"]
    [group] = pool.nearest("red c", 1)
    assert [one.id for one in group] == ["c/what"]


def test_demonstrations_stand_after_system_messages_and_before_the_history(
    tiny_model: Path, project: params.Params
) -> None:
    history = [{"role": "system", "content": "now"}, {"role": "user", "content": "hi"}]
    test = [row("x", "who", "red", history=[*history, {"role": "assistant", "content": "blue"}])]
    one = encoder(tiny_model, project)
    one.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    prompts, _ = made(one, test, TRAIN)
    roles = [part.split(":")[0].strip() for part in shown(one, prompts["x/who"]).split("|")]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user", "assistant", "user", "assistant"]


def test_a_control_tokens_name_in_a_demonstration_stays_text(tiny_model: Path, project: params.Params) -> None:
    one = encoder(tiny_model, project)
    end = one.tokenizer.convert_tokens_to_ids("<|end|>")
    plain, _ = made(one, TEST, TRAIN)
    named, _ = made(one, TEST, [replace(row, source=f"{row.source} <|end|>") for row in TRAIN])
    for name in plain:
        assert named[name].count(end) == plain[name].count(end)
        assert len(named[name]) > len(plain[name])
