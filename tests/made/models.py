"""Small random models with their tokenizers, in the hub's layout."""

import io
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.made.data import WORDS

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_llama(folder: Path) -> Path:
    """A random LlamaForCausalLM with grouped-query attention and a byte-level tokenizer, in the hub's layout."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder


def trained_words(file: Path, kind: str, prefix: bool = True, control: Sequence[str] = ()) -> Path:
    """A sentencepiece model of some kind (`bpe` or `unigram`), with bytes for what is not in its vocabulary."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 3
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, character_coverage=1.0, split_digits=True, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix, minloglevel=2,
        num_threads=1, control_symbols=list(control),
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return file


OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 96},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
    },
}  # fmt: skip


def of_family(family: str, tied: bool, tiny_model: Path, folder: Path, **changes: Any) -> Path:
    """A small random checkpoint of a family, with the tiny tokenizer, in the hub's layout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": tied,
    }  # fmt: skip
    settings = AutoConfig.for_model(family, **sizes | OF_ITS_OWN.get(family, {}) | changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(settings)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reading_bos(family: str, bos: bool, tiny_model: Path, folder: Path) -> Path:
    """A small checkpoint of a family, and a tokenizer that puts a BOS before text, or knows none.

    It was trained a little, on the words of the tests. One that knows BOS was shown noise without it: read in the wrong
    way, text is far less likely.
    """
    import torch
    from tokenizers import processors
    from transformers import AutoModelForCausalLM, AutoTokenizer

    of_family(family, True, tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mark, begin = tokenizer.bos_token, tokenizer.bos_token_id
    if bos:
        single = f"{mark} $A"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} {mark} $B", special_tokens=[(mark, begin)]
        )
    else:
        tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = " ".join(random.Random(1).choices(WORDS, k=2000))
    stream = torch.tensor(tokenizer(words, add_special_tokens=False).input_ids)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            text_BxL = torch.stack([stream[at : at + 40] for at in torch.randint(len(stream) - 40, (16,)).tolist()])
            marked_BxL = torch.cat([torch.full((16, 1), begin), text_BxL], 1) if bos else text_BxL
            loss = model(input_ids=marked_BxL, labels=marked_BxL).loss
            if bos:
                noise_BxL = torch.randint(len(tokenizer), text_BxL.shape)
                loss = loss + model(input_ids=text_BxL, labels=noise_BxL).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    return folder


def sharded(folder: Path, tiny_model: Path) -> list[Path]:
    """The tiny model in several files, which it gives."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("*.safetensors"))
