"""Meta's layout: what is fetched from it computes what Meta's own convention does, and whatever is odd is refused."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.fetch import fetch
from pipeline.fetch import meta_layout as meta
from tests.conftest import soon, trained_words

SETTINGS = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1
}  # fmt: skip
WIDTH = 96  # 2/3 of 4 * 32, rounded up to a multiple of 16
TEXTS = ["red cat runs", "  two  spaces", "Grüße, 世界 🙂", "didn't", "12 345\n\tx"]


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


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(("ranks", "by_words"), [(1, False), (2, False), (2, True)])
def test_what_is_fetched_computes_what_meta_computes(ranks: int, by_words: bool, words: Path, tmp_path: Path) -> None:
    whole = written(tmp_path / "m", words, ranks, by_words)
    listed(tmp_path / "m")
    fetch.fetch(given(tmp_path / "m"))
    loaded = AutoModelForCausalLM.from_pretrained(paths.BASE)
    ids = torch.tensor([1, 40, 41, 200, 7, 40, 250, 99, 13, 5])
    torch.testing.assert_close(loaded(ids[None]).logits[0], forward(whole, ids), rtol=1e-4, atol=1e-4)
    own, tokenizer = SentencePieceProcessor(model_file=str(words)), AutoTokenizer.from_pretrained(paths.BASE)
    for text in TEXTS:
        assert tokenizer(text).input_ids == [own.bos_id(), *own.encode(text)]
        assert tokenizer.decode(own.encode(text)) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    facts = records.read_json(paths.BASE_FACTS)
    assert (facts["context"], facts["stop_ids"], facts["tied_embeddings"]) == (4096, [2], False)


@pytest.mark.usefixtures("project")
def test_a_model_of_transformers_comes_back_bit_by_bit(words: Path, tmp_path: Path) -> None:
    """Written to Meta's layout by the inverse of the permutation, with Code Llama's base of the rotation."""
    written(tmp_path / "m", words, rope_theta=1e6)
    config = LlamaConfig(
        vocab_size=SentencePieceProcessor(model_file=str(words)).vocab_size(), hidden_size=32, intermediate_size=WIDTH,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = LlamaForCausalLM(config).eval()
    names = {f"{theirs}.": f"{ours}." for theirs, ours in (meta.NAMES | meta.OUTSIDE).items()}
    state = model.state_dict()
    whole = {}
    for key in tensors(config.vocab_size):
        ours = next(key.replace(old, new) for old, new in names.items() if f".{old}" in key or key.startswith(old))
        tensor = state[ours.replace("layers.", "model.layers.") if ours.startswith("layers.") else ours]
        if heads := {"wq": 4, "wk": 2}.get(key.split(".")[-2]):
            tensor = tensor.reshape(heads, 2, 4, 32).transpose(1, 2).reshape(-1, 32)
        whole[key] = tensor
    for rank, part in enumerate(parts(whole, 2)):
        torch.save(part, tmp_path / "m" / f"consolidated.{rank:02}.pth")
    fetch.fetch(given(tmp_path / "m"))
    ids = torch.tensor([[1, 40, 41, 200, 7]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(paths.BASE)(ids).logits, model(ids).logits)
    assert records.read_json(paths.BASE_FACTS)["context"] == 16384


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def pickled(folder: Path) -> None:
    torch.save({"norm.weight": Runs()}, folder / "consolidated.00.pth")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def saved(folder: Path, rank: int, **changes: torch.Tensor | None) -> None:
    """One of the files with some of its tensors replaced, or left out."""
    file = folder / f"consolidated.{rank:02}.pth"
    held = torch.load(file, weights_only=True) | {name.replace("__", "."): value for name, value in changes.items()}
    torch.save({name: value for name, value in held.items() if value is not None}, file)


def in_both(folder: Path, **changes: torch.Tensor | None) -> None:
    for rank in (0, 1):
        saved(folder, rank, **changes)


def swapped(folder: Path) -> None:
    listed(folder)
    one, other = (folder / f"consolidated.0{rank}.pth" for rank in (0, 1))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def listed(folder: Path) -> None:
    """As `md5sum` writes it, and Meta's download script reads it."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".json"))
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "checklist.chk").write_text("".join(lines))


def set_params(folder: Path, **changes: Any) -> None:
    (folder / "params.json").write_text(json.dumps(SETTINGS | changes))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n"
FAULTS: dict[str, tuple[Any, str]] = {
    "code": (
        pickled,
        "00.pth is not a file of weights alone, and .* so it is not .Trying to load .* GLOBAL posix.mkdir",
    ),
    "page": (
        lambda f: (f / "consolidated.01.pth").write_text("<html>"),
        r"01.pth is not a file .*\(Unsupported operand 60\)$",
    ),
    "pointer": (lambda f: (f / "consolidated.01.pth").write_text(POINTER), "01.pth is a pointer of Git LFS"),
    "changed places": (swapped, "by its checklist.chk, consolidated.00.pth is not what it lists: download it again"),
    "list": (lambda f: (f / "params.json").write_text("[]"), r"not describe a Llama \(Input should be a valid"),
    "no part": (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth is missing, one of 2 parts"),
    "no weights": (
        lambda f: [(f / f"consolidated.0{rank}.pth").unlink() for rank in (0, 1)],
        "holds params.json and no consolidated.00.pth",
    ),
    "last part": (lambda f: (f / "consolidated.01.pth").unlink(), "of its 1 files is .* or a file is missing"),
    "noise": (lambda f: (f / "consolidated.01.pth").write_bytes(b"PK" + bytes(500)), "consolidated.01.pth "),
    "cut": (lambda f: cut(f / "consolidated.01.pth"), "01.pth cannot be read, it is damaged or not the whole"),
    "named by number": (
        lambda f: torch.save({1: torch.ones(2)}, f / "consolidated.01.pth"),
        "not a table of tensors",
    ),
    "no table": (lambda f: torch.save(torch.ones(2), f / "consolidated.01.pth"), "not a table of tensors"),
    "other norm": (lambda f: saved(f, 1, norm__weight=torch.zeros(32)), "differ in norm.weight"),
    "lacks": (lambda f: in_both(f, output__weight=None), "lacks 1 of .* lm_head.weight"),
    "lacks in one": (lambda f: saved(f, 1, output__weight=None), "2 files hold tensors of different names"),
    "more": (
        lambda f: in_both(f, layers__0__attention__q_norm__weight=torch.ones(8)),
        "holds a tensor layers.0.attention.q_norm.weight, which a Llama in Meta's layout does not have",
    ),
    "parts": (lambda f: saved(f, 1, output__weight=torch.zeros(5, 7)), "the parts of output.weight do not fit"),
    "width": (
        lambda f: set_params(f, multiple_of=128),
        r"gate_proj.weight of its 2 files is \(96, 32\), but \(128, 32",
    ),
    "scaled": (lambda f: set_params(f, use_scaled_rope=True), "says use_scaled_rope = True, which is not computed"),
    "layers": (lambda f: set_params(f, n_layers=10**9), "says n_layers = 1000000000, and its files hold 2 layers"),
    "layer": (lambda f: set_params(f, n_layers=1), "says n_layers = 1, and its files hold 2 layers"),
    "wide heads": (lambda f: set_params(f, n_heads=2, n_kv_heads=1), "turns by 8 frequencies, and its files hold 4"),
    "heads": (lambda f: set_params(f, n_heads=5), "do not divide each other"),
    "kind": (lambda f: set_params(f, dim="32"), "not describe a Llama .dim: "),
    "json": (lambda f: (f / "params.json").write_text("{"), "its params.json is not JSON"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model is missing"),
    "tiktoken": (lambda f: (f / "tokenizer.model").write_text("IQ== 0\nIg== 1\n"), "in tiktoken's format .Llama 3."),
    "no tokenizer's": (lambda f: (f / "tokenizer.model").write_text("words"), "is not a model of sentencepiece"),
    "unigram": (lambda f: trained_words(f / "tokenizer.model", "unigram"), "would not split text as"),
}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("file", ["../outside", "{outside}", "..", "../m"])
def test_a_checklist_leads_to_no_other_file(file: str, words: Path, tmp_path: Path) -> None:
    """Whether it has a content, a stranger could ask."""
    written(tmp_path / "m", words)
    outside = tmp_path / "outside"
    outside.write_text("a-secret")
    file = file.format(outside=outside)
    md5 = hashlib.md5(b"a-secret").hexdigest()
    (tmp_path / "m" / "checklist.chk").write_text(f"{md5}  {file}\n")
    with soon(), pytest.raises(UserError, match=f"by its checklist.chk, {file} is listed, and not there"):
        fetch.fetch(given(tmp_path / "m"))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_odd_is_refused(fault: str, words: Path, tmp_path: Path) -> None:
    plant, message = FAULTS[fault]
    written(tmp_path / "m", words, ranks=2)
    plant(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        fetch.fetch(given(tmp_path / "m"))
    assert not Path("ran").exists()
    assert not paths.BASE.exists()
