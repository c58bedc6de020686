"""Random models in Meta's layout, and what they compute by Meta's own convention."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor

from pipeline.core import params, records

SETTINGS = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1
}  # fmt: skip
WIDTH = 96  # 2/3 of 4 * 32, rounded up to a multiple of 16


def tensors(vocabulary: int) -> dict[str, torch.Tensor]:
    """A random model by Meta's names."""
    draw = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return 0.15 * torch.randn(*shape, generator=draw) + (1.0 if len(shape) == 1 else 0.0)

    made = {
        "tok_embeddings.weight": some(vocabulary, 32),
        "norm.weight": some(32),
        "output.weight": some(vocabulary, 32),
    }
    for i in range(2):
        made |= {
            f"layers.{i}.attention.wq.weight": some(32, 32), f"layers.{i}.attention.wk.weight": some(16, 32),
            f"layers.{i}.attention.wv.weight": some(16, 32), f"layers.{i}.attention.wo.weight": some(32, 32),
            f"layers.{i}.feed_forward.w1.weight": some(WIDTH, 32),
            f"layers.{i}.feed_forward.w2.weight": some(32, WIDTH),
            f"layers.{i}.feed_forward.w3.weight": some(WIDTH, 32), f"layers.{i}.attention_norm.weight": some(32),
            f"layers.{i}.ffn_norm.weight": some(32),
        }  # fmt: skip
    return made


def parts(whole: dict[str, torch.Tensor], ranks: int, by_words: bool = False) -> list[dict[str, torch.Tensor]]:
    """As fairscale's layers split them: `ParallelEmbedding` and `RowParallelLinear` by column, others by row."""

    def dimension(name: str) -> int:
        return 1 if ("tok_embeddings" in name and not by_words) or ".wo." in name or ".w2." in name else 0

    return [
        {
            name: tensor if tensor.dim() == 1 else tensor.chunk(ranks, dimension(name))[rank].clone()
            for name, tensor in whole.items()
        }
        | {"rope.freqs": torch.ones(4)}
        for rank in range(ranks)
    ]


def written(folder: Path, words: Path, ranks: int = 1, by_words: bool = False, **settings: Any) -> dict[str, Any]:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(words.read_bytes())
    (folder / "params.json").write_text(json.dumps(SETTINGS | settings))
    whole = tensors(SentencePieceProcessor(model_file=str(words)).vocab_size())
    for rank, part in enumerate(parts(whole, ranks, by_words)):
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    return whole


def given(folder: Path) -> params.Model:
    return params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32")


def forward(whole: dict[str, torch.Tensor], ids: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """The logits of one sequence as Meta computes them: neighbours of a head are one complex number, turned by place.

    Written from the paper (arXiv 2302.13971) and RoFormer's (2104.09864), for 4 heads of 8 and 2 key/value heads.
    """

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SETTINGS["norm_eps"]) * whole[f"{name}.weight"]

    def turned(x_NxHxD: torch.Tensor) -> torch.Tensor:
        angle_NxF = torch.arange(len(ids))[:, None] * base ** -(torch.arange(0, 8, 2) / 8)
        pairs = torch.view_as_complex(x_NxHxD.reshape(len(ids), -1, 4, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones(()), angle_NxF)[:, None]).reshape(x_NxHxD.shape)

    x = whole["tok_embeddings.weight"][ids]
    future = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for i in range(2):
        h = normed(x, f"layers.{i}.attention_norm")
        q, k, v = (
            (h @ whole[f"layers.{i}.attention.{name}.weight"].T).reshape(len(ids), -1, 8) for name in ("wq", "wk", "wv")
        )
        q, k = turned(q), turned(k)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        weight = (torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(8) + future).softmax(-1)
        x = (
            x
            + torch.einsum("hnm,mhd->nhd", weight, v).reshape(len(ids), 32) @ whole[f"layers.{i}.attention.wo.weight"].T
        )
        h = normed(x, f"layers.{i}.ffn_norm")
        w1, w2, w3 = (whole[f"layers.{i}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return normed(x, "norm") @ whole["output.weight"].T
