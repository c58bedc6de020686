"""Where a result comes from, what identifies an experiment, and where it is kept: git, `dvc.lock`, the MLflow store.

It imports core and score. It decides nothing about a result.
"""
