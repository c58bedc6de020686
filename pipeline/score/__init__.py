"""Texts become scores, and scores a comparison with intervals.

It imports core. It uses no torch, but for BERTScore where that is asked for, and writes no report.
"""
