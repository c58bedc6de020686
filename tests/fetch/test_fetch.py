"""Fetching: any source becomes one checkpoint; what is not a causal language model is refused before it is loaded."""

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.fetch import fetch, gguf_layout
from pipeline.model import apart_worker
from tests.limits import soon
from tests.made import meta_files, templates
from tests.made.gguf_files import GGUF_SIZES, SCALES, WINDOW, write_gguf
from tests.made.models import of_family, sharded, trained_words


def test_a_local_folder_becomes_a_checkpoint_with_its_facts(project: params.Params, tiny_model: Path) -> None:
    fetch.write_base(project.model)
    facts = records.read_json(paths.BASE_FACTS)
    assert facts["family"] == "llama"
    # Embeddings once (tied), then 2 layers of attention (q and o 64x64, k and v 64x32), MLP (3 of 64x128), 2 norms.
    assert (
        facts["parameters"] == facts["vocabulary"] * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    )
    assert (facts["attention_heads"], facts["key_value_heads"], facts["head_dim"]) == (4, 2, 16)
    # Keys and values of 2 heads of 16 in 2 layers, 4 bytes each.
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert facts["sha256"] == records.sha256_tree(paths.BASE)
    ids = torch.tensor([[5, 6, 7]])
    one, other = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tiny_model, paths.BASE))
    assert torch.equal(one, other)
    assert str(tiny_model) not in (paths.BASE / "config.json").read_text()


def test_the_stored_precision_is_the_requested_one(project: params.Params) -> None:
    fetch.write_base(project.model.model_copy(update={"dtype": "bfloat16"}))
    assert records.read_json(paths.BASE_FACTS)["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(paths.BASE)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def changed(tiny_model: Path, folder: Path, **config: Any) -> params.Model:
    shutil.copytree(tiny_model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "not a causal language model of a known",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
    ],
)
def test_what_cannot_be_the_base_is_refused(
    project: params.Params, tiny_model: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    assert project
    with pytest.raises(UserError, match=message):
        fetch.write_base(changed(tiny_model, tmp_path / "other", **config))
    assert not paths.BASE.exists()


def test_a_folder_without_a_model_and_a_strange_file_are_refused(project: params.Params, tmp_path: Path) -> None:
    assert project
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    (tmp_path / "model.bin").write_text("x")
    for path, message in (
        (tmp_path / "empty", "no config.json in this folder; it has notes.txt"),
        (tmp_path / "model.bin", "or a .gguf file"),
    ):
        given = params.Model(source=str(path), sha256=records.sha256_path(path), dtype="float32")
        with pytest.raises(UserError, match=message):
            fetch.write_base(given)


def test_a_tokenizer_of_another_model_is_refused(project: params.Params, tiny_model: Path, tmp_path: Path) -> None:
    assert project
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.resize_token_embeddings(100)
    loaded.save_pretrained(folder)
    given = params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32")
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens but the model embeds only 100"):
        fetch.write_base(given)


def fetched(folder: Path, file: Path, family: str, kind: str = "F32", **more: Any) -> None:
    """Write a checkpoint as GGUF, fetch that, and compare the logits with those of what the file holds."""
    held = write_gguf(folder, file, family, kind, **more)
    fetch.write_base(params.Model(source=str(file), sha256=records.sha256_file(file), dtype="float32"))
    ids = torch.tensor([[5, 6, 7, 8, 9, *range(20, 50)]])
    wanted, found = (AutoModelForCausalLM.from_pretrained(where) for where in (folder, paths.BASE))
    wanted.load_state_dict(held, strict=False)
    wanted.tie_weights()
    torch.testing.assert_close(found(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("kind", gguf_layout.GGUF_TYPES)
def test_a_gguf_file_becomes_the_checkpoint_it_holds(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Of every type: the model is what the gguf library makes of the file's numbers."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64} if kind in SCALES else {}
    folder = of_family("llama", kind in SCALES, tiny_model, tmp_path / "m", **sizes)
    fetched(folder, tmp_path / "tiny.gguf", "llama", kind)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", GGUF_SIZES)
def test_a_gguf_file_of_another_family_is_read(family: str, kind: str, tiny_model: Path, tmp_path: Path) -> None:
    name = "gemma3_text" if family == "gemma3" else family
    folder = of_family(name, True, tiny_model, tmp_path / "m", **GGUF_SIZES[family])
    fetched(folder, tmp_path / "m.gguf", family, kind, **(WINDOW if family == "gemma3" else {}))
    assert records.read_json(paths.BASE_FACTS)["context"] == (16 if family == "gemma3" else 512)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_words_of_a_gguf_file_are_sentencepiece_s(family: str, tiny_model: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    # Gemma's has no space before the first word.
    words = trained_words(tmp_path / "tokenizer.model", "bpe", prefix=family == "llama")
    own = SentencePieceProcessor(model_file=str(words))
    name = "gemma3_text" if family == "gemma3" else family
    sizes = GGUF_SIZES.get(family, {}) | {"vocab_size": own.vocab_size()}
    folder = of_family(name, True, tiny_model, tmp_path / "m", **sizes)
    fetched(folder, tmp_path / "m.gguf", family, words=words, **(WINDOW if family == "gemma3" else {}))
    tokenizer = AutoTokenizer.from_pretrained(paths.BASE)
    for text in ("red cat runs", "two  spaces", "Grüße, 世界 🙂", "didn't", "12 345\n\tx"):
        assert tokenizer(text).input_ids == [own.bos_id(), *own.encode(text)], text
        assert tokenizer.decode(own.encode(text)) == text


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("family", "sizes", "more", "message"),
    [
        ("granite", {}, {}, "architecture 'granite' cannot be read faithfully"),
        ("llama", {}, {"expert_count": 8}, "says llama.expert_count = 8, which transformers does not read"),
        ("llama", {}, {"logit_scale": 0.5}, "says llama.logit_scale = 0.5, which transformers does not read"),
        ("qwen3", {"head_dim": 16}, {}, "heads of 16 numbers; of qwen3 transformers reads GGUF files with 128 alone"),
        ("gemma3", {"head_dim": 16}, WINDOW, "has attention heads of 16 numbers; of gemma3"),
    ],
)
def test_a_gguf_file_that_would_not_be_read_faithfully_is_refused(
    family: str, sizes: dict[str, Any], more: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    name = "gemma3_text" if family == "gemma3" else family
    folder = of_family(name, True, tiny_model, tmp_path / "m", **(GGUF_SIZES.get(family, {}) | sizes))
    file = tmp_path / "m.gguf"
    write_gguf(folder, file, family, **(more | ({"attention.key_length": 16} if sizes and more else {})))
    with pytest.raises(UserError, match=message):
        fetch.write_base(params.Model(source=str(file), sha256=records.sha256_file(file), dtype="float32"))
    assert not paths.BASE.exists()


@pytest.mark.usefixtures("project")
def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in (("head_count", 4), ("key_length", 16)):
        writer.add_uint32(f"llama.attention.{name}", value)
    kind = gguf.GGMLQuantizationType.Q8_1
    for name, rows in (("token_embd", 400), ("blk.0.ffn_up", 128), ("blk.0.attn_q", 64)):
        raw = np.zeros((rows, 2 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="holds weights of type Q8_1; of GGUF files these are read: F32, F16, "):
        fetch.write_base(params.Model(source=str(file), sha256=records.sha256_file(file), dtype="float32"))


SCALED: dict[str, Any] = {"rope.scaling.type": "yarn"}


@pytest.mark.parametrize("fault", ["cut", "noise", "empty", "scaled"])
def test_a_spoilt_gguf_file_is_one_clear_error(
    fault: str, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    assert project
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, file, **(SCALED if fault == "scaled" else {}))
    content = file.read_bytes()
    if fault == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif fault == "noise":
        file.write_bytes(b"GGUF" + random.Random(1).randbytes(4000))
    elif fault == "empty":
        file.write_bytes(b"")
    given = params.Model(source=str(file), sha256=records.sha256_file(file), dtype="float32")
    with pytest.raises(UserError, match="scales its rotary" if fault == "scaled" else "is not a sound GGUF file"):
        fetch.write_base(given)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/tmp/outside.safetensors", ".hidden.safetensors"])
@pytest.mark.parametrize("named_by", ["model.safetensors.index.json", "own.safetensors.index.json", "config.json"])
def test_weights_that_the_digest_does_not_cover_are_refused(
    file: str, named_by: str, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    assert project
    given = changed(tiny_model, tmp_path / "model", transformers_weights=file)
    folder = Path(given.source)
    if named_by != "config.json":
        given = changed(tiny_model, tmp_path / "other", transformers_weights=named_by)
        folder = Path(given.source)
        (folder / "model.safetensors").unlink()
        (folder / named_by).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        given = given.model_copy(update={"sha256": records.sha256_tree(folder)})
    shutil.copy(tiny_model / "model.safetensors", folder.parent / "outside.safetensors")
    with pytest.raises(UserError, match=f"takes weights from '{file}', which leads out of its folder"):
        fetch.write_base(given)


CODE = "from pathlib import Path\nPath('ran').touch()\nfrom transformers import {0}\nclass Own({0}):\n    pass\n"


@pytest.mark.parametrize(
    ("file", "name", "parent"),
    [
        ("config.json", "AutoConfig", "LlamaConfig"),
        ("config.json", "AutoModelForCausalLM", "LlamaForCausalLM"),
        ("tokenizer_config.json", "AutoTokenizer", "PreTrainedTokenizerFast"),
    ],
)
def test_code_beside_a_checkpoint_is_never_run(
    file: str, name: str, parent: str, project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    """The checkpoint is read by the library's own classes, or refused; nobody is asked on the terminal."""
    assert project
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "own.py").write_text(CODE.format(parent))
    settings = records.read_json(folder / file)
    own = ["own.Own", "own.Own"] if name == "AutoTokenizer" else "own.Own"
    records.write_json(folder / file, settings | {"auto_map": {name: own}, "tokenizer_class": "Own"})
    given = params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32")
    with contextlib.suppress(UserError):
        fetch.write_base(given)
    assert not list(paths.BASE.glob("*.py"))
    assert not Path("ran").exists()


def test_what_lies_beside_a_gguf_file_does_not_enter(project: params.Params, tiny_model: Path, tmp_path: Path) -> None:
    """Only the file is pinned: a chat template or stop tokens that happen to lie in its folder are others'."""
    assert project
    alone, crowded = tmp_path / "alone", tmp_path / "crowded"
    alone.mkdir()
    write_gguf(tiny_model, alone / "tiny.gguf")
    shutil.copytree(tiny_model, crowded)
    shutil.copy(alone / "tiny.gguf", crowded)
    (crowded / "chat_template.jinja").write_text("another")
    (crowded / "generation_config.json").write_text(json.dumps({"eos_token_id": [7], "bos_token_id": 1}))
    digests = []
    for folder in (alone, crowded):
        file = folder / "tiny.gguf"
        fetch.write_base(params.Model(source=str(file), sha256=records.sha256_file(file), dtype="float32"))
        digests.append((records.sha256_tree(paths.BASE), records.read_json(paths.BASE_FACTS)["stop_ids"]))
        shutil.rmtree(paths.BASE)
    assert digests[0] == digests[1]


def part(folder: Path, number: int) -> Path:
    [found] = folder.glob(f"model-0000{number}-of-*")
    return found


def reindexed(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    change(content["weight_map"])
    file.write_text(json.dumps(content))


NORM = "model.norm.weight"
SHARD_FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (
        lambda f: part(f, 2).unlink(),
        "model-00002-of-0000.*s is named as weights, and is not there, one of the",
    ),
    "superfluous": (
        lambda f: shutil.copy(part(f, 1), f / "model-00009-of-00009.safetensors"),
        "model-00009-of-00009.safetensors is a part of a model that the index does not name",
    ),
    "both": (lambda f: shutil.copy(part(f, 1), f / "model.safetensors"), "two sets of weights"),
    "elsewhere": (
        lambda f: reindexed(f, lambda m: m.update({NORM: next(v for v in m.values() if v != m[NORM])})),
        f"is not what the index says of it: {NORM} is in the",
    ),
    "unlisted": (lambda f: reindexed(f, lambda m: m.pop(NORM)), f"{NORM} is in the file and not in the index"),
    "more": (
        lambda f: reindexed(f, lambda m: m.update({"model.more.weight": m[NORM]})),
        "model.more.weight is in the index and not in the file",
    ),
    "cut": (
        lambda f: part(f, 2).write_bytes(part(f, 2).read_bytes()[:-50]),
        "00002-of-0000..safetensors cannot be read",
    ),
    "index gone": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "holds model-00001-of-0000..safetensors and no model.safetensors.index.json, which says what belongs together",
    ),
    "no index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "lists no weights"),
}


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_several_files_that_do_not_fit_their_index_are_refused(fault: str, tiny_model: Path, tmp_path: Path) -> None:
    plant, message = SHARD_FAULTS[fault]
    shards = sharded(tmp_path / "m", tiny_model)
    assert len(shards) > 2
    plant(tmp_path / "m")
    model = params.Model(source=str(tmp_path / "m"), sha256=records.sha256_tree(tmp_path / "m"), dtype="float32")
    with pytest.raises(UserError, match=message):
        fetch.write_base(model)
    assert not paths.BASE.exists()


@pytest.mark.usefixtures("project")
def test_several_files_beside_a_copy_in_another_format_are_the_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shards = sharded(folder, tiny_model)
    shutil.copy(shards[0], folder / "consolidated.safetensors")
    fetch.write_base(params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32"))
    ids = torch.tensor([[5, 6, 7]])
    one, other = (AutoModelForCausalLM.from_pretrained(where)(ids).logits for where in (tiny_model, paths.BASE))
    assert torch.equal(one, other)


# What is read is what was hashed


def test_weights_that_change_between_the_digest_and_their_end_are_refused(
    project: params.Params, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = changed(tiny_model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    load = AutoModelForCausalLM.from_pretrained

    def exchanged(*args: Any, **options: Any) -> Any:
        """Another model in its place while it is read, and the own one again when that is done."""
        weights.rename(tmp_path / "own")
        other = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(tiny_model))
        other.save_pretrained(tmp_path / "other")
        (tmp_path / "other" / weights.name).rename(weights)
        try:
            return load(*args, **options)
        finally:
            (tmp_path / "own").replace(weights)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", exchanged)
    with pytest.raises(UserError, match=r"model.safetensors has changed while it was read"):
        fetch.write_base(given)
    assert project
    assert not paths.BASE.exists()


@pytest.mark.parametrize("meta_layout", [False, True])
def test_weights_are_read_by_the_time_that_their_files_are_let_go(
    meta_layout: bool, project: params.Params, tiny_model: Path, words: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Libraries map files and read them when numbers are needed: here, when they are saved."""
    assert project
    if meta_layout:
        meta_files.written(tmp_path / "model", words)
        given = meta_files.given(tmp_path / "model")
        weights = tmp_path / "model" / "consolidated.00.pth"
    else:
        given = changed(tiny_model, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
    fetch.write_base(given)
    expected = records.sha256_tree(paths.BASE)
    shutil.rmtree(paths.BASE)

    def emptied(*_: Any) -> None:
        with weights.open("r+b") as file:
            file.seek(weights.stat().st_size // 4)
            file.write(bytes(weights.stat().st_size // 2))

    monkeypatch.setattr(fetch, "_check_tokenizer", emptied)
    fetch.write_base(given)
    assert records.sha256_tree(paths.BASE) == expected


def test_weights_behind_a_linked_folder_are_refused(project: params.Params, tiny_model: Path, tmp_path: Path) -> None:
    assert project
    folder = tmp_path / "m"
    sharded(folder, tiny_model)
    moved = part(folder, 1)
    (tmp_path / "elsewhere").mkdir()
    moved.rename(tmp_path / "elsewhere" / moved.name)
    reindexed(folder, lambda m: m.update({k: f"sub/{v}" for k, v in m.items() if v == moved.name}))
    without = records.sha256_tree(folder)
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="m/sub is a link to a folder"):
        fetch.write_base(params.Model(source=str(folder), sha256=without, dtype="float32"))
    assert not paths.BASE.exists()


# What a configuration may ask for

SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000, and its files hold 2 layers"),
    "more layers than memory": ({"num_hidden_layers": 10**18}, "and its files hold 2 layers"),
    "fewer layers": ({"num_hidden_layers": 1}, "num_hidden_layers = 1, and its files hold 2 layers"),
    "layers in words": ({"num_hidden_layers": "9" * 500}, "and its files hold 2 layers"),
    "words": ({"vocab_size": 10**9}, "do not fit its configuration"),
    "hidden": ({"hidden_size": 2**24}, "do not fit its configuration"),
    "width": ({"intermediate_size": 10**10}, "do not fit its configuration"),
    "heads": ({"head_dim": 10**9}, "do not fit its configuration"),
    "own head": ({"tie_word_embeddings": False}, "lacks 1 of the model's tensors, such as lm_head.weight"),
}


@pytest.mark.parametrize("kind", SIZES)
def test_a_configuration_larger_than_the_weights_is_refused_before_it_is_built(
    kind: str, project: params.Params, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project
    config, message = SIZES[kind]
    given = changed(tiny_model, tmp_path / "other", **config)

    def built(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were made up")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", built)
    with soon(), pytest.raises(UserError, match=message):
        fetch.write_base(given)
    assert not paths.BASE.exists()


def test_frequencies_without_number_are_refused(project: params.Params, tiny_model: Path, tmp_path: Path) -> None:
    """They are in no file: they are computed, as many as the configuration says."""
    assert project
    rotation = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}
    given = changed(of_family("phi3", True, tiny_model, tmp_path / "m"), tmp_path / "other", rope_parameters=rotation)
    with soon(), pytest.raises(UserError, match="do not fit its configuration, which describes a model of [0-9,]{10,}"):
        fetch.write_base(given)
    assert not paths.BASE.exists()


def test_a_file_of_too_many_layers_is_refused(project: params.Params, tiny_model: Path, tmp_path: Path) -> None:
    assert project
    given = changed(tiny_model, tmp_path / "other", num_hidden_layers=30000)
    many = {f"model.layers.{n}.input_layernorm.weight": torch.zeros(0) for n in range(30000)}
    save_file(many, tmp_path / "other" / "model.safetensors")
    given = given.model_copy(update={"sha256": records.sha256_tree(tmp_path / "other")})
    with soon(), pytest.raises(UserError, match="has 30,000 layers: 1,000 are the most"):
        fetch.write_base(given)


# What a tokenizer may bring about

MISSING = [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
BROKEN: dict[str, dict[str, Any]] = {
    "on the first text": {
        "post_processor": {"type": "TemplateProcessing", "single": MISSING, "pair": [], "special_tokens": {}}
    },
    "on every text": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
    "when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "ABAAAP////8AAAAA"}},
    "in merges": {"model": {"continuing_subword_prefix": "#" * 20}},
    # Its message cuts a letter in half: the library ends the process, and no exception can tell.
    "with the process": {
        "model": {
            "continuing_subword_prefix": "#",
            "vocab": {"#": 0, "a": 1, "é": 2},
            "merges": [["a", "é"]],
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tokenizer_that_breaks_its_library_is_one_error(
    kind: str, project: params.Params, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(apart_worker.SECONDS, "tokenizer", 2)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    for key, value in BROKEN[kind].items():
        content[key] = content[key] | value if key == "model" else value
    (folder / "tokenizer.json").write_text(json.dumps(content))
    given = params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32")
    with soon(), pytest.raises(UserError):
        fetch.write_base(given, project)
    assert not paths.BASE.exists()


def test_an_interrupted_fetch_is_no_fault_of_the_tokenizer(
    project: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.write_base(project.model)


def test_a_template_that_never_ends_is_refused_before_the_weights_are_read(
    project: params.Params, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(templates.LOOPS)
    given = params.Model(source=str(folder), sha256=records.sha256_tree(folder), dtype="float32")
    with soon(), pytest.raises(UserError, match="the model's chat template takes more than 2 s of the processor"):
        fetch.write_base(given, project)
    assert not paths.BASE.exists()
