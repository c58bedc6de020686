"""Remove the two files of DVC that `kill -9` can leave half-written, after which `dvc repro` refuses to start.

DVC (3.67) writes `.dvc/tmp/rwlock` and `dvc.lock` in place, so a killed process can leave half of either
(treeverse/dvc#7615). Nothing is lost with them: the first says who is running, and DVC's run cache also has what
`dvc.lock` says about finished stages.
"""

import json
from pathlib import Path

from pipeline.core import paths, yaml12
from pipeline.core.errors import UserError
from pipeline.core.progress import say


def remove_half_written() -> None:
    """Remove the files that are half-written, and name them. UserError while DVC is running.

    Takes DVC's own locks, because a file that another process is just writing looks half-written, too.
    """
    temporary = paths.main_repository() / ".dvc" / "tmp"
    torn = {temporary / "rwlock": _torn_json, paths.DVC_LOCK: _torn_lock}
    suspects = [path for path, is_torn in torn.items() if path.is_file() and is_torn(path)]
    if not suspects:
        return
    from dvc.lock import LockError, make_lock

    try:
        with make_lock(str(temporary / "lock")), make_lock(str(temporary / "rwlock.lock")):
            for path in suspects:
                if torn[path](path):
                    path.unlink()
                    say(f"removed {path.name}, which a killed DVC left half-written: `dvc repro` makes it again")
    except LockError:
        raise UserError("DVC is running in this project: wait until it ends") from None


def _torn_json(path: Path) -> bool:
    try:
        return not isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return True


def _torn_lock(path: Path) -> bool:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(yaml12.load(path.read_bytes().decode(), str(path)))
    except (yaml12.NotYamlError, UnicodeDecodeError, Invalid):
        return True
    return False
