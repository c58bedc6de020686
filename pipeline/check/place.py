"""What the parameters ask of this machine: its packages, the program that decodes, the device, git, and the store."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.check.report import Report
from pipeline.core import params, paths, stage
from pipeline.core.errors import UserError
from pipeline.record import provenance, reach


def examine(draft: params.Draft, report: Report) -> None:
    """Check `generation`, `runtime`, `evaluate` and `tracking` against this machine, and the installed packages."""
    with report.part():
        stage.require_pinned_versions()
        report.seen.append("the installed packages")
    if (generation := draft.get(params.Generation)) is not None:
        with report.part():
            params.require_backend(generation)
    if (evaluate := draft.get(params.Evaluate)) is not None:
        with report.part():
            params.require_tokenizer(evaluate)
            _name_download(evaluate, report)
    if (runtime := draft.get(params.Runtime)) is not None:
        with report.part():
            require_device(runtime)
    with report.part():
        paths.require_utf8(paths.main_repository(), "the project is in")
    with report.part():
        provenance.commit(Path())  # stage track refuses what git refuses
    with report.part():
        if (tracking := draft.get(params.Tracking)) is not None:
            reach.require_reachable(tracking)
            report.seen.append("the MLflow store")


def _name_download(evaluate: params.Evaluate, report: Report) -> None:
    """Name the model of BLEU's tokenizer as unchecked if sacrebleu has yet to download it."""
    name = evaluate.bleu_tokenizer
    if "bleu" not in evaluate.metrics or not name.startswith("flores"):
        return
    from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS  # a second that nothing else should pay
    from sacrebleu.utils import SACREBLEU_DIR

    model = Path(SACREBLEU_DIR, "models", Path(SPM_MODELS[name]["url"]).name)
    if not model.exists():
        report.left.append(f"the model of evaluate.bleu_tokenizer {name} is not here; stage evaluate downloads it")


def require_device(runtime: params.Runtime) -> None:
    """UserError for a device that this machine cannot have. Whether it does is seen by the stages, which load torch."""
    if runtime.device == "mps" and sys.platform != "darwin":
        raise UserError("runtime.device = 'mps', which macOS alone has: set it to auto")
    if runtime.device == "cuda" and sys.platform == "darwin":
        raise UserError("runtime.device = 'cuda', which macOS does not have: set it to auto")
    try:
        build = version("torch")
    except PackageNotFoundError:  # `stage.require_pinned_versions` says so
        return
    if runtime.device == "cuda" and build.endswith("+cpu"):
        raise UserError(
            f"runtime.device = 'cuda', but torch {build} is a build for the CPU alone: install one for CUDA, or set "
            "runtime.device to auto"
        )
