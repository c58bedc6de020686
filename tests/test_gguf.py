"""GGUF files: the numbers and the vocabulary are the checkpoint's, or the reason why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline import gguf as gguf_file
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.infer import backend_llamacpp
from pipeline.lora import adapter
from tests.made.models import of_family
from tests.made.variants import quantized, trained

ERRORS = {"F32": 0.0, "BF16": 0.003, "F16": 3e-4, "Q8_0": 0.01, "Q5_1": 0.04, "Q5_0": 0.05, "Q4_1": 0.08, "Q4_0": 0.11}
"""The relative error that each type may make of normally distributed weights, in blocks of 32 where it has blocks."""

TEXTS = [
    "The red cat runs, 2024 times!  It's   here\n\n now.",
    "Grün 12345 dans l'été; 日本語 и кириллица \U0001f600",
    " leading and trailing ",
    "<|user|>cat<|end|>",
]


@pytest.mark.parametrize("kind", params.GGUF_TYPES)
def test_each_type_holds_the_weights_as_well_as_it_can(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    gguf_file.write_base(tiny_model, tmp_path / "base.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "base.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    told = tensors["blk.1.ffn_down.weight"]
    exact = weights["model.layers.1.mlp.down_proj.weight"].numpy()
    held = gguf.quants.dequantize(told.data, told.tensor_type).reshape(exact.shape)
    assert told.tensor_type.name == kind
    assert np.linalg.norm(held - exact) / np.linalg.norm(exact) <= ERRORS[kind]
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert "output.weight" not in tensors  # tied to the embedding
    assert reader.fields["general.file_type"].contents() == gguf_file._file_type(kind)


@pytest.mark.parametrize(
    ("kind", "head"), [("F16", "F16"), ("Q8_0", "Q8_0"), *((kind, "Q8_0") for kind in ("Q5_1", "Q5_0", "Q4_1", "Q4_0"))]
)
@pytest.mark.parametrize("tied", [True, False])
def test_files_of_4_and_5_bits_keep_the_head_in_8(
    tiny_model: Path, tmp_path: Path, kind: str, head: str, tied: bool
) -> None:
    """As llama.cpp's quantizer does: of a Q4_1 file of SmolLM2, which ties them, it leaves the embedding in Q8_0."""
    folder = of_family("llama", tied, tiny_model, tmp_path / "model")
    gguf_file.write_base(folder, tmp_path / "base.gguf", kind)
    held = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    embedding = {"token_embd.weight": head} if tied else {"token_embd.weight": kind, "output.weight": head}
    matrices = {name: told for name, told in held.items() if told != "F32"}
    blocks = {name: kind for name in matrices if name.startswith("blk.")}
    assert matrices == embedding | blocks
    assert len(blocks) == 2 * 7
    assert gguf_file.stored(kind) == (kind if kind == head else f"{kind} with the output head in Q8_0")


def steps(name: str) -> Any:
    """A way of splitting text before BPE, as `tokenizers` writes it."""
    from tokenizers import Regex, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    expression = next((one for one, told in gguf_file.SPLITS.items() if told == name), None)
    if expression:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), level])
    return (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if name == "smollm" else level
    )


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_tokenizes_as_the_checkpoints_tokenizer(tiny_model: Path, tmp_path: Path, name: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = of_family("llama", True, tiny_model, tmp_path / "model", vocab_size=480)
    bare = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    bare.pre_tokenizer, bare.decoder = steps(name), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=470, special_tokens=["<|bos|>", "<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    bare.train_from_iterator(TEXTS[:3] * 4 + ["the cat 12 123 1234 2024 it's l'été"] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<|bos|>", eos_token="<|end|>").save_pretrained(folder)
    gguf_file.write_base(folder, tmp_path / "base.gguf", "F32")
    assert gguf.GGUFReader(tmp_path / "base.gguf").fields["tokenizer.ggml.pre"].contents() == name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server = backend_llamacpp.serve(tmp_path / "base.gguf", None, "F32", 1, 64, 1, "cpu")
    for text in TEXTS:
        body = {"content": text, "add_special": False, "parse_special": True}
        told = backend_llamacpp.post(server, "tokenize", body)["tokens"]
        assert told == tokenizer(text, add_special_tokens=False).input_ids, text


def test_sentencepieces_merges_become_scores(tiny_model: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    folder = of_family("llama", True, tiny_model, tmp_path / "model", vocab_size=480)
    space = "\u2581"
    bare = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    bare.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    held = [AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=470, special_tokens=["<unk>", "<s>", "</s>", *map(str, held)], show_progress=False
    )
    bare.train_from_iterator(["the red cat runs here now it is the cat"] * 4, trainer)
    content = json.loads(bare.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if not one["content"].startswith("<0x")]
    bare = Tokenizer.from_str(json.dumps(content))
    PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    gguf_file.write_base(folder, tmp_path / "base.gguf", "F32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server = backend_llamacpp.serve(tmp_path / "base.gguf", None, "F32", 1, 64, 1, "cpu")
    for text in ["the red cat runs", "the cat is 12 here", "Grün \U0001f600", "it is  the  cat"]:
        body = {"content": text, "add_special": False, "parse_special": True}
        told = backend_llamacpp.post(server, "tokenize", body)["tokens"]
        assert told == tokenizer(text, add_special_tokens=False).input_ids, text
        answer = backend_llamacpp.post(server, "completion", {"prompt": told, "n_predict": 1, "return_tokens": True})
        backend_llamacpp.require_read(tokenizer, told, answer)


def test_llama_3s_frequencies_are_transformers(tiny_model: Path, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = of_family("llama", True, tiny_model, tmp_path / "model", rope_parameters=scaling)
    gguf_file.write_base(folder, tmp_path / "base.gguf", "F32")
    (told,) = [one for one in gguf.GGUFReader(tmp_path / "base.gguf").tensors if one.name == "rope_freqs.weight"]
    plain = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    np.testing.assert_allclose(plain / told.data, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert len(set(told.data.tolist())) > 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "gemma3_text"}, "family 'gemma3_text', and GGUF files are written only of"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"quantization_config": {"load_in_8bit": True}}, r"LLM.int8\(\), which quantizes activations"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rotary embedding by 'yarn'"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = records.read_json(folder / "config.json")
    gguf_file.refuse(folder)
    records.write_json(folder / "config.json", config | changes)
    with pytest.raises(UserError, match=told):
        gguf_file.refuse(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"type": "Unigram"}}, "a Unigram model"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the steps Whitespace"),
        ({"pre_tokenizer": None}, "the steps none"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(changes: dict[str, Any], told: str) -> None:
    content = {"model": {"type": "BPE"}, "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
    assert gguf_file._pre_tokenizer(content, Path("here")) == "gpt-2"
    with pytest.raises(UserError, match=f"splits text by {told}, for which no name of llama.cpp is known"):
        gguf_file._pre_tokenizer(content | changes, Path("here"))


def test_types_are_those_that_a_file_can_have(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not as 'Q3_K'"):
        gguf_file.write_base(tiny_model, tmp_path / "base.gguf", "Q3_K")
    with pytest.raises(UserError, match="an adapter is written as F32, BF16, F16, not as 'Q8_0'"):
        gguf_file.write_adapter(tiny_model, tiny_model, tmp_path / "adapter.gguf", "Q8_0")
    narrow = of_family("llama", True, tiny_model, tmp_path / "model", hidden_size=48, head_dim=12)
    with pytest.raises(UserError, match="has rows of 48 weights, which do not fill the blocks of 32 that .*: take F16"):
        gguf_file.write_base(narrow, tmp_path / "base.gguf", "Q4_0")
    assert list(tmp_path.glob("*.gguf")) == list(tmp_path.glob(".*.part")) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_dora": True}, "not plain LoRA \\(use_dora\\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias lora_only"),
        ({"peft_type": "LOHA"}, "not plain LoRA \\(LOHA\\)"),
    ],
)
def test_an_adapter_that_gguf_cannot_hold_is_refused(
    project: params.Params, tiny_model: Path, changes: dict[str, Any], told: str
) -> None:
    quantized(project, tiny_model)
    folder = trained(rslora=False).folder
    config = records.read_json(folder / adapter.CONFIG)
    records.write_json(folder / adapter.CONFIG, config | changes)
    with pytest.raises(UserError, match=told):
        gguf_file.write_adapter(folder, paths.QUANTIZED, Path("adapter.gguf"), "F32")


def test_an_adapter_that_does_nothing_or_is_of_another_base_is_refused(
    project: params.Params, tiny_model: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from tests.made.variants import decoded

    quantized(project, tiny_model)
    saved = trained(rslora=False)
    held = load_file(saved.folder / adapter.WEIGHTS)
    zero = {name: torch.zeros_like(one) if "lora_B" in name else one for name, one in held.items()}
    save_file(zero, saved.folder / adapter.WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="does not change what llama.cpp computes"):
        decoded(project, "tuned-17", saved, backend="llama.cpp")
    save_file({name: one * float("nan") for name, one in held.items()}, saved.folder / adapter.WEIGHTS)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        decoded(project, "tuned-17", saved, backend="llama.cpp")
    records.write_json(saved.folder / adapter.ORIGIN, {"model_sha256": "another"})
    with pytest.raises(UserError, match="was trained on another base"):
        decoded(project, "tuned-17", saved, backend="llama.cpp")
    assert list(paths.SCRATCH.glob(".*.part")) == []
