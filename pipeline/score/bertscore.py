"""BERTScore (Zhang et al. 2020, arXiv 1904.09675, section 3): tokens of two texts, matched by their embeddings.

The embeddings are those of one layer of an encoder that the user has as a folder. Precision is the mean, over the
tokens of the output, of the greatest cosine to a token of the reference; recall is the same the other way round; the
score is their F1. There are neither weights by rarity nor a rescaling, as in the package `bert-score` by default, whose
values it has. It is computed on the CPU with one thread, so that the number of cores changes nothing.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pipeline.core import params
from pipeline.core.errors import UserError

BATCH = 32
"""Texts that are embedded at once, of similar length."""


def f1(pairs: Sequence[tuple[str, str]], checkpoint: params.Bertscore) -> list[float]:
    """The F1 of each pair of an output and a reference, about [-1, 1]; 0 if one of them has no token.

    A text is cut at the most tokens that the encoder takes.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        embedded = _embedded(
            sorted({text for pair in pairs for text in pair}, key=lambda one: (len(one), one)), checkpoint
        )
        return [_matched(embedded[one], embedded[other]) for one, other in pairs]
    finally:
        torch.set_num_threads(threads)


def _embedded(texts: Sequence[str], checkpoint: params.Bertscore) -> dict[str, tuple[Any, Any]]:
    """For each text the embeddings of its t tokens, txd, each of length 1, and which are no special tokens, t."""
    import torch

    tokenizer, model = _loaded(checkpoint)
    found = {}
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        made = tokenizer(batch, padding=True, truncation=True, return_tensors="pt", return_special_tokens_mask=True)
        special = made.pop("special_tokens_mask").bool()
        with torch.inference_mode():
            states = model(**made, output_hidden_states=True).hidden_states[checkpoint.layer].float()
        states = torch.nn.functional.normalize(states, dim=-1)
        for row, text in enumerate(batch):
            held = made["attention_mask"][row].bool()
            found[text] = states[row][held], ~special[row][held]
    return found


def _matched(output: tuple[Any, Any], reference: tuple[Any, Any]) -> float:
    """The F1 of two texts. Special tokens can be matched with, but are not counted, as in `bert-score`."""
    (own, counts), (other, others) = output, reference
    if not counts.any() or not others.any():
        return 0.0
    cosines = own @ other.T
    precision = float(cosines.max(dim=1).values[counts].double().mean())
    recall = float(cosines.max(dim=0).values[others].double().mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@lru_cache(maxsize=1)
def _loaded(checkpoint: params.Bertscore) -> tuple[Any, Any]:
    """Tokenizer and encoder. UserError if the folder is not as the parameters say, or the encoder has no such layer."""
    from transformers import AutoModel, AutoTokenizer

    params.require_encoder(checkpoint)
    folder = checkpoint.folder
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="float32"
    )
    layers = model.config.num_hidden_layers
    if checkpoint.layer > layers:
        raise UserError(f"evaluate.bertscore.layer = {checkpoint.layer}, but the encoder has {layers} layers")
    longest = model.config.max_position_embeddings
    if tokenizer.model_max_length > longest:
        tokenizer.model_max_length = longest
    return tokenizer, model.eval()
