"""Stage claim: the verdict on one claim, from its evidence and its conditions."""

import argparse
from dataclasses import asdict
from pathlib import Path

from claims import evidence, register
from pipeline.core import records, stage
from pipeline.core.progress import say


def path(claim: str) -> Path:
    """The file of the verdict on one claim."""
    return evidence.OUT / "verdicts" / f"{claim}.json"


def judge(name: str) -> None:
    judgment = register.judge(register.one(name), evidence.read(name))
    records.write_json(path(name), asdict(judgment))
    say(f"{name}: {judgment.verdict}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claim")
    claim = parser.parse_args().claim
    stage.process(f"judge-{claim}", lambda: judge(claim))
