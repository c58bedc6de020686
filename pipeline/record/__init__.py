"""Where a result comes from, what an experiment is, and where it is kept: git, `dvc.lock`, and the MLflow store.

It imports core and score. It decides nothing about a result.
"""
