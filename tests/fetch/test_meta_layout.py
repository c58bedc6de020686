"""Meta's layout: what is fetched from it computes what Meta's own convention does, and whatever is odd is refused."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.core import paths, records
from pipeline.core.errors import UserError
from pipeline.fetch import fetch, meta_layout
from tests.limits import soon
from tests.made.meta_files import SETTINGS, WIDTH, forward, given, parts, tensors, written
from tests.made.models import trained_words

TEXTS = ["red cat runs", "  two  spaces", "Grüße, 世界 🙂", "didn't", "12 345\n\tx"]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(("ranks", "by_words"), [(1, False), (2, False), (2, True)])
def test_what_is_fetched_computes_what_meta_computes(ranks: int, by_words: bool, words: Path, tmp_path: Path) -> None:
    whole = written(tmp_path / "m", words, ranks, by_words)
    listed(tmp_path / "m")
    fetch.write_base(given(tmp_path / "m"))
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
    names = {f"{theirs}.": f"{ours}." for theirs, ours in (meta_layout.NAMES | meta_layout.OUTSIDE).items()}
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
    fetch.write_base(given(tmp_path / "m"))
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
    "pointer": (lambda f: (f / "consolidated.01.pth").write_text(POINTER), "01.pth is a Git LFS pointer"),
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
        fetch.write_base(given(tmp_path / "m"))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_odd_is_refused(fault: str, words: Path, tmp_path: Path) -> None:
    plant, message = FAULTS[fault]
    written(tmp_path / "m", words, ranks=2)
    plant(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        fetch.write_base(given(tmp_path / "m"))
    assert not Path("ran").exists()
    assert not paths.BASE.exists()
