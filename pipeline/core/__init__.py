"""What every stage stands on: parameters, places, records between stages, errors, progress, the run of a stage.

It imports nothing of ours. Nothing about models, scores or MLflow is in it, and nothing that takes seconds to import.
"""
