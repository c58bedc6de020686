"""Control tokens, such as `<|im_end|>` or `</s>`, in texts of the data: they stay the characters that they are.

A tokenizer takes their names for the tokens wherever it reads them. So text of the data is read by a copy of the
tokenizer whose control tokens have other names, drawn at random and made of private-use characters. Nothing in a text
is a control token of this copy, and no merge of its vocabulary makes one. All other ids are the same.

A control token is an added token that is marked as special. Qwen's `<think>` is added and not special: it is a word of
the vocabulary, which decoding keeps, so it stays one token. Texts without control tokens are encoded as ever, without
the copy.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

from pipeline.core.errors import UserError

PRIVATE = 0xF0000
"""The first of 65,534 private-use characters, of which names are made."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text of the data, without BOS. Control tokens in it are encoded as their characters."""
    return _of(tokenizer).plain(text)


@lru_cache(maxsize=1)
def _of(tokenizer: Any) -> "Controls":
    return Controls(tokenizer)


class Controls:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = {at: one for at, one in added.items() if one.special and one.content and not _BYTE.match(one.content)}
        here, there = _drawn(), _drawn()
        # `names` stand for control tokens of a template, `marks` for the same characters in the data.
        self.names = {one.content: here + chr(PRIVATE + n) for n, one in enumerate(special.values())}
        self.marks = {one.content: there + chr(PRIVATE + n) for n, one in enumerate(special.values())}
        self._ids = {one.content: at for at, one in added.items()}
        self._raw, self._marked = _any_of(self.names), _any_of(self.marks.values())
        self._text_of = {mark: content for content, mark in self.marks.items()}
        # A token that is marked as normalized is looked for in the normalized text.
        self._normalizer: Any = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        self._normalized: re.Pattern[str] | None = None
        if self._normalizer and (some := [one.content for one in special.values() if one.normalized]):
            self._normalized = _any_of(name for name in map(self._normalizer.normalize_str, some) if name)

    def found_in(self, text: str) -> bool:
        """Whether a text holds what the tokenizer would take for a control token."""
        if self._raw.search(text):
            return True
        return self._normalized is not None and bool(self._normalized.search(self._normalizer.normalize_str(text)))

    def plain(self, text: str) -> list[int]:
        """The token ids of a text, without BOS and without a control token."""
        if self.found_in(text):
            return self._encode(text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def marked(self, text: str) -> str:
        """A text of the data with marks for the control tokens in it: a template is filled with it, for `mixed`."""
        return self._raw.sub(lambda found: self.marks[found[0]], text)

    def mixed(self, text: str) -> list[int]:
        """The token ids of a text in which control tokens are tokens, and marks are the characters that they stand
        for."""
        named = self._raw.sub(lambda found: self.names[found[0]], text)
        return self._encode(self._marked.sub(lambda found: self._text_of[found[0]], named))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._copy.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _copy(self) -> Any:
        """The tokenizer with other names for its control tokens. UserError if they cannot be renamed."""
        from tokenizers import Tokenizer

        refusal = UserError(
            "the data holds the name of a control token, which this model's tokenizer cannot tell from the token: "
            "take another model, or remove the name from the data"
        )
        if not self.tokenizer.is_fast:
            raise refusal
        try:
            made = Tokenizer.from_str(json.dumps(_renamed(self.tokenizer.backend_tokenizer.to_str(), self.names)))
        except Exception:  # what the library raises has no class of its own
            raise refusal from None
        if any(made.token_to_id(self.names.get(content, content)) != at for content, at in self._ids.items()):
            raise refusal
        return made


def _drawn() -> str:
    """Private-use characters that no text has but by a chance of 2 to the power of 127."""
    return "".join(chr(PRIVATE + secrets.randbelow(65534)) for _ in range(8))


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern of these texts; where several match, the longest one."""
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def _renamed(tokenizer: str, names: Mapping[str, str]) -> dict[str, Any]:
    """The content of a tokenizer.json with other names for some tokens, and without merges that make them."""
    content: dict[str, Any] = json.loads(tokenizer)
    content |= {"truncation": None, "padding": None, "post_processor": None, "decoder": None}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"]) if token["special"] else token["content"]
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): at for word, at in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if names.keys().isdisjoint((a, b, a + b))]
    return content
