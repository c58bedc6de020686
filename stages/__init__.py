"""One thin script a stage of `dvc.yaml`: parse, call, exit. Run as `python -m stages.<name>`."""
