"""The tests, in the rooms of `pipeline/`: `tests/<room>/test_<module>.py` tests `pipeline/<room>/<module>.py`.

Beside them are `claims`, for the modules of `claims/`, and `project` for what belongs to the project as a whole.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Before torch is imported: the models here are so small that threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
