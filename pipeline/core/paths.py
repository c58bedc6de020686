"""All paths, relative to the project folder, which is the working directory of every stage.

`out/` belongs to DVC: cached, and ignored by git. `reports/` is for people and kept in git. It gets a copy of
`out/comparison`, since DVC caches no file that git keeps, except metrics and plots. `reports/index.html` is not in git,
because it also shows what differs between machines. `.scratch/` holds the leftovers of killed stages, never an output.
"""

import os
from pathlib import Path, PurePosixPath

from pipeline.core.errors import UserError

PARAMS = Path("params.yaml")
DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")
CONSTRAINTS = Path("constraints.txt")

OUT = Path("out")
CHECKED = OUT / "checked.json"
DATA = OUT / "data"
DATA_CARD = DATA / "card.json"
BASE = OUT / "models" / "base"
BASE_FACTS = OUT / "models" / "base.json"
FITTING = OUT / "fitting.json"
QUANTIZED = OUT / "models" / "quantized"
QUANTIZED_FACTS = OUT / "models" / "quantized.json"
ADAPTERS = OUT / "adapters"
TRAINING = OUT / "training"
PREDICTIONS = OUT / "predictions"
SCORES = OUT / "scores"
FORGETTING = OUT / "forgetting"
CONTAMINATION = OUT / "contamination.json"
COSTS = OUT / "costs"
RECEIPT = OUT / "receipt.json"

COMPARISON = OUT / "comparison"
COMPARISON_JSON = COMPARISON / "comparison.json"
"""The comparison for later stages. The folder's other files are for people."""
COMPARISON_MD = COMPARISON / "comparison.md"
COMPARISON_SVG = COMPARISON / "comparison.svg"
FIGURES = COMPARISON / "figures"
TABLES = COMPARISON / "tables"

REPORTS = Path("reports")
METRICS = REPORTS / "metrics.json"
CLAIMS = REPORTS / "claims.json"
"""The verdicts of the claims' pipeline; missing if it has never run."""
REPORT_HTML = REPORTS / "index.html"
PARITY_JSON = REPORTS / "parity.json"
PARITY_MD = REPORTS / "parity.md"
PLOT_INTERVALS = REPORTS / "plots" / "intervals.csv"
PLOT_CURVES = REPORTS / "plots" / "curves.csv"
PLOT_LENGTHS = REPORTS / "plots" / "lengths.csv"

SCRATCH = Path(".scratch")

SWEEPS = Path(".sweeps")
"""Searches: Optuna's database, and the clones that trials run in."""

SPLITS = ("train", "validation", "test")


MAIN = "LORA_REPRO_MAIN"
"""The environment variable that tells a trial of a search, which runs in a clone, the project it belongs to."""


def main_repository() -> Path:
    """The project that owns the records and the local sources: the one that an experiment in a copy came from.

    DVC names it in DVC_ROOT to temporary experiments, a search in `MAIN` to its trials. Either counts only if it has a
    `.dvc` and holds this folder: copies are under `<main>/.dvc/tmp` and `<main>/.sweeps`. Else it is the nearest folder
    upwards with a `.dvc`, or the current folder.
    """
    here = Path.cwd().resolve()
    upwards = [here, *here.parents]
    for given in filter(None, map(os.environ.get, (MAIN, "DVC_ROOT"))):
        root = Path(given).resolve()
        if root in upwards and (root / ".dvc").is_dir():
            return root
    return next((folder for folder in upwards if (folder / ".dvc").is_dir()), here)


def require_utf8(path: Path, doing: str) -> None:
    """UserError, which begins with `doing`, for a path that is not UTF-8: DVC, MLflow and tokenizers open no such."""
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise UserError(
            f"{doing} {str(path)!a}, whose name is not UTF-8 in this locale: rename it, or set PYTHONUTF8=1 if it is "
            "UTF-8"
        )


def relative(name: str) -> str:
    """Return `name`, a path out of a stranger's file. ValueError unless it is relative and never goes up."""
    path = PurePosixPath(name)
    if not path.parts or ".." in path.parts or path.is_absolute() or "\0" in name:
        raise ValueError(f"the path {name!r} leads out of the project")
    return name


def inside(folder: Path, name: str) -> Path:
    """`folder / name`. ValueError if `name` is not `relative`, or if a link leads out of the folder."""
    path = folder / relative(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the path {name!r} leads out of {folder} by a link")
    return path


def split(name: str) -> Path:
    """`out/data/<split>.jsonl`, one `records.Example` a line."""
    return DATA / f"{name}.jsonl"


def adapter(seed: int) -> Path:
    """The adapter of one training seed, in PEFT's own format."""
    return ADAPTERS / str(seed)


def training_summary(seed: int) -> Path:
    return TRAINING / f"{seed}.json"


def training_log(seed: int) -> Path:
    """The training curve, one row an optimizer step."""
    return TRAINING / f"{seed}.csv"


def forgetting(seed: int) -> Path:
    """The effect of one seed's adapter on the probes of forgetting: `contracts.Forgetting`."""
    return FORGETTING / f"{seed}.json"


def variant(seed: int | None) -> str:
    """`base` without an adapter, `tuned-<seed>` with one."""
    return "base" if seed is None else f"tuned-{seed}"


UNQUANTIZED, SHOTS = "base-unquantized", "base-shots"
"""The variants of the base that `baseline` asks for: without quantization, and with demonstrations in its prompt."""


def predictions(variant: str) -> Path:
    """One `records.Prediction` a line, in the order of the test split."""
    return PREDICTIONS / f"{variant}.jsonl"


def decoding(variant: str) -> Path:
    """How the predictions of a variant were made: `records.Decoding`."""
    return PREDICTIONS / f"{variant}.json"


def scores(variant: str) -> Path:
    return SCORES / f"{variant}.json"


def is_published(path: Path) -> bool:
    """Whether `reports/` gets a copy of a file: true of the files in `COMPARISON` that people read."""
    return path.is_relative_to(COMPARISON) and path != COMPARISON_JSON


def published(path: Path) -> Path:
    """The copy of a file of `COMPARISON` in `reports/`."""
    return REPORTS / path.relative_to(COMPARISON)


def costs(result: Path) -> Path:
    """The `contracts.Cost` of the run that wrote `result`. It differs between machines and is no output of DVC's."""
    return COSTS / f"{'-'.join(result.relative_to(OUT).with_suffix('').parts)}.json"
