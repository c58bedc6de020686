"""What people read of the claims: no row is left out, and each becomes one MLflow run, once."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from claims import evidence, judge, register, report
from claims.evidence import Evidence
from pipeline.core import params, paths, records
from pipeline.record import seal, store
from pipeline.record.runs import CLAIM
from pipeline.score.significance import Interval
from tests import ROOT
from tests.made.claims import EXACT

SCALED = {**EXACT, "kind": "DIR", "distance": "a tenth of the size", "claim": "more | is better"}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT") if name]:
        monkeypatch.delenv(name, raising=False)
    paths.PARAMS.write_text((ROOT / "params.default.yaml").read_text())
    register.FILE.parent.mkdir()
    claims = {
        "product": {**EXACT, "amended": "after the first measurement, from five"},
        "wrong": {**EXACT, "published": {"four": 5}},
        "seeds": {**SCALED, "reproduced_when": [{"value": "gain", "above": 0.0}]},
        "large": {**SCALED, "kind": "FULL", "needs": {"gpu_gb": 24.0}, "recipe": "samsum-7b"},
    }
    YAML().dump({"claims": json.loads(json.dumps(claims))}, register.FILE)  # without aliases
    evidence.write("product", Evidence({"product": 4}, ["counted twice"]))
    evidence.write("wrong", Evidence({"product": 4}))
    evidence.write("seeds", Evidence({"gain": [1.0, -1.0, 2.0], "ratio": Interval(1.5, 1.0, 2.0)}))
    evidence.write("large", Evidence(not_run="a GPU with 24 GB"))
    for name in claims:
        judge.judge(name)


def verdicts() -> dict[str, str]:
    return {row["id"]: row["verdict"] for row in records.read_json(paths.CLAIMS)}


def test_every_claim_has_a_row_and_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    report.write()
    assert verdicts() == {
        "product": "reproduced",
        "wrong": "not reproduced",
        "seeds": "inconclusive",
        "large": "not run (needs a GPU with 24 GB)",
    }
    printed = capsys.readouterr().out
    assert "4 claims: 1 reproduced, 1 not reproduced, 1 inconclusive, 1 not run" in printed
    assert "not reproduced: wrong: product (4) = published.four (5)" in printed
    tracking = params.load().tracking
    runs = {run.name: run for run in store.stored(tracking, CLAIM)}
    assert set(runs) == set(verdicts())
    assert runs["wrong"].tags["claim.verdict"] == "not reproduced"
    assert runs["seeds"].metrics == {"gain": 2.0, "ratio": 1.5, "ratio_ci_low": 1.0, "ratio_ci_high": 2.0}
    assert runs["product"].params["published.four"] == "4.0"
    assert (runs["product"].params["id"], runs["product"].params["claim"]) == ("product", "twice two")
    held = store.read_back(tracking, runs["product"].run_id, Path("back"))
    assert seal.faults(runs["product"], held, Path("back")) == []
    assert json.loads(Path("back/product.json").read_text())
    assert store.stored(tracking) == []  # none of them is an experiment


def test_the_page_leaves_no_claim_out_and_nothing_breaks_its_table() -> None:
    report.write()
    page = report.MARKDOWN.read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert {line.replace("\\|", "").count("|") for line in table} == {7}
    assert "| ✗ product (4) = published.four (5) | **not reproduced** | EXACT |" in page.replace("\\_", "_")
    assert "counted twice" in page
    assert "](#seeds)<br>*Here:* a tenth of the size |" in page
    assert "](#wrong) |" in page
    assert "before the measurement, but for those of product: changed afterwards, as their sections tell.\n" in page
    assert page.count("- Changed after the first measurement, from five\n") == 1
    assert all(f"`dvc repro claims/dvc.yaml:claim@{name}`" in page for name in verdicts())


def test_the_same_evidence_is_recorded_once_and_other_evidence_anew() -> None:
    report.write()
    report.write()
    tracking = params.load().tracking
    assert len(store.stored(tracking, CLAIM)) == 4
    evidence.write("wrong", Evidence({"product": 5}))
    judge.judge("wrong")
    report.write()
    assert verdicts()["wrong"] == "reproduced"
    assert len(store.stored(tracking, CLAIM)) == 5


def test_time_is_told_where_it_was_spent_here_and_holds_what_is_shared() -> None:
    def spend(result: Path, seconds: float) -> None:
        records.write_json(paths.costs(result), {"seconds": seconds, "result_sha256": records.sha256_path(result)})

    def seconds() -> Any:
        report.write()
        return records.read_json(paths.CLAIMS)[0]["seconds"]

    assert seconds() is None
    spend(evidence.path("product"), 2.0)
    assert seconds() == 2.0
    shared = evidence.OUT / "arms" / "17.json"
    records.write_json(shared, {})
    evidence.write("product", Evidence({"product": 4}, uses=[str(shared)]))
    spend(evidence.path("product"), 2.0)
    assert seconds() is None  # the shared part came out of a cache
    spend(shared, 40.0)
    assert seconds() == 42.0
