"""Texts become scores, and scores a comparison with intervals.

It imports core. No torch, and no word of a report, is in it.
"""
