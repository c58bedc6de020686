"""Training: the adapter, its optimizer, and the step.

It imports core and model. The base's own inference depends on nothing in it but `adapter`, and that for tuned models
alone.
"""
