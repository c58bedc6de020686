"""Texts become scores, and scores a comparison with intervals.

It imports core. It uses no torch and writes no report.
"""
