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
    content["forget"] |= {"tokens": 64, "window": 128}
    with pytest.raises(UserError, match="forget: tokens = 64 is below window = 128"):
        params.check(content, "params.yaml")
    content["forget"]["source"] = None
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
