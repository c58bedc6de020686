"""Stage report: every claim with its evidence and verdict, as a page, as JSON, and as an MLflow run."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from claims import evidence, judge, register
from claims.evidence import Evidence, Value
from claims.register import Claim, Finding, Judgment
from pipeline.core import params, paths, records, stage
from pipeline.core.progress import say
from pipeline.record import address, provenance, runs, store, track
from pipeline.record.runs import Point, Record
from pipeline.report import page, wording
from pipeline.score.significance import Interval

TEMPLATE = "claims.md.jinja"
MARKDOWN = paths.REPORTS / "claims.md"


@dataclass(frozen=True, slots=True)
class Row:
    """A checked claim. `seconds`: the duration of the measurement; None if the evidence was not measured here."""

    id: str
    claim: Claim
    evidence: Evidence
    judgment: Judgment
    seconds: float | None

    @property
    def command(self) -> str:
        return f"dvc repro claims/dvc.yaml:claim@{self.id}"

    @property
    def verdict(self) -> str:
        needs = f" (needs {self.evidence.not_run})" if self.evidence.not_run else ""
        return f"{self.judgment.verdict}{needs}"


def write() -> None:
    """Write `reports/claims.md` and `reports/claims.json`, bring the experiment's page up to date, and record."""
    rows = [_row(name, claim) for name, claim in register.load().items()]
    records.write_json(paths.CLAIMS, [content(row) for row in rows])
    records.write_text(MARKDOWN, markdown(rows))
    given = params.load()
    # The page of an experiment, if there is one, shows the claims below it.
    if paths.COMPARISON_MD.exists() and not page.faults(paths.REPORT_HTML, page.digest_of(paths.REPORT_HTML) or ""):
        seen = track.looks_here(given.seeds, given.tracking)
        page.write(given.seeds, given.evaluate, given.compare.explorer, seen)
    counted = {verdict: sum(row.judgment.verdict == verdict for row in rows) for verdict in register.VERDICTS}
    say(f"{len(rows)} claims: " + ", ".join(f"{count} {verdict}" for verdict, count in counted.items() if count))
    for row in rows:
        if row.judgment.verdict == "not reproduced":
            failed = [finding.text for finding in row.judgment.findings if finding.holds is False]
            say(f"not reproduced: {row.id}: {'; '.join(failed)}")
    written = store.write([record(row) for row in rows], given.tracking)
    new = sum(word == "recorded" for _, word in written)
    say(f"{new} of {len(rows)} recorded in {address.shown(given.tracking)}; the others were recorded before")


def content(row: Row) -> dict[str, Any]:
    """A row of `reports/claims.json`, which the experiment's page reads as well."""
    return {
        "id": row.id,
        **row.claim.model_dump(
            include={"kind", "claim", "paper", "place", "published", "check", "distance", "amended"}
        ),
        "verdict": row.verdict,
        "state": row.judgment.verdict,
        "findings": [asdict(finding) for finding in row.judgment.findings],
        "values": {name: asdict(v) if isinstance(v, Interval) else v for name, v in row.evidence.values.items()},
        "not_comparable": row.evidence.not_comparable,
        "notes": row.evidence.notes,
        "seconds": row.seconds,
        "command": row.command,
    }


def markdown(rows: list[Row]) -> str:
    environment = wording.environment(Path(__file__).parent)
    environment.filters |= {"value": register.shown, "sign": sign}
    return environment.get_template(TEMPLATE).render(
        rows=rows, verdicts=register.VERDICTS, machine=provenance.platform_facts()
    )


def sign(finding: Finding) -> str:
    return {True: "✓", False: "✗", None: "?"}[finding.holds]


def record(row: Row) -> Record:
    """The immutable run of a claim as the register has it, with this evidence."""
    held = {"claim": row.claim.model_dump(mode="json"), "evidence": asdict(row.evidence), "verdict": row.verdict}
    values = {"id": row.id, **row.claim.model_dump(mode="json", exclude={"published"})}
    values |= {f"published.{name}": figure for name, figure in row.claim.published.items()}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    commit, dirty = provenance.commit(Path())
    tags = {
        runs.CLAIM: records.sha256_text(json.dumps(held, sort_keys=True)),
        "kind": "claim",
        "claim.id": row.id,
        "claim.verdict": row.judgment.verdict,
        runs.COMMITS: commit,
        runs.COMMIT: commit,
        "git.dirty": str(dirty).lower(),
        "mlflow.source.name": "dvc repro claims/dvc.yaml",
        runs.NOTE: f"**{row.verdict}**: {row.claim.claim} ({row.claim.paper}, {row.claim.place})",
        **runs.surroundings(),
    }
    return Record(
        name=row.id,
        tags={name: value for name, value in tags.items() if value},
        params={name: runs.cut(text, "reports/claims.json") for name, text in texts.items()},
        metrics=_points(row.evidence.values),
        predictions={},
        files=[(evidence.path(row.id), None), (judge.path(row.id), None), (register.FILE, None)],
    )


def _points(values: Mapping[str, Value]) -> list[Point]:
    """Metrics for MLflow: three for an interval, and a step from 0 on for each seed's value."""
    points = []
    for name, value in values.items():
        if isinstance(value, Interval):
            ends = {"": value.value, "_ci_low": value.low, "_ci_high": value.high}
            points += [Point(f"{name}{end}", number) for end, number in ends.items()]
        elif isinstance(value, list):
            points += [Point(name, number, step) for step, number in enumerate(value)]
        else:
            points.append(Point(name, value))
    return points


def _row(name: str, claim: Claim) -> Row:
    judgment = records.read_json(judge.path(name))
    findings = [Finding(**finding) for finding in judgment["findings"]]
    found = evidence.read(name)
    spent = [_seconds(path) for path in (evidence.path(name), *map(Path, found.uses))]
    seconds = None if None in spent else sum(filter(None, spent))
    return Row(name, claim, found, Judgment(judgment["verdict"], findings), seconds)


def _seconds(result: Path) -> float | None:
    """The seconds that a result took in this folder; None if it came from a cache."""
    noted = paths.costs(result)
    cost = records.read_json(noted) if noted.exists() else {}
    own = bool(cost) and cost["result_sha256"] == records.sha256_path(result)
    return float(cost["seconds"]) if own else None


if __name__ == "__main__":
    stage.process("claims-report", write)
