"""Small tokenizers of every kind that model families have, with control tokens."""

import json
from collections.abc import Callable
from typing import Any

from tests.made.data import WORDS

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "<unk>")
TEMPLATE = (
    "<s>{% for message in messages %}{{ '<|' + message.role + '|>' }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXTS = [" ".join(WORDS), "a cat, a dog: 12 < 3; </s> <s> <|end|> [INST]"] * 3


def _bytes(**change: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bare = Tokenizer(models.BPE(**change))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False))
    return bare


def _pieces(scheme: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bare = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bare.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(),
                                      decoders.Fuse()])  # fmt: skip
    fallback = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *fallback],
                                  show_progress=False)  # fmt: skip
    bare.train_from_iterator(TEXTS, trainer)
    # Training adds the bytes as special tokens, which no model's tokenizer has.
    content = json.loads(bare.to_str())
    content["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(content))


def _merging() -> Any:
    """As of a GGUF file or of Meta's: control tokens are in the vocabulary, and merges make them out of characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "\u2581")} | {"\n", "|", "\u2581"})
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("<", "s"), ("<s", ">"), ("\u2581", "c"), ("a", "t")]
    vocab = ["<unk>", "<s>", "</s>", *bytes_, *letters, "</", "</s", "<s", "\u2581c", "at"]
    bare = Tokenizer(
        models.BPE({word: at for at, word in enumerate(vocab)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bare.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])  # fmt: skip
    return bare


def _unigram() -> Any:
    """Control tokens are its likeliest pieces, and what looks like them becomes them by the normalizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = sorted({letter for text in (*TEXTS, *SPECIAL) for letter in text} | {"\n", "\u2581"})
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<|end|>", 0.0), ("cat", -3.0)]
    bare = Tokenizer(models.Unigram([*vocab, *((letter, -8.0) for letter in letters)], 0, byte_fallback=False))
    bare.normalizer = normalizers.NFKC()
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bare.decoder = decoders.Metaspace(prepend_scheme="always")
    return bare


def _tokenizer(bare: Any, **flags: bool) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    made.add_special_tokens(
        {"extra_special_tokens": [AddedToken(name, special=True, **flags) for name in SPECIAL if name not in
                                  ("<s>", "</s>", "<unk>")]}
    )  # fmt: skip
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    return made


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: _tokenizer(_bytes(), normalized=False),
    "bytes, whole words": lambda: _tokenizer(_bytes(ignore_merges=True), normalized=False),
    "bytes, normalized specials": lambda: _tokenizer(_bytes(), normalized=True),
    "pieces, a space first": lambda: _tokenizer(_pieces("first"), normalized=False),
    "pieces, a space always": lambda: _tokenizer(_pieces("always"), normalized=False),
    "pieces, specials that take spaces": lambda: _tokenizer(
        _pieces("always"), normalized=False, rstrip=True, lstrip=True
    ),
    "merges that make specials": lambda: _tokenizer(_merging(), normalized=False),
    "unigrams, normalized specials": lambda: _tokenizer(_unigram(), normalized=True),
}
