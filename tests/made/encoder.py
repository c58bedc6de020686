"""A tiny BERT with random weights that are the same everywhere."""

from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

TEXT = "the a cat dog sat ran on in mat park red big old it was fast and slow ."
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def encoder(folder: Path, positions: int = 12) -> Path:
    """Write a BERT of 3 layers that takes `positions` tokens into a new folder."""
    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{one}" for one in "abcdefghijklmnopqrstuvwxyz")]
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS + letters) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=positions).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS + letters), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=positions,
    )  # fmt: skip
    model = BertModel(config)
    draw = np.random.default_rng(7)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = torch.from_numpy(draw.normal(size=tuple(weight.shape)))
            weight.copy_(torch.ones_like(drawn) if name.endswith("LayerNorm.weight") else drawn * _scale(name))
    model.save_pretrained(folder)
    return folder


def _scale(name: str) -> float:
    """Words differ much, positions little, and layers mix them."""
    return 2.0 if "word_embeddings" in name else 0.2
