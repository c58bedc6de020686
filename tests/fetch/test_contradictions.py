"""What a checkpoint says twice, and differently, is settled by its content or refused; what is written says it once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import gguf as gguf_file
from pipeline.commands import plan
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.export import merge
from pipeline.fetch import fetch, hub_layout
from pipeline.fetch.glance import glance
from pipeline.model.shape import Shape
from tests.made.gguf_files import write_gguf
from tests.made.models import of_family
from tests.made.variants import trained

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


def changed(folder: Path, file: str = "config.json", **change: Any) -> None:
    """Change settings; a value of `...` takes its key out."""
    content = records.read_json(folder / file) | change
    records.write_json(folder / file, {key: value for key, value in content.items() if value is not ...})


def weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def own(tensors: Tensors) -> None:
    tensors[HEAD] = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(1))


def copied(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def given(source: Path) -> params.Model:
    return params.Model(source=str(source), sha256=records.sha256_path(source), dtype="float32")


def written(folder: Path, capsys: pytest.CaptureFixture[str] | None = None) -> str:
    """What `fetch` said; what it wrote holds as many tensors for head and embedding as it says."""
    fetch.write_base(given(folder))
    agrees(paths.BASE)
    facts = records.read_json(paths.BASE_FACTS)
    assert facts["tied_embeddings"] == records.read_json(paths.BASE / "config.json")["tie_word_embeddings"]
    return "" if capsys is None else capsys.readouterr().out


def agrees(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    assert (HEAD in held) != records.read_json(folder / "config.json")["tie_word_embeddings"]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[5, 6, 7]])).logits
    return found


# The head


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("say", [True, ...], ids=["said", "left out"])
def test_a_head_of_its_own_is_kept_and_said(
    say: Any, family: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = of_family(family, True, tiny_model, tmp_path / "m")
    changed(folder, tie_word_embeddings=say)
    weights(folder, own)
    assumed = hub_layout.TYPICAL[family].get("tie_word_embeddings", False) if say is ... else say
    said = written(folder, capsys)
    assert ("tie_word_embeddings is now false" in said) == assumed
    assert records.read_json(paths.BASE / "config.json")["tie_word_embeddings"] is False
    assert torch.equal(load_file(paths.BASE / "model.safetensors")[HEAD], load_file(folder / "model.safetensors")[HEAD])
    assert torch.equal(logits(paths.BASE), logits(folder))


@pytest.mark.usefixtures("project")
def test_a_head_that_is_the_embedding_is_tied(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    expected = logits(folder)
    weights(folder, copied)
    assert "tie_word_embeddings" not in written(folder, capsys)
    assert records.read_json(paths.BASE / "config.json")["tie_word_embeddings"] is True
    assert torch.equal(logits(paths.BASE), expected)


@pytest.mark.usefixtures("project")
def test_a_head_alone_that_is_said_to_be_tied_is_the_embedding(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    expected = logits(folder)
    weights(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    written(folder)
    assert torch.equal(logits(paths.BASE), expected)


@pytest.mark.parametrize("say", [False, ..., None])
def test_a_head_that_is_nowhere_is_not_made_up(say: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    changed(folder, tie_word_embeddings=say)
    refused(folder, "lacks 1 of the model's tensors, such as lm_head.weight, .*set tie_word_embeddings to true")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("head", [own, copied, None])
def test_the_head_of_a_gguf_file(head: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Present or absent, in what is read and in what is written."""
    folder = of_family("llama", head is None, tiny_model, tmp_path / "m")
    if head:
        weights(folder, head)
    write_gguf(folder, tmp_path / "m.gguf")
    expected = logits(folder)
    written(tmp_path / "m.gguf")
    assert records.read_json(paths.BASE / "config.json")["tie_word_embeddings"] is (head is None)
    torch.testing.assert_close(logits(paths.BASE), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [own, copied])
def test_exports_have_the_head_that_was_fetched(
    head: Any, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    import gguf

    from pipeline.quantize import quantize

    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    weights(folder, head)
    written(folder)
    plain = project.quantize.model_copy(update={"method": "none", "double_quantization": False})
    quantize.write_quantized(plain, project.runtime)
    agrees(paths.QUANTIZED)
    gguf_file.write_base(paths.QUANTIZED, tmp_path / "out.gguf", "F32")
    names = {tensor.name for tensor in gguf.GGUFReader(str(tmp_path / "out.gguf")).tensors}
    assert ("output.weight" in names) == (head is own)
    shutil.rmtree(paths.BASE)
    written(tmp_path / "out.gguf")
    torch.testing.assert_close(logits(paths.BASE), logits(paths.QUANTIZED), rtol=1e-4, atol=1e-5)
    trained(rslora=False)
    fetch.write_base(given(folder))
    merge.merged(merge.base()[0], paths.adapter(17)).save_pretrained(tmp_path / "merged")
    agrees(tmp_path / "merged")


@pytest.mark.parametrize("head", [own, copied, None])
@pytest.mark.parametrize("say", [True, False])
def test_the_plan_counts_what_is_in_the_files(
    say: bool, head: Any, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    if not head and not say:
        return
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    if head:
        weights(folder, head)
    changed(folder, tie_word_embeddings=say)
    asked = project.model_copy(update={"model": given(folder)})
    counted = plan._shape(asked)
    written(folder)
    assert counted.parameters == records.read_json(paths.BASE_FACTS)["parameters"]
    assert counted == Shape.read(paths.BASE)
    seen = glance(folder)
    assert seen is not None
    assert seen.shape is not None
    assert seen.shape.tied_embeddings == (head is None)


def test_the_plan_reads_a_gguf_file(project: params.Params, tiny_model: Path, tmp_path: Path) -> None:
    write_gguf(tiny_model, tmp_path / "m.gguf")
    asked = project.model_copy(update={"model": given(tmp_path / "m.gguf")})
    assert plan._shape(asked) == Shape.read(tiny_model)


# Sizes


def refused(source: Path, message: str) -> None:
    """At a glance, with the reason."""
    with pytest.raises(UserError, match=message):
        glance(source)


def rows(name: str, count: int) -> Callable[[Path], None]:
    """A tensor with another number of rows."""

    def plant(folder: Path) -> None:
        weights(folder, lambda tensors: tensors.update({name: torch.zeros(count, tensors[name].shape[1])}))

    return plant


KEYS = "model.layers.0.self_attn.k_proj.weight"
SIZES: dict[str, tuple[Callable[[Path], None], str]] = {
    "fewer words": (lambda f: changed(f, vocab_size=300), "embed_tokens.weight is 307 x 64, and 300 x 64 by vocab"),
    "more words": (lambda f: changed(f, vocab_size=500), "is 307 x 64, and 500 x 64 by vocab_size and hidden_size"),
    "fewer rows": (rows(EMBEDDING, 300), "is 300 x 64, and 307 x 64 by vocab_size and hidden_size"),
    "a smaller head": (
        lambda f: weights(f, lambda t: t.update({HEAD: t[EMBEDDING][:100].clone()})), "lm_head.weight is 100 x 64",
    ),
    "more keys": (lambda f: changed(f, num_key_value_heads=4), "k_proj.weight is 32 x 64, and 64 x 64 by num_key_"),
    "fewer keys": (lambda f: changed(f, num_key_value_heads=1), "is 32 x 64, and 16 x 64 by num_key_value_heads"),
    "keys in files": (rows(KEYS, 16), "k_proj.weight is 16 x 64, and 32 x 64 by num_key_value_heads"),
    "not divided": (lambda f: changed(f, num_key_value_heads=3), "num_key_value_heads = 3, which does not divide them"),
    "heads": (lambda f: changed(f, num_attention_heads=8), "and 64 x 128 by num_attention_heads, head_dim"),
    "width": (lambda f: changed(f, head_dim=8), "by num_key_value_heads, head_dim and hidden_size"),
    "hidden": (lambda f: changed(f, hidden_size=128), "is 307 x 64, and 307 x 128 by vocab_size and hidden_size"),
    "feed forward": (lambda f: changed(f, intermediate_size=96), "by intermediate_size and hidden_size"),
    "padding": (lambda f: changed(f, pad_token_id=9000), "pad_token_id = 9000, and the model embeds 307 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_that_the_files_do_not_have_are_named(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    plant, message = SIZES[kind]
    plant(folder)
    refused(folder, message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count_kv", 4), ("attention.head_count_kv", 1), ("attention.head_count", 2),
        ("vocab_size", 300), ("embedding_length", 32), ("rope.dimension_count", 8), ("attention.value_length", 8),
    ],
)  # fmt: skip
def test_sizes_that_a_gguf_file_does_not_have_are_named(key: str, value: int, tiny_model: Path, tmp_path: Path) -> None:
    import gguf

    names = {
        "attention.head_count_kv": "add_head_count_kv", "attention.head_count": "add_head_count",
        "vocab_size": "add_vocab_size", "embedding_length": "add_embedding_length",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if key in names:
            add = getattr(gguf.GGUFWriter, names[key])
            patch.setattr(gguf.GGUFWriter, names[key], lambda writer, _: add(writer, value))
            write_gguf(tiny_model, tmp_path / "m.gguf")
        else:
            more: dict[str, Any] = {key: value}
            write_gguf(tiny_model, tmp_path / "m.gguf", **more)
    refused(tmp_path / "m.gguf", r"is \d+, of the tensors \d+")


# How positions are rotated


def rotation(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0} | more


TWICE: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_theta": 5000.0, "rope_parameters": rotation()},
        "rope_theta = 5000.0 and rope_parameters.rope_theta = 100",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": rotation()},
        "rope_scaling's type = 'linear' and rope_parameters' type = 'default'",
    ),
    ({"rope_parameters": rotation(type="linear", factor=2.0)}, "rope_parameters.type = 'linear' and .*'default'"),
    (
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        "rope_scaling.type = 'linear' and rope_scaling.rope_type = 'dynamic'",
    ),
    (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": rotation(rope_type="linear", factor=4.0),
            "rope_theta": 10_000.0,
        },
        "rope_scaling.factor = 2.0 and rope_parameters.factor = 4.0",
    ),
    (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": rotation(rope_type="linear", factor=2.0, rope_theta=5e5),
        },
        r"rope_scaling.rope_theta = '\(nothing\)' and rope_parameters.rope_theta = 500000.0",
    ),
]


@pytest.mark.parametrize(("config", "message"), TWICE)
def test_a_rotation_that_is_said_twice_and_differently_is_refused(
    config: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    changed(folder, **config)
    refused(folder, message)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": ..., "rope_theta": 5e5},
        {"rope_parameters": rotation(), "rope_theta": 10_000.0},
        {"rope_parameters": rotation(), "rope_scaling": None},
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        {
            "rope_parameters": rotation(rope_type="linear", factor=2.0), "rope_theta": 10_000.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
    ],
)  # fmt: skip
def test_a_rotation_that_is_said_once_or_twice_the_same_is_carried(
    config: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    changed(folder, **config)
    written(folder)
    assert torch.equal(logits(paths.BASE), logits(folder))


@pytest.mark.usefixtures("project")
def test_a_rotation_for_each_kind_of_layer_is_carried(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("gemma3_text", True, tiny_model, tmp_path / "m")
    changed(folder, rope_parameters=..., rope_theta=5e5, rope_local_base_freq=1e4)
    written(folder)
    assert torch.equal(logits(paths.BASE), logits(folder))
    changed(folder, rope_parameters={"full_attention": rotation(), "sliding_attention": rotation()})
    refused(folder, "rope_theta = 500000.0 and rope_parameters.rope_theta = 10000.0")


# Tokens


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [9000, -1])
def test_an_id_that_no_token_has_is_left_out(
    value: int, key: str, file: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    changed(folder, file, **{key: value})
    if (key, value, file) == ("pad_token_id", 9000, "config.json"):
        refused(folder, "pad_token_id = 9000")
        return
    assert f"its {file} says {key} = {value}, and the model embeds 307 tokens" in written(folder, capsys)
    for name in ("config.json", "generation_config.json"):
        settings = records.read_json(paths.BASE / name)
        assert all(settings.get(one) in (None, 0, 1) for one in ("bos_token_id", "eos_token_id", "pad_token_id"))
    assert set(records.read_json(paths.BASE_FACTS)["stop_ids"]) <= {1}


@pytest.mark.usefixtures("project")
def test_of_several_ends_those_that_no_token_has_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    changed(folder, "generation_config.json", eos_token_id=[7, 9000, 1])
    written(folder)
    assert records.read_json(paths.BASE / "generation_config.json")["eos_token_id"] == [7, 1]
    assert records.read_json(paths.BASE_FACTS)["stop_ids"] == [1, 7]


@pytest.mark.usefixtures("project")
def test_the_authors_ends_are_those_of_the_generation_config(tiny_model: Path, tmp_path: Path) -> None:
    """They may differ from the configuration's, as Llama 3's do: both are carried, and decoding stops at theirs."""
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    changed(folder, eos_token_id=9)
    changed(folder, "generation_config.json", eos_token_id=[7, 1])
    written(folder)
    assert records.read_json(paths.BASE_FACTS)["stop_ids"] == [1, 7]
    assert records.read_json(paths.BASE / "config.json")["eos_token_id"] == 9


def tokenizer(folder: Path, change: Callable[[Any], object]) -> None:
    made = AutoTokenizer.from_pretrained(folder)
    change(made)
    made.save_pretrained(folder)


def in_template(made: Any) -> None:
    made.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    made.chat_template += "<|new|>"


USED: dict[str, Callable[[Any], object]] = {
    "BOS": lambda t: t.add_special_tokens({"bos_token": "<|new|>"}),
    "EOS": lambda t: t.add_special_tokens({"eos_token": "<|new|>"}),
    "a word": lambda t: t.add_tokens(["<|new|>"]),
    "in the template": in_template,
}


@pytest.mark.parametrize("kind", USED)
def test_a_token_that_is_used_and_not_embedded_is_refused(
    kind: str, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    assert project
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    tokenizer(folder, USED[kind])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="'<|new|>' with the id 307, and the"):
        patch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # before the weights are read
        fetch.write_base(given(folder))
    assert not paths.BASE.exists()


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("key", ["pad_token", "additional_special_tokens"])
def test_a_token_that_nothing_uses_and_is_not_embedded_is_left_out(
    key: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a token for padding, which Llama 2 has in many copies: a batch padded with it would end the process."""
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    before = AutoTokenizer.from_pretrained(folder)
    tokenizer(folder, lambda t: t.add_special_tokens({key: "<|new|>" if key == "pad_token" else ["<|new|>"]}))
    assert "its tokenizer has '<|new|>', which the model does not embed: left out" in written(folder, capsys)
    after = AutoTokenizer.from_pretrained(paths.BASE)
    assert after.added_tokens_decoder.keys() == before.added_tokens_decoder.keys()
    assert after.pad_token == (None if key == "pad_token" else before.pad_token)
    for text in ("red cat runs", "a <|end|> b"):
        assert after(text).input_ids == before(text).input_ids
    assert max(after("a <|new|> b").input_ids) < 307
    files = [paths.BASE / name for name in ("tokenizer.json", "tokenizer_config.json")]
    assert not any("<|new|>" in file.read_text() for file in files)


@pytest.mark.usefixtures("project")
def test_a_vocabulary_smaller_than_the_embedding_is_no_contradiction(tiny_model: Path, tmp_path: Path) -> None:
    folder = of_family("llama", True, tiny_model, tmp_path / "m", vocab_size=320)
    tokenizer(folder, lambda t: t.add_special_tokens({"pad_token": "<|new|>"}))
    written(folder)
    assert AutoTokenizer.from_pretrained(paths.BASE).pad_token_id == 307
