"""A short script for each stage of `dvc.yaml`: parse, call, exit. Run as `python -m stages.<name>`."""
