"""The tests, in the rooms of `pipeline/`: `tests/<room>/test_<module>.py` tests `pipeline/<room>/<module>.py`.

Beside them are `claims`, for the modules of `claims/`, and `project` for what belongs to the project as a whole.
"""
