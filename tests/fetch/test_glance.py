"""A glance tells what fetching tells, without torch, transformers, weights or a vocabulary."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from pipeline.core import params, paths, records
from pipeline.core.contracts import BaseFacts
from pipeline.core.errors import UserError
from pipeline.fetch import fetch, hub_layout
from pipeline.fetch.glance import Glance, glance
from tests.made import meta_files
from tests.made.gguf_files import GGUF_SIZES, WINDOW, write_gguf
from tests.made.models import of_family, sharded, trained_words

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 1234\n"


def seen(path: Path) -> Glance:
    found = glance(path)
    assert found is not None
    return found


def fetched(path: Path) -> Any:
    """The facts that `fetch` writes, with its tokenizer."""
    fetch.write_base(params.Model(source=str(path), sha256=records.sha256_path(path), dtype="float32"))
    facts = records.read_json(paths.BASE_FACTS)
    return BaseFacts(**facts), AutoTokenizer.from_pretrained(paths.BASE)


def agrees(path: Path) -> Glance:
    """What is seen of a model, once it has been compared with what `fetch` makes of it."""
    found = seen(path)
    facts, tokenizer = fetched(path)
    assert (found.family, found.context, found.vocabulary) == (facts.family, facts.context, facts.vocabulary)
    assert found.chat_template == bool(tokenizer.chat_template)
    assert found.shape is not None
    held = [name for file in paths.BASE.glob("*.safetensors") for name in load_file(file)]
    assert found.biases == any(name.endswith(".bias") for name in held)
    for name, value in found.shape.model_dump().items():
        assert value == getattr(facts, name), name
    return found


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", hub_layout.FAMILIES)
def test_a_folder(family: str, tied: bool, tiny_model: Path, tmp_path: Path) -> None:
    assert agrees(of_family(family, tied, tiny_model, tmp_path / "m")).family == family


@pytest.mark.usefixtures("project")
def test_several_files(tiny_model: Path, tmp_path: Path) -> None:
    sharded(tmp_path / "m", tiny_model)
    agrees(tmp_path / "m")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("family", ["llama", *GGUF_SIZES])
def test_a_gguf_file(family: str, tiny_model: Path, tmp_path: Path) -> None:
    name = "gemma3_text" if family == "gemma3" else family
    folder = of_family(name, True, tiny_model, tmp_path / "m", **GGUF_SIZES.get(family, {}))
    write_gguf(folder, tmp_path / "m.gguf", family, **(WINDOW if family == "gemma3" else {}))
    assert agrees(tmp_path / "m.gguf").context == (16 if family == "gemma3" else 512)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("template", [None, "{{ messages }}", "x" * 70_000 + "{{ messages }}"])
def test_the_template_of_a_gguf_file(template: str | None, tiny_model: Path, tmp_path: Path) -> None:
    words = trained_words(tmp_path / "tokenizer.model", "bpe")
    folder = of_family("llama", True, tiny_model, tmp_path / "m")
    write_gguf(folder, tmp_path / "m.gguf", words=words, template=template)
    assert agrees(tmp_path / "m.gguf").chat_template == bool(template)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("settings", [{}, {"vocab_size": 300}, {"max_seq_len": 100}, {"rope_theta": 5e5}])
def test_meta_s_layout(settings: dict[str, Any], words: Path, tmp_path: Path) -> None:
    if "vocab_size" in settings:
        from sentencepiece import SentencePieceProcessor

        settings = {"vocab_size": SentencePieceProcessor(model_file=str(words)).vocab_size()}
    meta_files.written(tmp_path / "m", words, **settings)
    if settings.get("vocab_size"):
        agrees(tmp_path / "m")
        return
    facts, tokenizer = fetched(tmp_path / "m")
    assert seen(tmp_path / "m") == Glance("llama", facts.context, bool(tokenizer.chat_template), None, None)


# Configurations as they are in the wild


def test_what_a_configuration_leaves_out_is_what_transformers_assumes() -> None:
    assert hub_layout.TYPICAL.keys() == set(hub_layout.FAMILIES)
    for family, assumed in hub_layout.TYPICAL.items():
        own = AutoConfig.for_model(family).to_dict()
        assert assumed == {name: own[name] for name in assumed}
        plain = hub_layout.completed({"model_type": family})
        heads = plain.get("num_key_value_heads") or own["num_attention_heads"]
        assert heads == own["num_key_value_heads"]
        assert plain.get("tie_word_embeddings", False) == own["tie_word_embeddings"]
        width = own["hidden_size"] // own["num_attention_heads"]
        assert (plain.get("head_dim") or width) == (own.get("head_dim") or width)


SPARSE: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in hub_layout.FAMILIES),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 48}),
    ("mistral", {"sliding_window": 48, "use_sliding_window": False}),
    ("llama", {"sliding_window": 48}),
    ("qwen2", {"sliding_window": 48}),
    ("qwen2", {"sliding_window": 48, "use_sliding_window": False}),
    ("qwen2", {"sliding_window": 48, "use_sliding_window": True}),
    ("qwen3", {"sliding_window": 48, "use_sliding_window": True, "max_position_embeddings": 32}),
    ("smollm3", {"sliding_window": 48}),
    ("smollm3", {"sliding_window": 48, "use_sliding_window": True}),
    ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}}),
    ("phi3", {"rope_scaling": {"type": "yarn", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}}),
    (
        "phi3",
        {
            "rope_scaling": {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8},
            "original_max_position_embeddings": 96,
        },
    ),
    (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8,
                "original_max_position_embeddings": 96, "factor": 2.0,
            },
            "max_position_embeddings": 192,
        },
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}),
    ("gemma3_text", {"rope_scaling": None, "rope_local_base_freq": 10_000.0, "rope_theta": 1e6}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "said"), SPARSE)
def test_the_context_is_that_of_the_loaded_model(
    family: str, said: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Also where a configuration is as older versions wrote it, and says little."""
    from transformers import AutoModelForCausalLM

    from pipeline.model import checkpoint

    folder = of_family(family, True, tiny_model, tmp_path / "m")
    full = records.read_json(folder / "config.json")
    kept = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
        "pad_token_id",
    )
    sizes = {name: full[name] for name in (*kept, "num_key_value_heads", "head_dim") if name in full}
    records.write_json(folder / "config.json", sizes | {"tie_word_embeddings": True} | said)
    import torch

    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    facts = checkpoint.architecture(loaded)
    found = seen(folder)
    assert found.context == facts.context
    assert found.shape is not None
    for name, value in found.shape.model_dump(exclude={"tied_embeddings"}).items():
        assert value == getattr(facts, name), name


@pytest.mark.parametrize(
    "said",
    [
        {"max_position_embeddings": "9" * 500}, {"max_position_embeddings": -1}, {"num_attention_heads": 0},
        {"rope_scaling": "yarn"}, {"rope_parameters": [1]}, {"sliding_window": "x"}, {"num_attention_heads": []},
    ],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_tells_nothing(
    said: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    config = records.read_json(folder / "config.json")
    records.write_json(folder / "config.json", config | said)
    assert seen(folder) == Glance("llama", None, True, None, None)


# Templates


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("kind", ["alone", "empty", "in settings", "several", "additional", "none", "no settings"])
def test_the_template_of_a_folder(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    text = (folder / "chat_template.jinja").read_text()
    settings = records.read_json(folder / "tokenizer_config.json")
    if kind != "alone":
        (folder / "chat_template.jinja").unlink()
    if kind == "empty":
        (folder / "chat_template.jinja").write_text("")
    if kind == "in settings":
        records.write_json(folder / "tokenizer_config.json", settings | {"chat_template": text})
    if kind == "several":
        listed = [{"name": "default", "template": text}, {"name": "tool_use", "template": text}]
        records.write_json(folder / "tokenizer_config.json", settings | {"chat_template": listed})
    if kind == "additional":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "other.jinja").write_text(text)
    if kind == "no settings":
        (folder / "tokenizer_config.json").unlink()
    assert seen(folder).chat_template == bool(AutoTokenizer.from_pretrained(folder).chat_template)
    assert seen(folder).chat_template == (kind in ("alone", "in settings", "several", "additional"))


# What is refused


def test_where_nothing_is_nothing_is_seen(tmp_path: Path) -> None:
    assert glance(tmp_path / "nowhere") is None


def refused(path: Path, message: str) -> None:
    """At a glance, and by `fetch` with the same words."""
    with pytest.raises(UserError, match=message) as at_once:
        glance(path)
    with pytest.raises(UserError, match=message) as later:
        fetched(path)
    assert str(at_once.value) in str(later.value)
    assert not paths.BASE.exists()


UNFIT: dict[str, tuple[Any, str]] = {
    "family": (lambda f: changed(f, model_type="gpt2"), "not a causal language model of a known family"),
    "classifier": (lambda f: changed(f, architectures=["LlamaForSequenceClassification"]), "not a causal language"),
    "quantized": (lambda f: changed(f, quantization_config={"quant_method": "gptq"}), "quantized already"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no weights in safetensors"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "no config.json in this folder"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter beside the model"),
    "layers": (lambda f: changed(f, num_hidden_layers=1), "num_hidden_layers = 1, and its files hold 2 layers"),
}  # fmt: skip


def changed(folder: Path, **config: Any) -> None:
    records.write_json(folder / "config.json", records.read_json(folder / "config.json") | config)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("kind", UNFIT)
def test_what_is_visibly_unfit_is_refused(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    plant, message = UNFIT[kind]
    plant(folder)
    refused(folder, message)


@pytest.mark.usefixtures("project")
def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x")
    refused(tmp_path / "m.bin", "or a .gguf file")
    (tmp_path / "m.gguf").write_bytes(b"x")
    refused(tmp_path / "m.gguf", "not a sound GGUF file")
    (tmp_path / "e.gguf").write_bytes(b"")
    refused(tmp_path / "e.gguf", "does not begin with GGUF")


@pytest.mark.usefixtures("project")
def test_a_gguf_file_that_transformers_takes_for_mistral_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    import gguf

    of_family("llama", False, tiny_model, tmp_path / "m")
    added = gguf.GGUFWriter.add_block_count

    def named(writer: Any, count: int) -> None:
        added(writer, count)
        writer.add_name("mistral")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_block_count", named)
        write_gguf(tmp_path / "m", tmp_path / "m.gguf")
    refused(tmp_path / "m.gguf", "is named mistral .*; name the checkpoint in the Hugging Face layout instead")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "chat_template.jinja", "tokenizer.model", "merges.txt",
    ],
)  # fmt: skip
def test_a_pointer_of_git_lfs_in_a_folder_is_named(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(POINTER)
    refused(folder, f"{name} is a Git LFS pointer in place of the file: run `git lfs pull` where the repository was")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("index", [False, True])
def test_a_pointer_among_several_files_is_named(index: bool, tiny_model: Path, tmp_path: Path) -> None:
    part = sharded(tmp_path / "m", tiny_model)[1]
    pointer = tmp_path / "m" / "model.safetensors.index.json" if index else part
    pointer.write_text(POINTER)
    refused(tmp_path / "m", f"{pointer.name} is a Git LFS pointer")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth", "tokenizer.model"])
def test_a_pointer_in_meta_s_layout_is_named(name: str, words: Path, tmp_path: Path) -> None:
    meta_files.written(tmp_path / "m", words)
    (tmp_path / "m" / name).write_text(POINTER)
    refused(tmp_path / "m", f"{name} is a Git LFS pointer")


@pytest.mark.usefixtures("project")
def test_a_pointer_in_place_of_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text(POINTER)
    refused(tmp_path / "m.gguf", "m.gguf is a Git LFS pointer")


@pytest.mark.usefixtures("project")
def test_a_pointer_that_nothing_reads_is_no_fault(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    for name in ("picture.png", "consolidated.safetensors", "tokenizer.model", "onnx.bin"):
        (folder / name).write_text(POINTER)
    agrees(folder)


# How long it takes


def test_a_large_vocabulary_is_passed_over(tmp_path: Path) -> None:
    """A GGUF file of 262,144 words, in a new process, in which neither torch nor transformers is imported."""
    import gguf
    import numpy as np

    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in (("context_length", 4096), ("block_count", 1), ("embedding_length", 4),
                        ("feed_forward_length", 4), ("attention.head_count", 1)):  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    count = 262_144
    writer.add_token_list([f"word{number}" for number in range(count)])
    writer.add_token_scores([0.0] * count)
    writer.add_token_merges([f"a{number} b" for number in range(count)])
    writer.add_chat_template("{{ messages }}")
    for name, rows in (("token_embd", count), ("blk.0.ffn_up", 4), ("blk.0.attn_q", 4)):
        writer.add_tensor(f"{name}.weight", np.zeros((rows, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code = (
        "import sys, time, json\nfrom pathlib import Path\nfrom pipeline.fetch.glance import glance\n"
        "started = time.perf_counter()\nfound = glance(Path(sys.argv[1]))\n"
        "heavy = [name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules]\n"
        "seconds = time.perf_counter() - started\n"
        "print(json.dumps([found.context, found.chat_template, found.vocabulary, heavy, seconds]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    *found, seconds = json.loads(done.stdout)
    assert found == [4096, True, count, []]
    assert seconds < 5  # 0.2 on an idle machine; a dictionary of the words alone takes as long


def test_a_folder_is_seen_without_its_weights_and_vocabulary(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary that would take long, and weights whose bytes nobody reads."""
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / "tokenizer.json").write_text("[" * 10_000_000)
    read = Path.read_text

    def watched(path: Path, *args: Any, **options: Any) -> str:
        assert path.name != "tokenizer.json"
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", watched)
    started = time.perf_counter()
    assert seen(folder).context == 512
    assert time.perf_counter() - started < 5


EARLY: dict[str, tuple[dict[str, Any], str]] = {
    "context": ({"prompt": {"max_tokens": 513}}, "prompt.max_tokens = 513, but the model's context is 512 tokens"),
    "window": (
        {"probe": {"tokens": 513, "window": 513}},
        "forget.probes.general.window = 513, but the model's context is 512 tokens",
    ),
    "talk": (
        {"probe": {"style": "chat"}},
        "forget.probes.general.style = 'chat', but the model's tokenizer has no chat template: take this probe out of",
    ),
    "template": ({"prompt": {"style": "chat"}}, "prompt.style = 'chat', but the model's tokenizer has no chat"),
    "shard": (
        {"contamination": {"tokens": 512}},
        "contamination.tokens = 512, which with the token before it must fit into the model's context of 512 tokens",
    ),
    "no pin": ({"model": {"sha256": None}}, "model.sha256 is null: pin the content of"),
    "another pin": ({"model": {"sha256": "0" * 64}}, "If the change is meant, set model.sha256 to it"),
    "family": ({}, "not a causal language model of a known family"),
}  # fmt: skip


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("gguf_file", [False, True])
@pytest.mark.parametrize("kind", EARLY)
def test_what_is_cheap_to_see_is_said_before_torch_is_imported(
    kind: str, gguf_file: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """By the stage itself, in a process of its own; a tokenizer of many words would take a minute."""
    source = shutil.copytree(tiny_model, tmp_path / "m")
    if kind == "family":
        changed(source, model_type="gpt2")
    if kind in ("template", "talk"):
        (source / "chat_template.jinja").unlink()
    if gguf_file and kind != "family":
        words = trained_words(tmp_path / "tokenizer.model", "bpe")
        template = None if kind in ("template", "talk") else "{{ messages }}"
        write_gguf(source, tmp_path / "m.gguf", words=words, template=template)
        source = tmp_path / "m.gguf"
    yaml = YAML()
    content = yaml.load(paths.PARAMS)
    content["model"] |= {"source": str(source), "sha256": records.sha256_path(source)}
    change, message = EARLY[kind]
    for section, values in change.items():
        (content["forget"]["probes"][0] if section == "probe" else content[section]).update(values)
    if kind != "template":
        content["prompt"]["style"] = "plain"
    yaml.dump(content, paths.PARAMS)
    code = (
        "import sys\nfrom pipeline.core import params\nfrom pipeline.core.errors import UserError\n"
        "from pipeline.fetch import fetch\ngiven = params.load()\n"
        "try:\n    fetch.write_base(given.model, given)\nexcept UserError as error:\n    print(error)\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert message in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
