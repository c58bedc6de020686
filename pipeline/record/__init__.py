"""Where a result comes from, and where it is kept: git, `dvc.lock`, and the MLflow store.

It imports core. It decides nothing about a result.
"""
