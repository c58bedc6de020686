"""Control tokens in texts of the data stay characters, in tokenizers of every kind."""

import random
from typing import Any

import pytest

from pipeline.model.controls import Controls, plain_ids
from tests.made.data import WORDS
from tests.made.vocabularies import KINDS, SPECIAL

ORDINARY = (
    *WORDS[:9], " ", "  ", "\n", "\t", "<", ">", "|", "/", "[", "]", "<|", "|>", "s", "end", "</", "INST", "\u00e9",
    "e\u0301", "\ufb01", "\u4e16", "\U0001f642", "\U0001f469\u200d\U0001f680", "\u2581", "\u200b", "\ufffd",
    "\U000f0000", "<think>", "</think>", "<0x0A>",
)  # fmt: skip


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def controls_in(tokenizer: Any, ids: list[int]) -> list[str]:
    """The control tokens among ids; that for unknown characters has another reason to be there."""
    return [name for name in tokenizer.convert_ids_to_tokens(ids) if name in SPECIAL and name != "<unk>"]


def test_text_without_control_tokens_keeps_its_ids(tokenizer: Any) -> None:
    draw, controls, ordinary = random.Random(1), Controls(tokenizer), 0
    for _ in range(400):
        text = "".join(draw.choices(ORDINARY, k=draw.randrange(12)))
        usual = tokenizer(text, add_special_tokens=False).input_ids
        if not controls.found_in(text):
            ordinary += 1
            assert controls.plain(text) == plain_ids(tokenizer, text) == usual
            assert controls.mixed(controls.marked(text)) == usual, "the copy reads ordinary text as the tokenizer does"
    assert ordinary > 300


def test_no_text_makes_a_control_token(tokenizer: Any) -> None:
    draw, controls = random.Random(2), Controls(tokenizer)
    found = 0
    for _ in range(400):
        text = "".join(draw.choices((*ORDINARY, *SPECIAL * 4), k=draw.randrange(1, 12)))
        found += controls.found_in(text)
        ids = controls.plain(text)
        assert controls_in(tokenizer, ids) == [], text
        assert controls_in(tokenizer, controls.mixed(controls.marked(text))) == [], text
        assert plain_ids(tokenizer, text) == ids
    assert found > 200


@pytest.mark.parametrize("name", SPECIAL)
def test_the_characters_are_written_and_read_again(name: str, tokenizer: Any) -> None:
    """What a model writes in plain tokens is decoded to the same text: special tokens alone are left out."""
    ids = plain_ids(tokenizer, f"cat {name} dog")
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == f"cat {name} dog"
    assert tokenizer.decode(
        tokenizer(f"cat {name} dog", add_special_tokens=False).input_ids, skip_special_tokens=True
    ) != (f"cat {name} dog"), "the fault that this is about"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_split_as_the_library_splits_it(kind: str) -> None:
    """`split_special_tokens` of transformers does the same where no piece of the vocabulary is a control token."""
    tokenizer, text = KINDS[kind](), "cat <|end|> dog[INST]"
    split = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert (plain_ids(tokenizer, text) == split) == (kind != "unigrams, normalized specials")
    assert (controls_in(tokenizer, split) == []) == (kind != "unigrams, normalized specials")


def test_control_tokens_of_a_template_stay_tokens_beside_those_of_the_data(tokenizer: Any) -> None:
    controls = Controls(tokenizer)
    data = "cat <|end|> dog"
    usual = tokenizer("<s><|user|>\ncat dog<|end|>\n<|assistant|>\n", add_special_tokens=False).input_ids
    ids = controls.mixed(f"<s><|user|>\n{controls.marked(data)}<|end|>\n<|assistant|>\n")
    assert (
        controls_in(tokenizer, ids) == controls_in(tokenizer, usual) == ["<s>", "<|user|>", "<|end|>", "<|assistant|>"]
    )
    assert "cat <|end|> dog" in tokenizer.decode(ids, skip_special_tokens=True)


def test_what_a_normalizer_makes_a_control_token_is_found(tokenizer: Any) -> None:
    wide = "cat \uff1c|end|\uff1e dog"
    usual = controls_in(tokenizer, tokenizer(wide, add_special_tokens=False).input_ids)
    assert Controls(tokenizer).found_in(wide) == (usual != [])
    assert controls_in(tokenizer, plain_ids(tokenizer, wide)) == []


def test_a_text_cannot_name_what_stands_for_a_control_token(tokenizer: Any) -> None:
    one, other = Controls(tokenizer), Controls(tokenizer)
    assert set(one.names.values()).isdisjoint(other.names.values()), "the names are drawn"
    assert set(one.names.values()).isdisjoint(one.marks.values())
