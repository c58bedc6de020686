"""Claims that need a GPU and the model hub: with both, the recipe's whole experiment runs, base and tuned."""

import argparse
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from claims import evidence, register
from claims.evidence import Evidence
from pipeline.commands import use
from pipeline.core import paths, records, stage
from pipeline.core.progress import say

SECONDS_FOR_THE_HUB = 10.0


def measure(name: str) -> Evidence:
    """Run the recipe of a claim in a clone, or report what is missing. The values come from `reports/metrics.json`, in
    points: `rouge1`, `rouge2`, ... for the tuned model, `rouge1_base` and so on for the base."""
    claim = register.one(name)
    missing = _missing(claim.needs)
    if claim.recipe is None:
        missing.append("benchmarks that this project does not score")
    if missing or claim.recipe is None:
        return Evidence(not_run=", ".join(missing))
    with tempfile.TemporaryDirectory(prefix="lora-repro-") as folder:
        clone = Path(folder) / "clone"
        for command in (
            ["git", "clone", "--quiet", str(Path.cwd()), str(clone)],
            ["lora-repro", "use", claim.recipe],
            ["dvc", "repro", "compare"],
        ):
            say(" ".join(command))
            subprocess.run(command, cwd=clone if clone.exists() else None, check=True, stdout=sys.stdout)
        return _scores(records.read_json(clone / paths.METRICS))


def _scores(metrics: dict[str, dict[str, float]]) -> Evidence:
    names = [name for name, scores in metrics.items() if isinstance(scores, dict) and {"base", "tuned"} <= set(scores)]
    tuned = {name: metrics[name]["tuned"] for name in names if name.startswith("rouge")}
    base = {f"{name}_base": metrics[name]["base"] for name in tuned}
    return Evidence(values={**tuned, **base})


def _missing(needs: use.Needs) -> list[str]:
    """What this machine lacks, as a verdict prints it behind "needs"."""
    missing = []
    if needs.gpu_gb and not any(gb >= needs.gpu_gb for _, gb in use.gpus()):
        missing.append(f"a GPU with {needs.gpu_gb:g} GB")
    if needs.hub and not _reaches_the_hub():
        missing.append("the Hugging Face hub")
    return missing


def _reaches_the_hub() -> bool:
    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=SECONDS_FOR_THE_HUB):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claim")
    claim = parser.parse_args().claim
    stage.process(f"claim-{claim}", lambda: evidence.write(claim, measure(claim)), result=evidence.path(claim))
