"""What a killed stage leaves behind, so that the next run continues from there.

Checkpoints lie under `.scratch/`, in a folder named by the digest of everything that determines the stage's result:
with another learning rate no checkpoint is found. They are never outputs of the pipeline, and a stage that ends removes
its own. The latest `KEPT` of other parameters stay, in case they are used again.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.core import paths, records, stage
from pipeline.core.progress import say
from pipeline.model import processes

KEPT = 4
"""Checkpoints of interrupted stages with other inputs that a project keeps. Each holds the adapter three times, or four
with early stopping."""

CODE = {
    "train": ("core", "model", "lora"),
    "infer": ("core", "model", "infer", "gguf.py", "lora/adapter.py"),
    "arm": ("core", "model", "lora"),
}
"""The code below `pipeline/` that a stage's result depends on, as in `dvc.yaml`, by the first word of the stage's name.
An edit of this code starts the stage anew; no other edit does."""
HOME = Path(__file__).parent.parent


def key(name: str, identity: Any) -> str:
    """The folder's name for a stage and everything that determines its result.

    `identity` (JSON) is the stage's own part; its code and the versions of the packages that compute are added.
    """
    code = {place: records.dvc_md5(HOME / place) for place in CODE[name.partition("-")[0]]}
    versions = {package: version(package) for package in stage.COMPUTING}
    text = json.dumps([identity, code, versions], sort_keys=True, allow_nan=False)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@contextmanager
def folder(name: str, identity: Any) -> Iterator[Path]:
    """Yield the stage's own scratch folder, with what an earlier run left there; remove it if the block succeeds.

    If several members share the stage (`pipeline.model.processes`), the first holds the lock and removes the folder.
    UserError when another process is at work on the same stage.
    """
    if processes.rank() > 0:
        scratch = paths.SCRATCH / key(name, identity)
        scratch.mkdir(parents=True, exist_ok=True)
        yield scratch
        return
    with stage.alone(name):
        scratch = paths.SCRATCH / key(name, identity)
        scratch.mkdir(exist_ok=True)
        os.utime(scratch)
        _forget_oldest(scratch)
        yield scratch
        shutil.rmtree(scratch)


def _forget_oldest(own: Path) -> None:
    """Remove all checkpoints but `own` and the `KEPT` that were used last."""
    others = [path for path in paths.SCRATCH.iterdir() if re.fullmatch(r".+-[0-9a-f]{32}", path.name) and path != own]
    used = {}
    for path in others:
        with suppress(FileNotFoundError):  # another stage has just ended and removed it
            used[path] = path.stat().st_mtime
    for path in sorted(used, key=lambda path: used[path], reverse=True)[KEPT:]:
        say(f"removing the checkpoint {path}: interrupted long ago, with other parameters")
        shutil.rmtree(path, ignore_errors=True)
