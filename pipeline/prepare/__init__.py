"""Rows of a source become three splits and a card: read, filtered, held out, cleaned, freed of leaks.

It imports core, sources, and the planning of a test's size from score. No model and no tokenizer is in it.
"""
