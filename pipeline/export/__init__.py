"""A result as files that other programs load, with a card, and what the change of format costs.

It imports every room but search and commands.
"""
