"""The configuration: every mistake at once, each with its key; a stage sees only what it declares."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.core import params
from pipeline.core.errors import UserError
from tests import ROOT


def default() -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return content


def test_the_default_is_legal_and_reads_1e_3_as_a_number() -> None:
    loaded = params.load(ROOT / "params.yaml")
    assert loaded.train.learning_rate == 0.001
    assert "1e-3" in (ROOT / "params.yaml").read_text(encoding="utf-8")


def test_every_mistake_is_named_at_once() -> None:
    content = default()
    content["train"]["learning_rate"] = "abc"
    content["train"]["epoch"] = 3
    content["lora"]["r"] = 0
    content["quantize"]["method"] = "int3"
    content["lora"]["target_modules"] = []
    content["data"]["files"]["trian"] = "x"
    del content["model"]["dtype"]
    with pytest.raises(UserError) as caught:
        params.check(content, "params.yaml")
    text = str(caught.value)
    assert "params.yaml: " in text
    for part in (
        "train.learning_rate = 'abc': input should be a valid number",
        "train.epoch = 3: unknown key; did you mean epochs?",
        "lora.r = 0: input should be greater than or equal to 1",
        "quantize.method = 'int3': input should be 'nf4', 'fp4', 'int8', 'gptq', 'hqq' or 'none'",
        "lora.target_modules",
        "data.files.trian = 'x': unknown key; did you mean train?",
        "model.dtype: missing",
    ):
        assert part in text


def test_mistakes_of_several_sections_are_named_beside_those_of_one() -> None:
    """pydantic alone stops at the first rule across sections, and asks none if a value is wrong."""
    content = default()
    content["seeds"] = 17
    content["compare"]["decide_by"] = ["bleu"]
    content["runtime"] |= {"sharding": "fsdp", "processes": 1}
    found = params.draft(content, "params.yaml").problems
    assert [one.split(" = ")[0].split(" names")[0] for one in found] == [
        "seeds",
        "compare.decide_by",
        "runtime.sharding",
    ]
    content["seeds"] = [1, 1]
    with pytest.raises(UserError, match="3 errors"):
        params.check(content, "params.yaml")


def test_what_is_sound_of_a_draft_can_be_used() -> None:
    content = default()
    content["train"]["epochs"] = "three"
    del content["model"]
    draft = params.draft(content, "params.yaml")
    assert draft.get(params.Train) is None
    assert draft.get(params.Model) is None
    assert draft.get(params.Lora) == params.load(ROOT / "params.yaml").lora
    with pytest.raises(UserError, match="params.yaml must hold sections"):
        params.draft([1], "params.yaml")


def test_one_window_would_hold_all_the_general_text() -> None:
    content = default()
    content["forget"]["probes"][0] |= {"tokens": 64, "window": 128}
    with pytest.raises(UserError, match=r"forget.probes.0: tokens = 64 is below window = 128"):
        params.check(content, "params.yaml")
    content["forget"]["probes"] = []
    params.check(content, "params.yaml")


def test_one_source_in_forget_as_earlier_versions_had_it_is_said_how_to_write() -> None:
    content = default()
    old = {"source": "texts", "sha256": None, "files": "*.txt", "encoding": "utf-8", "column": None, "html": False}
    for source in ("texts", None):
        content["forget"] = old | {"source": source, "tokens": 64, "window": 16}
        with pytest.raises(
            UserError, match=r"forget: holds one source of text, as earlier .* probes: \[\{name: "
        ) as told:
            params.check(content, "params.yaml")
        assert len(told.value.problems) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "dialogue"}, "forget: two probes are named dialogue: a name is"),
        ({"name": "Dia logue"}, r"forget.probes.0.name = 'Dia logue': string should match pattern"),
        ({"style": "chat"}, "forget.probes.0: html must be false with style chat"),
        ({"style": "chat", "html": False, "column": None}, "forget.probes.0: column must name the column of the conv"),
        ({"style": "talk"}, "forget.probes.0.style = 'talk': input should be 'plain' or 'chat'"),
        ({"source": None}, "forget.probes.0.source = None"),
        ({"colum": "a"}, "forget.probes.0.colum = 'a': unknown key; did you mean column?"),
    ],
)
def test_a_probe_that_cannot_be_honoured_is_refused(change: dict[str, Any], told: str) -> None:
    content = default()
    content["forget"]["probes"][0] |= change
    with pytest.raises(UserError, match=told):
        params.check(content, "params.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "int8"}, "double_quantization must be false with method int8"),
        ({"method": "gptq"}, "double_quantization must be false with method gptq"),
        ({"method": "nf4", "group_size": 32}, "group_size must be 64 with method nf4: gptq and hqq alone have groups"),
        (
            {"method": "hqq", "double_quantization": False, "group_size": 48},
            "group_size = 48: input should be 32, 64 or",
        ),
        (
            {"method": "hqq", "double_quantization": False, "calibration_rows": 64},
            "calibration_rows must be 128 with method hqq: gptq alone reads rows",
        ),
        ({"method": "gptq", "double_quantization": False, "group_size": 128, "calibration_rows": 64}, None),
        ({"method": "hqq", "double_quantization": False, "group_size": 32}, None),
        ({"method": "fp4"}, None),
    ],
)
def test_what_a_quantization_method_does_not_read_is_refused(changes: dict[str, Any], message: str | None) -> None:
    content = default()
    content["quantize"] |= changes
    if message is None:
        assert params.check(content, "params.yaml").quantize.method == changes["method"]
        return
    with pytest.raises(UserError) as told:
        params.check(content, "params.yaml")
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharding": "fsdp", "processes": 1}, "runtime.sharding = 'fsdp' divides the base among processes, and"),
        ({"sharding": "fsdp"}, "sends weights as they are packed: set runtime.keep_dequantized to false"),
        ({"sharding": "fsdp", "method": "int8"}, "'int8': bitsandbytes keeps the constants of 8-bit layers where FSDP"),
        ({"sharding": "tensor"}, "with quantize.method = 'nf4': matrices that are packed in blocks cannot be cut"),
        ({"sharding": "tensor", "method": "none", "dropout": 0.1}, "'tensor' with lora.dropout above 0"),
        ({"sharding": "fsdp", "keep_dequantized": False}, None),
        ({"sharding": "fsdp", "method": "none", "dropout": 0.1}, None),
        ({"sharding": "tensor", "method": "none"}, None),
        ({"sharding": "tensor", "method": "hqq"}, "with quantize.method = 'hqq': matrices that are packed in blocks"),
        ({"sharding": "fsdp", "method": "gptq"}, "sends weights as they are packed: set runtime.keep_dequantized to"),
        ({"sharding": "fsdp", "method": "hqq", "keep_dequantized": False}, None),
    ],
)
def test_a_base_is_shared_where_that_can_be_honoured(changes: dict[str, Any], message: str | None) -> None:
    content = default()
    content["runtime"] |= {"processes": 2} | {key: value for key, value in changes.items() if key in content["runtime"]}
    content["quantize"]["method"] = changes.get("method", "nf4")
    content["quantize"]["double_quantization"] = content["quantize"]["method"] == "nf4"
    content["lora"]["dropout"] = changes.get("dropout", 0.0)
    if message is None:
        assert params.check(content, "params.yaml").runtime.sharding == changes["sharding"]
        return
    with pytest.raises(UserError) as told:
        params.check(content, "params.yaml")
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("quantize", "method", "none", "double_quantization must be false"),
        ("prompt", "template", "no place for it", "must hold {source}"),
        ("prompt", "template", "{source} {aspect}", "no other name in braces"),
        ("generation", "length_penalty", 2.0, "num_beams above 1"),
        ("data", "columns", {"source": "a", "target": "b", "id": None, "group": None, "aspect": None}, "format table"),
        ("data", "sha256", "abc", "data.sha256 = 'abc': string should match"),
        ("data", "sha256", ["0" * 64], "sha256 must be one digest, as source is one"),
        ("data", "source", ["a", "b"], "sha256 must be a list of 2, a digest or null for each source"),
        ("data", "source", [], "data.source = []: list should have at least 1 item"),
        ("data", "source", ["a", 5], "data.source.1 = 5: input should be a valid string"),
        ("data", "encoding", "utf-88", "data.encoding: 'utf-88' is not an encoding of text"),
        ("data", "encoding", "hex", "data.encoding: 'hex' is not an encoding of text"),
        ("data", "encoding", "idna", "data.encoding: 'idna' is not an encoding of text files"),
        ("data", "files", {"train": None, "validation": "v", "test": "t"}, "data.files.train = None"),
        ("data", "files", {"train": "t", "validation": [1], "test": "t"}, "data.files.validation.0 = 1"),
        ("data", "files", {"train": "t", "validation": None, "test": "t"}, "files.validation is null and holdout.val"),
        ("data", "holdout", {"validation": 0.6, "test": 0.0}, "data.holdout.validation = 0.6: input should be less"),
        ("data", "words", {"min": 0, "max": None}, "data.words.min = 0"),
        ("data", "words", {"min": 4, "max": 3}, "data.words: max = 3 is below min = 4"),
        ("lora", "r", 8.5, "lora.r = 8.5"),
        ("lora", "r", True, "lora.r = True"),
        ("train", "learning_rate", float("nan"), "learning_rate"),
        ("train", "learning_rate", float("inf"), "learning_rate"),
        ("train", "warmup", 1.5, "train.warmup: 1.5 is neither a share, which is below 1, nor a whole number of steps"),
        ("train", "warmup", -0.1, "train.warmup = -0.1: input should be greater than or equal to 0"),
        ("train", "decay", 0.2, "decay = 0.2 with schedule = 'linear', which has no phase of decay: set decay to null"),
        (
            "train",
            "optimizer",
            "muon",
            "beta2 = 0.999 with optimizer = 'muon', which has no such setting: set beta2 to",
        ),
        ("train", "optimizer", "adafactor", "beta2 = 0.999 with optimizer = 'adafactor'"),
        ("train", "label_smoothing", 1.0, "train.label_smoothing = 1.0: input should be less than 1"),
        ("train", "prompt_loss_weight", -0.1, "train.prompt_loss_weight = -0.1"),
        ("train", "prompt_loss_weight", 1.1, "train.prompt_loss_weight = 1.1"),
        ("train", "neftune_alpha", -1.0, "train.neftune_alpha = -1.0"),
        ("train", "turns", "first", "train.turns = 'first': input should be 'last' or 'all'"),
        ("train", "turns", "all", "train.turns = 'all' with data.format = 'aclsum', which has no conversations"),
        ("tracking", "uri", "https://me:a-secret@host", "tracking.uri: an address with a user name or password"),
        ("tracking", "uri", "postgresql://host/db?password=a-secret", "give the address as MLFLOW_TRACKING_URI"),
    ],
)
def test_what_is_illegal_is_refused(section: str, key: str, value: Any, message: str) -> None:
    content = default()
    content[section][key] = value
    with pytest.raises(UserError) as caught:
        params.check(content, "params.yaml")
    assert message in str(caught.value)
    assert "a-secret" not in str(caught.value)


@pytest.mark.parametrize("warmup", [0, 0.0, 0.1, 0.999, 1, 1.0, 40])
def test_a_warmup_is_a_share_or_a_number_of_steps(warmup: float) -> None:
    content = default()
    content["train"]["warmup"] = warmup
    assert params.check(content, "params.yaml").train.warmup == warmup


def test_a_setting_of_training_that_would_be_ignored_is_refused() -> None:
    content = default()
    content["train"] |= {"schedule": "wsd", "warmup": 0.5, "decay": 0.6}
    with pytest.raises(UserError, match="warmup = 0.5 and decay = 0.6 are more than all steps"):
        params.check(content, "params.yaml")
    content["train"] |= {"warmup": 0.85, "decay": None}
    with pytest.raises(UserError, match="warmup = 0.85 and decay = 0.2 are more than all steps"):
        params.check(content, "params.yaml")
    content["train"] |= {"warmup": 20, "optimizer": "muon", "beta2": None}
    assert params.check(content, "params.yaml").train.decay is None
    content["data"] |= {"format": "chat"}
    content["prompt"] |= {"style": "plain"}
    content["train"] |= {"turns": "all"}
    with pytest.raises(UserError, match="train.turns = 'all' with prompt.style = 'plain', which has no conversations"):
        params.check(content, "params.yaml")
    content["prompt"] |= {"style": "chat"}
    assert params.check(content, "params.yaml").train.turns == "all"


@pytest.mark.parametrize(("optimizer", "device"), [("paged-adamw8bit", "cpu"), ("adamw8bit", "mps")])
def test_an_optimizer_that_the_named_device_lacks_is_refused_before_anything_runs(optimizer: str, device: str) -> None:
    content = default()
    content["train"]["optimizer"] = optimizer
    content["runtime"]["device"] = device
    with pytest.raises(UserError, match=f"train.optimizer = '{optimizer}' needs .* runtime.device = '{device}'"):
        params.check(content, "params.yaml")
    content["runtime"]["device"] = "auto"
    assert params.check(content, "params.yaml").train.optimizer == optimizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "pisa"}, "lora.init: 'pisa' is none of default, gaussian, orthogonal, pissa, pissa_niter_<n>, olora"),
        ({"init": "pissa_niter_0"}, "lora.init: 'pissa_niter_0' is none of"),
        ({"init": "eva", "rank_pattern": {"q_proj": 2}}, "rank_pattern with init = 'eva'"),
        ({"init": "eva", "train_only": "A"}, "train_only = 'A' with init = 'eva', which sets B to zero"),
        ({"init": "orthogonal", "r": 7}, "init = 'orthogonal' halves the rank, and 7 is odd"),
        ({"init": "orthogonal", "rank_pattern": {"q_proj": 3}}, "init = 'orthogonal' halves the rank, and 3 is odd"),
        ({"train_only": "A"}, "train_only = 'A' with init = 'default', which sets B to zero"),
        ({"train_only": "A", "init": "gaussian"}, "train_only = 'A' with init = 'gaussian', which sets B to zero"),
        ({"train_only": "B", "plus_ratio": 2.0}, "plus_ratio = 2.0 with train_only = 'B'"),
        ({"dora": True, "init": "pissa"}, "dora = true with init = 'pissa': DoRA takes its magnitudes from the base"),
        ({"bias": "all", "init": "pissa"}, "bias = 'all' with init = 'pissa'"),
        ({"bias": "some"}, "lora.bias = 'some': input should be 'none', 'all' or 'lora_only'"),
        ({"layers": []}, "lora.layers = []"),
        ({"layers": [-1]}, "lora.layers.0 = -1"),
        ({"layers": [1, 1]}, "layers names a value twice"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern.q_proj = 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "lora.rank_pattern.q_proj = 2.5"),
        ({"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ({"alpha_pattern": {"": 2.0}}, "an empty name matches no layer"),
        ({"modules_to_save": ["q_proj"]}, "lora.modules_to_save.0 = 'q_proj': input should be 'embed_tokens' or"),
        ({"plus_ratio": 0}, "lora.plus_ratio = 0"),
    ],
)
def test_settings_of_an_adapter_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    content = default()
    content["quantize"] |= {"method": "none", "double_quantization": False}
    params.check(content, "params.yaml")
    content["lora"] |= changes
    with pytest.raises(UserError) as told:
        params.check(content, "params.yaml")
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("lora", "others", "message"),
    [
        ({"init": "pissa"}, {"quantize": {"method": "nf4"}}, "lora.init = 'pissa' with quantize.method = 'nf4'"),
        ({"init": "olora"}, {"quantize": {"method": "int8"}}, "lora.init = 'olora' with quantize.method = 'int8'"),
        ({"init": "loftq"}, {"quantize": {"method": "int8"}}, "lora.init = 'loftq' with quantize.method = 'int8'"),
        ({"init": "loftq"}, {"quantize": {"method": "nf4"}}, None),
        ({"init": "orthogonal"}, {"quantize": {"method": "nf4"}}, None),
        ({"init": "orthogonal"}, {"quantize": {"method": "int8"}}, "lora.init = 'orthogonal' with packed weights"),
        (
            {"init": "orthogonal"},
            {"quantize": {"method": "nf4"}, "runtime": {"keep_dequantized": False, "processes": 1}},
            "lora.init = 'orthogonal' with packed weights (quantize.method = 'nf4', runtime.keep_dequantized = false)",
        ),
        ({"init": "loftq"}, {"quantize": {"method": "fp4"}}, None),
        ({"init": "loftq"}, {"quantize": {"method": "hqq"}}, "lora.init = 'loftq' with quantize.method = 'hqq'"),
        ({"dora": True}, {"quantize": {"method": "hqq"}}, None),
        (
            {"dora": True},
            {"quantize": {"method": "gptq"}, "runtime": {"keep_dequantized": False, "processes": 1}},
            "lora.dora = true with packed weights (quantize.method = 'gptq'",
        ),
        ({"dora": True}, {"generation": {"backend": "vllm"}}, "lora.dora = true with generation.backend = 'vllm'"),
        (
            {"rank_pattern": {"q_proj": 4}},
            {"generation": {"backend": "vllm"}},
            "lora.rank_pattern = {'q_proj': 4} with",
        ),
        ({"rank_pattern": {"q_proj": 4}}, {"generation": {"backend": "llama.cpp"}}, None),
        (
            {"dora": True, "modules_to_save": ["lm_head"]},
            {"generation": {"backend": "llama.cpp"}},
            "'llama.cpp', which",
        ),
        ({"dora": True}, {"runtime": {"sharding": "fsdp"}}, "lora.dora = true with runtime.sharding = 'fsdp'"),
        ({"init": "pissa"}, {"runtime": {"sharding": "fsdp"}}, "lora.init = 'pissa' with runtime.sharding = 'fsdp'"),
        ({"init": "gaussian"}, {"runtime": {"sharding": "fsdp"}}, None),
        ({"init": "gaussian"}, {"runtime": {"sharding": "tensor"}}, "lora.init = 'gaussian' with runtime.sharding"),
        ({"train_only": "B"}, {"runtime": {"sharding": "tensor"}}, "lora.train_only = 'B' with runtime.sharding"),
        ({"plus_ratio": 16}, {"runtime": {"sharding": "tensor"}}, None),
        ({"bias": "all"}, {"runtime": {"sharding": "fsdp"}}, "lora.bias = 'all' with runtime.sharding = 'fsdp'"),
    ],
)
def test_an_adapter_that_base_backend_or_sharding_cannot_have_is_refused(
    lora: dict[str, Any], others: dict[str, dict[str, Any]], message: str | None
) -> None:
    content = default()
    content["lora"] |= lora
    content["quantize"] |= {"method": "none"} | others.get("quantize", {})
    content["quantize"]["double_quantization"] = content["quantize"]["method"] in ("nf4", "fp4")
    content["generation"] |= others.get("generation", {})
    content["runtime"] |= {"processes": 2 if "runtime" in others else 1} | others.get("runtime", {})
    if message is None:
        params.check(content, "params.yaml")
        return
    with pytest.raises(UserError) as told:
        params.check(content, "params.yaml")
    assert message in str(told.value)


def test_thinking_is_a_switch_of_chat_templates_and_must_be_given() -> None:
    content = default()
    for style, thinking in (("chat", True), ("chat", False), ("plain", False)):
        content["prompt"] |= {"style": style, "thinking": thinking}
        assert params.check(content, "params.yaml").prompt.thinking is thinking
    content["prompt"]["thinking"] = True
    with pytest.raises(UserError, match="prompt: thinking must be false with style plain"):
        params.check(content, "params.yaml")
    del content["prompt"]["thinking"]
    with pytest.raises(UserError, match="prompt.thinking: missing; every key must be present"):
        params.check(content, "params.yaml")


def test_one_mistake_in_a_value_or_list_is_one_error() -> None:
    content = default()
    content["data"]["sha256"] = "abc"
    content["data"]["files"]["test"] = 3
    with pytest.raises(UserError) as caught:
        params.check(content, "params.yaml")
    assert len(str(caught.value).splitlines()) == 3


def test_a_source_or_a_list_of_them_is_given_with_its_digests() -> None:
    content = default()
    one = params.check(content, "params.yaml").data
    assert one.pinned == [(one.source, one.sha256)]
    content["data"] |= {"source": ["a", "hf:b"], "sha256": ["0" * 64, None]}
    assert params.check(content, "params.yaml").data.pinned == [("a", "0" * 64), ("hf:b", None)]


def test_a_held_out_split_needs_no_file() -> None:
    content = default()
    content["data"] |= {"files": {"train": ["a", "b*"], "validation": None, "test": None}}
    content["data"] |= {"holdout": {"validation": 0.1, "test": 0.5}}
    assert params.check(content, "params.yaml").data.files.test is None


@pytest.mark.parametrize(
    ("seeds", "message"), [([1, 1], "seeds must differ"), ([], "at least 1 item"), ([-1], "seeds.0")]
)
def test_seeds_are_checked(seeds: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        params.check(default() | {"seeds": seeds}, "params.yaml")


def test_the_verdict_rests_on_metrics_that_are_computed() -> None:
    content = default()
    content["evaluate"]["metrics"] = ["rouge1"]
    with pytest.raises(UserError, match="evaluate.metrics does not compute"):
        params.check(content, "params.yaml")


def test_a_stage_cannot_read_what_it_does_not_declare() -> None:
    declared = params.read("quantize", ROOT)
    assert declared[params.Quantize].method == "nf4"
    assert declared[params.Runtime].device == "auto"
    with pytest.raises(LookupError, match="stage quantize does not declare the params section lora"):
        declared[params.Lora]


def test_every_knob_is_read_somewhere() -> None:
    """A knob that nothing reads is a promise that nothing keeps."""
    code = "".join(path.read_text() for path in sorted((ROOT / "pipeline").rglob("*.py")) if path.name != "params.py")
    code += "".join(path.read_text() for path in sorted((ROOT / "stages").glob("*.py")))
    knobs = [
        name for section in params.Section.__subclasses__() if hasattr(section, "key") for name in section.model_fields
    ]
    assert len(knobs) > 45
    assert [name for name in knobs if f".{name}" not in code] == []


def test_files_that_are_missing_or_not_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        params.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="is not YAML"):
        params.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must hold sections"):
        params.load(tmp_path / "params.yaml")
