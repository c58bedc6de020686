"""What every stage stands on: parameters, places, records between stages, errors, progress, the run of a stage.

It imports no other room, and nothing that takes seconds to import. It knows nothing of models, scores or MLflow.
"""
