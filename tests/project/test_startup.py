"""Starting costs little: what is slow to import is imported where it is used."""

import subprocess
import sys

import pytest

from tests import ROOT

SLOW = {
    "torch", "transformers", "peft", "bitsandbytes", "mlflow", "datasets", "dvc", "altair", "pandas", "sklearn",
    "optuna", "ray",
}  # fmt: skip

LIGHT = [*sorted(f"stages.{file.stem}" for file in (ROOT / "stages").glob("[a-z]*.py")), "pipeline.commands.cli"]


def imported(code: str) -> set[str]:
    """The top-level modules that a new interpreter holds after `code`."""
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()}


@pytest.mark.parametrize("module", LIGHT)
def test_a_stage_imports_nothing_slow_before_it_knows_what_to_do(module: str) -> None:
    assert len(LIGHT) > 8
    assert not imported(f"import {module}") & SLOW


def test_help_imports_nothing_slow() -> None:
    seen = imported("from pipeline.commands.cli import app; app(['--help'])")
    assert "pipeline" in seen
    assert not seen & SLOW
