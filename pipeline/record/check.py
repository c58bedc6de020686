"""Whether what a stranger may have written can be handed to DVC: `params.yaml` and `dvc.lock`."""

from pipeline.core import params, paths, records
from pipeline.record import lockfile


def write() -> None:
    """Write `paths.CHECKED`, which the first stages depend on; it is always the same, so that nothing is run again."""
    records.write_json(paths.CHECKED, {"params.yaml": "checked"})


def require_sound() -> None:
    """UserError with all mistakes of `params.yaml`, or of a `dvc.lock` that is there."""
    params.load()
    if paths.DVC_LOCK.exists():
        lockfile.stages_of(lockfile.text(paths.DVC_LOCK), str(paths.DVC_LOCK))
