"""Checks of `params.yaml` and `dvc.lock` before DVC reads them: a stranger may have written either."""

from pipeline.core import params, paths, records
from pipeline.record import lockfile


def write() -> None:
    """Write `paths.CHECKED`, on which the first stages depend. Its content is always the same, so nothing reruns."""
    records.write_json(paths.CHECKED, {"params.yaml": "checked"})


def require_sound() -> None:
    """UserError with all mistakes in `params.yaml`, or in `dvc.lock` if there is one."""
    params.load()
    if paths.DVC_LOCK.exists():
        lockfile.stages_of(lockfile.text(paths.DVC_LOCK), str(paths.DVC_LOCK))
