"""llama.cpp computes what transformers computes, from files that hold the same numbers, and stops where it should."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core import params, paths, records
from pipeline.core.errors import UserError
from pipeline.infer import backend_llamacpp
from tests.made import parameters
from tests.made.models import of_family
from tests.made.variants import decoded, quantized, ties, trained

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied", "method", "changes"),
    [
        ("llama", True, "none", {"attention_bias": True, "mlp_bias": True}),
        ("llama", False, "nf4", {}),
        ("llama", True, "hqq", {}),
        ("mistral", True, "none", {}),
        ("qwen2", True, "none", {}),
        ("qwen3", False, "none", {}),
    ],
)
def test_base_and_adapted_write_what_transformers_writes(
    project: params.Params,
    tiny_model: Path,
    tmp_path: Path,
    family: str,
    tied: bool,
    method: str,
    changes: dict[str, Any],
) -> None:
    quantized(project, of_family(family, tied, tiny_model, tmp_path / family, **changes), method)
    saved = trained(rslora=family == "llama")
    written = {}
    for name in ("transformers", "llama.cpp"):
        written[name] = [
            decoded(project, "base", None, backend=name),
            decoded(project, "tuned-17", saved, backend=name),
        ]
        told = records.read_json(paths.decoding("tuned-17"))
        assert told["generation"]["backend"] == name
        assert told["recheck"] == {"examples": 4, "identical": 4}
    assert written["llama.cpp"][0] == written["transformers"][0]
    near = ties(project, saved)  # in a random model two tokens may be as likely as each other, up to rounding
    assert len(near) <= 2
    pairs = zip(written["llama.cpp"][1], written["transformers"][1], strict=True)
    assert [one.id for one, other in pairs if one != other and one.id not in near] == []
    assert written["llama.cpp"][0] != written["llama.cpp"][1]
    assert list(paths.SCRATCH.glob(".*.part")) == []


class Answers:
    """A server whose answers are written down beforehand, and what it was asked."""

    def __init__(self, *waves: list[tuple[list[int], str]]) -> None:
        self.waves, self.asked = list(waves), list[dict[str, Any]]()

    def __call__(self, server: Any, what: str, body: dict[str, Any]) -> Any:
        assert (server, what) == ("server", "completion")
        self.asked.append(body)
        answers = [
            {"index": at, "tokens": tokens, "stop_type": stop, "tokens_evaluated": len(prompt), "truncated": False,
             "prompt": " ".join(map(str, prompt))}
            for at, (prompt, (tokens, stop)) in enumerate(zip(body["prompt"], self.waves.pop(0), strict=True))
        ]  # fmt: skip
        return answers[0] if len(answers) == 1 else answers[::-1]


class Numbers:
    """A tokenizer whose text is the ids."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def engine(**changes: Any) -> backend_llamacpp.Engine:
    settings: dict[str, Any] = {
        "server": "server", "stops": frozenset([9]), "new_tokens": 4, "tokenizer": Numbers(), "device": "cpu",
        "threads": 1, "conditions": {},
    }  # fmt: skip
    return backend_llamacpp.Engine(**settings | changes)


def test_families_go_in_waves_and_answers_end_at_our_stops_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Answers(
        [([5, 9], "eos"), ([5, 7], "eos")],  # 7 ends an answer for llama.cpp, for us it does not
        [([6, 8, 8, 8], "limit")],  # asked for two more: what is beyond is not ours
        [([9], "eos"), ([4, 9, 5, 5], "limit")],  # 9 ends an answer for us, for llama.cpp it does not
    )
    monkeypatch.setattr(backend_llamacpp, "post", told)
    families = [[("a/1", [1, 2]), ("a/2", [1, 3])], [("b/1", [4, 4]), ("b/2", [4, 5])]]
    found = dict(backend_llamacpp.complete(engine(), families))
    assert found == {"a/1": [5, 9], "b/1": [5, 7, 6, 8], "a/2": [9], "b/2": [4, 9]}
    assert [body["prompt"] for body in told.asked] == [[[1, 2], [4, 4]], [[4, 4, 5, 7]], [[1, 3], [4, 5]]]
    assert [body["n_predict"] for body in told.asked] == [4, 2, 4]
    assert {(body["top_k"], tuple(body["samplers"])) for body in told.asked} == {(1, ("top_k",))}


def test_an_answer_to_other_tokens_or_of_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"tokens_evaluated": 2, "prompt": " 1 2", "truncated": False}
    backend_llamacpp.require_read(Numbers(), [1, 2], answer)
    backend_llamacpp.require_read(Numbers(), [1, 2], answer | {"prompt": "12"})
    for change in ({"tokens_evaluated": 3}, {"prompt": "1 3"}, {"truncated": True}):
        with pytest.raises(UserError, match="its vocabulary is another"):
            backend_llamacpp.require_read(Numbers(), [1, 2], answer | change)
    monkeypatch.setattr(backend_llamacpp, "post", Answers([([], "none")]))
    with pytest.raises(UserError, match="wrote nothing behind 2 tokens"):
        list(backend_llamacpp.complete(engine(), [[("a", [1, 2])]]))


@pytest.mark.parametrize(
    ("asked", "names", "found"),
    [
        ("auto", ["CPU"], "cpu"),
        ("auto", ["CUDA0", "CPU"], "cuda"),
        ("auto", ["Metal", "BLAS", "CPU"], "mps"),
        ("cpu", ["CUDA0", "CPU"], "cpu"),
        ("cuda", ["CUDA0", "CPU"], "cuda"),
        ("mps", ["MTL0", "CPU"], "mps"),
        ("cuda", ["Metal", "CPU"], None),
        ("mps", ["CPU"], None),
    ],
)
def test_the_device_is_one_of_this_build_of_llama_cpp(
    monkeypatch: pytest.MonkeyPatch, asked: Any, names: list[str], found: str | None
) -> None:
    import xllamacpp

    monkeypatch.setattr(xllamacpp, "get_device_info", lambda: [{"name": name} for name in names])
    runtime = parameters.runtime(device=asked)
    if found is None:
        with pytest.raises(UserError, match=f"runtime.device = '{asked}', but this build of llama.cpp offers"):
            backend_llamacpp._device(runtime)
    else:
        assert backend_llamacpp._device(runtime) == found


@pytest.mark.parametrize(("device", "layers"), [("cpu", 0), ("cuda", 999), ("mps", 999)])
def test_an_accelerator_computes_every_layer_and_the_cpu_alone_none_of_it(
    monkeypatch: pytest.MonkeyPatch, device: str, layers: int
) -> None:
    import xllamacpp

    monkeypatch.setattr(xllamacpp, "Server", lambda wanted: wanted)
    wanted = backend_llamacpp.serve(Path("b"), Path("a"), "F16", 3, 100, 2, device)
    assert wanted.n_gpu_layers == layers
    assert wanted.no_kv_offload == wanted.no_op_offload == (device == "cpu")
    assert (wanted.n_parallel, wanted.n_ctx, wanted.cpuparams.n_threads) == (3, 303, 2)
    assert [(one.path, one.scale) for one in wanted.lora_adapters] == [("a", 1.0)]


def test_a_file_that_llama_cpp_cannot_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(UserError, match="llama.cpp cannot load"):
        backend_llamacpp.serve(tmp_path / "base.gguf", None, "F16", 1, 64, 1, "cpu")
