"""Who computes is chosen by name, and what one cannot do is refused before anything is computed."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.lora import adapter
from tests.made.parameters import edit
from tests.made.variants import decoded, quantized, trained

FAKE = """
import json, os, pathlib
__version__ = "9.9"
NOTES = pathlib.Path(os.environ["FAKE_NOTES"])

def note(what):
    with NOTES.open("a") as file:
        file.write(json.dumps(what) + "\\n")

class TokensPrompt(dict):
    pass

class SamplingParams:
    def __init__(self, **options):
        self.options = options

class Told:
    def __init__(self, **values):
        self.__dict__.update(values)

class LLM:
    def __init__(self, **options):
        note({"load": options})
    def generate(self, prompts, sampling, *, lora_request=None, use_tqdm=True):
        print("noise that vLLM writes to standard output")
        note({"prompts": len(prompts), "sampling": sampling.options, "lora": lora_request and lora_request.path})
        acts = -0.5 if lora_request and os.environ.get("FAKE_IDLE") is None else -0.1
        if os.environ.get("FAKE_DIES") and len(prompts) > 1:
            os._exit(7)
        likely = {5: Told(logprob=acts)}
        stop, wrong = sampling.options.get("stop_token_ids", [0])[0], int(os.environ.get("FAKE_WRONG", 0))
        return [
            Told(
                prompt_token_ids=[prompt["prompt_token_ids"][0] + wrong, *prompt["prompt_token_ids"][1:]],
                outputs=[Told(token_ids=[len(prompt["prompt_token_ids"]) + 40, stop], logprobs=[likely])],
            )
            for prompt in prompts
        ]
"""
FAKE_REQUEST = """
class LoRARequest:
    def __init__(self, name, number, path):
        self.path = path
"""
FAKE_TORCH = """
import os
__version__ = "8.8"
class cuda:
    is_available = staticmethod(lambda: os.environ.get("FAKE_CUDA") != "none")
"""


@pytest.fixture
def vllm(project: params.Params, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> params.Params:
    """A project whose vLLM is a fake beside a fake torch, run by a Python that finds those."""
    for name, text in {
        "vllm/__init__.py": FAKE, "vllm/lora/__init__.py": "", "vllm/lora/request.py": FAKE_REQUEST,
        "torch/__init__.py": FAKE_TORCH,
    }.items():  # fmt: skip
        (tmp_path / "fake" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fake" / name).write_text(text)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "fake"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("FAKE_NOTES", str(tmp_path / "notes"))
    quantized(project, tiny_model, "nf4")
    monkeypatch.setenv(params.VLLM_PYTHON, str(python))
    runtime = project.runtime.model_copy(update={"device": "auto"})
    return project.model_copy(update={"runtime": runtime})


def notes(tmp_path: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


def test_vllm_is_given_ids_plain_weights_and_the_adapter(vllm: params.Params, tmp_path: Path) -> None:
    rows = decoded(vllm, "tuned-17", trained(rslora=False), backend="vllm")
    assert {(row.tokens, row.finish) for row in rows} == {(2, "stop")}
    load, *calls = notes(tmp_path)
    options = load["load"]
    assert (options["dtype"], options["enable_lora"], options["max_lora_rank"]) == ("float32", True, 8)
    assert (options["generation_config"], options["skip_tokenizer_init"]) == ("vllm", True)
    assert options["max_model_len"] == max(row.prompt_tokens for row in rows) + 16
    assert options["max_num_seqs"] == 4
    assert "quantization_config" not in records.read_json(Path(options["model"]) / "config.json")
    acting = [call["lora"] is not None for call in calls]
    assert acting == [True, False, True, True, True, True, True]  # the proof, the round, four alone
    assert {call["sampling"]["temperature"] for call in calls} == {0.0}
    assert calls[2]["prompts"] == 8
    assert calls[2]["sampling"]["stop_token_ids"] == [1]
    decoding = records.read_json(paths.decoding("tuned-17"))
    assert (decoding["device"], decoding["threads"]) == ("cuda", 0)
    assert (decoding["generation"]["backend"], decoding["generation"]["vllm"]) == ("vllm", "9.9")


def test_vllm_computes_the_base_without_an_adapter(vllm: params.Params, tmp_path: Path) -> None:
    decoded(vllm, "base", None, backend="vllm", recheck=0)
    load, call = notes(tmp_path)
    assert "enable_lora" not in load["load"]
    assert call["lora"] is None


@pytest.mark.parametrize(
    ("fault", "value", "told"),
    [
        ("FAKE_CUDA", "none", "finds no CUDA device"),
        ("FAKE_IDLE", "1", "does not change what vLLM computes"),
        ("FAKE_WRONG", "1", "read other tokens than were sent"),
        ("FAKE_DIES", "1", "ended with exit code 7"),
    ],
)
def test_what_vllm_cannot_do_is_an_error(
    vllm: params.Params, monkeypatch: pytest.MonkeyPatch, fault: str, value: str, told: str
) -> None:
    monkeypatch.setenv(fault, value)
    with pytest.raises(UserError, match=told):
        decoded(vllm, "tuned-17", trained(rslora=False), backend="vllm")


def test_vllm_without_cuda_or_with_too_large_a_rank_is_not_started(vllm: params.Params, tmp_path: Path) -> None:
    saved = trained(rslora=False)
    config = records.read_json(saved.folder / adapter.CONFIG)
    records.write_json(saved.folder / adapter.CONFIG, config | {"r": 513})
    with pytest.raises(UserError, match="lora.r = 513, and vLLM takes adapters of rank 512 at most"):
        decoded(vllm, "tuned-17", saved, backend="vllm")
    runtime = vllm.runtime.model_copy(update={"device": "cpu"})
    with pytest.raises(UserError, match="computes on CUDA, but runtime.device = 'cpu'"):
        decoded(vllm.model_copy(update={"runtime": runtime}), "base", None, backend="vllm")
    assert not (tmp_path / "notes").exists()


def test_an_environment_without_vllm_is_told(vllm: params.Params, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "fake" / "vllm")
    with pytest.raises(UserError, match="has no usable vLLM"):
        decoded(vllm, "base", None, backend="vllm")


@pytest.mark.usefixtures("project")
def test_a_backend_that_is_not_installed_is_told_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    edit(generation={"backend": "vllm"})
    for stage in ("quantize", "train", "infer"):
        with pytest.raises(
            UserError, match=r"LORA_REPRO_VLLM is not set: .*pip install vllm==0.33.0, then export LORA_REPRO_VLLM="
        ):
            params.read(stage)
    params.read("compare")  # computes nothing: made elsewhere, it can be looked at here
    edit(generation={"backend": "llama.cpp"})
    params.read("train")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs xllamacpp.*pip install --require-hashes -r lock/llama-cpp.txt"):
        params.read("train")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"generation": {"num_beams": 4}}, "num_beams = 4: backend 'llama.cpp' can only decode greedily"),
        ({"generation": {"repetition_penalty": 1.2}}, "repetition_penalty = 1.2: backend"),
        ({"generation": {"no_repeat_ngram_size": 3}}, "no_repeat_ngram_size = 3: backend"),
        ({"quantize": {"method": "int8", "double_quantization": False}}, "which quantizes activations as well"),
    ],
)
@pytest.mark.usefixtures("project")
def test_what_only_transformers_does_is_a_mistake_in_params(changes: dict[str, dict[str, Any]], told: str) -> None:
    edit(**changes | {"generation": changes.get("generation", {}) | {"backend": "llama.cpp"}})
    with pytest.raises(UserError, match=told):
        params.load()
