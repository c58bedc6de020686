"""Inference: one of three backends answers prompts, within a budget of examples and tokens.

It imports core and model, and nothing of training, so a whole sweep decodes the base only once.
"""
