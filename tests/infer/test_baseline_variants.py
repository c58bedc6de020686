"""The variants of the base: without quantization, and with demonstrations; and what is written if they are left out."""

from typing import Any

import pytest

from pipeline.core import baseline, contracts, params, paths, records
from pipeline.core.contracts import Skipped
from pipeline.core.params import Baseline
from pipeline.core.records import Decoding, Example, Prediction
from pipeline.infer import infer, scheduler
from pipeline.model import load
from tests.made.variants import decoded
from tests.made.variants import quantized as quantized_by

ASKED = Baseline(unquantized=True, shots=2, choice="random", seed=1, rows=4)


def unquantized(project: params.Params, **change: Any) -> list[Prediction]:
    generation = project.generation.model_copy(update={"gguf_type": "F32", "max_new_tokens": 16} | change)
    infer.decode_unquantized(None, 4, project.prompt, generation, project.runtime)
    return records.read_rows(paths.predictions(paths.UNQUANTIZED), Prediction)


def shots(project: params.Params, asked: Baseline = ASKED, **change: Any) -> list[Prediction]:
    generation = project.generation.model_copy(update={"gguf_type": "F32", "max_new_tokens": 16} | change)
    infer.decode_shots(asked, project.prompt, generation, project.runtime)
    return records.read_rows(paths.predictions(paths.SHOTS), Prediction)


def decoding(variant: str) -> Decoding:
    return contracts.read(paths.decoding(variant), Decoding)


@pytest.mark.parametrize("backend", ["transformers", "llama.cpp"])
def test_without_quantization_the_base_writes_what_it_writes_where_none_is_asked(
    backend: str, project: params.Params, tiny_model: Any
) -> None:
    given = quantized_by(project, tiny_model)
    own = unquantized(given, backend=backend)
    whole = decoded(given, "base", None, backend=backend)
    rows = decoding(paths.UNQUANTIZED).rows
    assert rows == baseline.rows(records.read_rows(paths.split("test"), Example), 4)
    assert [(one.id, one.text, one.prompt_sha256) for one in own] == [
        (whole[row].id, whole[row].text, whole[row].prompt_sha256) for row in rows
    ]


def test_the_model_is_the_base_and_not_the_quantized_one(quantized: params.Params) -> None:
    unquantized(quantized)
    shots(quantized)
    facts = [records.read_json(path)["sha256"] for path in (paths.BASE_FACTS, paths.QUANTIZED_FACTS)]
    assert [decoding(name).model_sha256 for name in (paths.UNQUANTIZED, paths.SHOTS)] == facts
    assert facts[0] != facts[1]


@pytest.mark.parametrize("backend", ["transformers", "llama.cpp"])
def test_demonstrations_are_in_the_prompts_and_in_the_record(backend: str, quantized: params.Params) -> None:
    base = decoded(quantized, "base", None, backend=backend)
    rows = shots(quantized, backend=backend)
    found = decoding(paths.SHOTS)
    assert found.rows is not None
    assert found.demonstrations is not None
    assert len(found.demonstrations.ids[0]) == 2
    added = [own.prompt_tokens - base[row].prompt_tokens for own, row in zip(rows, found.rows, strict=True)]
    assert added == found.demonstrations.tokens
    assert min(added) > 0


def test_a_beginning_that_all_prompts_share_is_computed_once_and_changes_no_token(
    quantized: params.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ASKED.model_copy(update={"shots": 8, "rows": None})
    original, computed = scheduler._Scheduler._forward, []

    def counts(self: Any, module: Any, first: int, rows: list[list[int]], starts: list[int]) -> Any:
        computed.append(sum(map(len, rows)))
        return original(self, module, first, rows, starts)

    monkeypatch.setattr(scheduler._Scheduler, "_forward", counts)
    monkeypatch.setattr(scheduler, "COMMON", 10_000)
    apart = shots(quantized, asked, recheck=0)
    each = sum(computed)
    computed.clear()
    monkeypatch.setattr(scheduler, "COMMON", 16)
    assert shots(quantized, asked, recheck=0) == apart
    tokens = decoding(paths.SHOTS).demonstrations
    assert tokens is not None
    assert each - sum(computed) > 2 * min(tokens.tokens)


def test_what_is_left_out_is_said_without_a_model(project: params.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "base", lambda *_: pytest.fail("a model was loaded"))
    for off in ("baseline.unquantized is false", "quantize.method is none: the base is not quantized"):
        infer.decode_unquantized(off, 4, project.prompt, project.generation, project.runtime)
        found = contracts.read_or_skipped(paths.decoding(paths.UNQUANTIZED), Decoding)
        assert found == Skipped(paths.UNQUANTIZED, off)
    none = ASKED.model_copy(update={"shots": 0})
    infer.decode_shots(none, project.prompt, project.generation, project.runtime)
    found = contracts.read_or_skipped(paths.decoding(paths.SHOTS), Decoding)
    assert found == Skipped(paths.SHOTS, "baseline.shots is 0")
    assert paths.predictions(paths.SHOTS).read_text() == ""


@pytest.mark.parametrize(
    ("asked", "method", "off"),
    [(True, "nf4", False), (True, "int8", False), (True, "none", True), (False, "nf4", True), (False, "none", True)],
)
def test_the_unquantized_base_is_a_variant_where_another_is_tuned(asked: bool, method: str, off: bool) -> None:
    assert (baseline.unquantized_off(asked, method) is not None) == off
