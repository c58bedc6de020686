"""Measurements and long trials that are no part of the tests. Run as `python -m bench.<name>` from the repository."""
