"""A result as files for other programs, with a model card, and what the change of format costs.

It imports every room but search and commands.
"""
