"""Windows of text begin as the model's texts begin, and many texts come before much of one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from transformers import AutoTokenizer

from pipeline.model import windows
from pipeline.model.windows import Text, Tokens


class Letters:
    """A tokenizer of one token a letter."""

    bos_token_id: int | None = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    is_fast = False

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        assert verbose == add_special_tokens
        begin = [self.bos_token_id] if self.bos_token_id is not None and add_special_tokens else []
        return SimpleNamespace(input_ids=[*begin, *map(ord, text)])


def cut(tokenizer: Any, texts: list[str], tokens: int, length: int) -> list[str]:
    found = windows.cut(tokenizer, [Text(text[:1], text) for text in texts], tokens, length)
    return ["".join(map(chr, window.ids)) for window in found]


def test_every_text_gives_a_window_before_any_gives_a_second() -> None:
    texts = ["abcdefghij", "ABCD", "1"]
    assert cut(Letters(), texts, 100, 4) == ["abcd", "ABCD", "efgh", "ij"]
    assert cut(Letters(), texts, 7, 4) == ["abcd", "ABCD", "ef"]
    assert cut(Letters(), texts, 3, 4) == ["abcd"]


def test_a_bos_stands_before_every_window_where_the_model_knows_one() -> None:
    tokenizer = Letters()
    tokenizer.bos_token_id = ord("^")
    assert cut(tokenizer, ["abcdefghij", "ABCD", "1"], 100, 4) == ["^abc", "^ABC", "^1", "^def", "^D", "^ghi", "^j"]


def test_a_window_is_what_the_tokenizer_makes_of_a_text(tiny_model: Path) -> None:
    """In ordinary text; the name of a control token stays the characters that it has."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (found,) = windows.cut(tokenizer, [Text("a", "red cat runs")], 100, 50)
    assert found == Tokens("a", tokenizer("red cat runs").input_ids)
    (found,) = windows.cut(tokenizer, [Text("a", "red <|end|> cat")], 100, 50)
    assert tokenizer.eos_token_id not in found.ids
    assert tokenizer.decode(found.ids) == "red <|end|> cat"


def test_a_text_without_a_token_to_predict_gives_no_window() -> None:
    assert cut(Letters(), ["a", "", "bc"], 100, 4) == ["bc"]
