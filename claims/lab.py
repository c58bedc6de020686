"""The pipeline's own functions at work on a claim: in a project folder of its own, with the project's own recipes.

The stages' functions read and write fixed places below the working directory (`pipeline.core.paths`). A lab is such a
directory below `.scratch/`, in which those places are links to what other stages of the claims' pipeline have written.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from claims.evidence import OUT
from pipeline.commands import use as recipes
from pipeline.core import params, paths, records

BASE, BASE_FACTS = OUT / "models" / "base", OUT / "models" / "base.json"
"""The default experiment's base, as `fetch` of the claims' pipeline has written it."""


def data(task: str) -> Path:
    """The splits of a recipe, as `prepare@<task>` has written them."""
    return OUT / "data" / task


def quantized(method: str) -> Path:
    """The base under one quantization, beside its facts (`.json`), as `quantize@<method>` has written it."""
    return OUT / "models" / method


def experiment(recipe: str = "default") -> params.Params:
    """A recipe's experiment on this machine."""
    return recipes.experiment(recipe, params.load())


@contextmanager
def lab(name: str, given: Mapping[Path, Path], results: Mapping[Path, Path]) -> Iterator[None]:
    """Work in the lab `name`. `given`: places of `pipeline.core.paths`, and what they are there. `results`: places of
    `pipeline.core.paths`, and where what lies there at the end belongs in the project.

    A lab that a killed process has left is gone on in, with its checkpoints.
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
