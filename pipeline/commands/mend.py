"""Two files of DVC's that `kill -9` can tear, after which `dvc repro` refuses to start.

DVC (3.67) writes `.dvc/tmp/rwlock` and `dvc.lock` in place: a process killed between emptying and filling one leaves
half of it (treeverse/dvc#7615). Neither holds anything that is not elsewhere: the first says who is running, and what
`dvc.lock` says of finished stages is in DVC's run cache, from where `dvc repro` takes their outputs.
"""

import json
from pathlib import Path

from pipeline.core import paths, yaml12
from pipeline.core.errors import UserError
from pipeline.core.progress import say
from pipeline.record import provenance


def remove_half_written() -> None:
    """Remove what is torn, and say so; say nothing where nothing is. UserError while DVC is at work.

    Takes DVC's own locks: a file that another process is writing just now looks torn as well.
    """
    temporary = provenance.main_repository() / ".dvc" / "tmp"
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
        raise UserError("DVC is running in this project: wait for it to end") from None


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
