"""Runs the pipeline's own functions for a claim, in a separate project folder, with the project's recipes.

The functions of stages read and write fixed places below the working directory (`pipeline.core.paths`). A lab is such a
directory below `.scratch/`. Its places are links to the outputs of other stages of the claims' pipeline.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from claims.evidence import OUT
from pipeline.commands import use
from pipeline.core import params, paths, records
from pipeline.core.errors import UserError

BASE, BASE_FACTS = OUT / "models" / "base", OUT / "models" / "base.json"
"""The default experiment's base, as `fetch` of the claims' pipeline has written it."""


def data(task: str) -> Path:
    """The splits of a recipe, as `prepare@<task>` has written them."""
    return OUT / "data" / task


def quantized(method: str) -> Path:
    """The base in one quantization, as `quantize@<method>` has written it, beside its facts (`.json`)."""
    return OUT / "models" / method


def experiment(recipe: str = "default") -> params.Params:
    """The parameters of a recipe, with this machine's `runtime`."""
    return use.experiment(recipe, params.load())


def general_text(given: params.Params) -> params.Probe:
    """The first probe of forgetting that is read without a chat template; UserError if there is none."""
    for probe in given.forget.probes:
        if probe.style == "plain":
            return probe
    raise UserError("forget.probes has no probe of style plain, on whose text this is measured: name one")


@contextmanager
def lab(name: str, given: Mapping[Path, Path], results: Mapping[Path, Path]) -> Iterator[None]:
    """Make the lab `name` the working directory, and move its results into the project at the end.

    `given`: places of `pipeline.core.paths` in the lab, and the paths in the project that they link to. `results`:
    places in the lab, and the paths in the project that their content is moved to. A lab that a killed process has left
    is used again, with its checkpoints.
    """
    root = Path.cwd()
    folder = root / paths.SCRATCH / "claims" / name
    for place, what in given.items():
        link = folder / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(root / what)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(root)
    for place, where in results.items():
        _replace(folder / place, where)
    shutil.rmtree(folder)


def _replace(found: Path, where: Path) -> None:
    if where.is_dir():
        shutil.rmtree(where)
    where.parent.mkdir(parents=True, exist_ok=True)
    if found.is_file():
        with records.replacing(where) as temporary:
            shutil.copyfile(found, temporary)
    else:
        shutil.move(found, where)
