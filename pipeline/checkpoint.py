"""What a killed stage leaves behind, so that the next run goes on from there.

Checkpoints lie under `.scratch/`, in a folder named by the digest of everything that determines the stage's result:
another learning rate finds no checkpoint. They are never outputs of the pipeline and are removed at the stage's end.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline import paths, records
from pipeline.errors import UserError


def key(stage: str, identity: Any) -> str:
    """Folder name for a stage and everything that determines its result (JSON), this package's code included."""
    code = {path.name: records.sha256_file(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
    text = json.dumps([identity, code], sort_keys=True, allow_nan=False)
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@contextmanager
def folder(stage: str, identity: Any) -> Iterator[Path]:
    """Yield the stage's own scratch folder, with what an earlier run left there; remove it if the block succeeds.

    UserError when another process is at work on the same stage.
    """
    paths.SCRATCH.mkdir(exist_ok=True)
    lock = FileLock(paths.SCRATCH / f"{stage}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{stage} is being computed by another process (lock {lock.lock_file}): wait for it, or end it first"
        ) from None
    try:
        scratch = paths.SCRATCH / key(stage, identity)
        scratch.mkdir(exist_ok=True)
        yield scratch
        shutil.rmtree(scratch)
    finally:
        lock.release()
