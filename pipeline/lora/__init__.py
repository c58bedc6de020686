"""Training: the adapter, its optimizer, and the steps.

It imports core and model. Inference with an adapter depends on `adapter`; inference of the base depends on nothing
here.
"""
