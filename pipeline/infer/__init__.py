"""Inference: prompts become texts, by one of three backends, within a budget of examples and tokens.

It imports core and model. Nothing of training is in it: over a whole sweep the base is decoded once.
"""
