"""A comparison as people read it: sentences, figures, tables, plots, and the page.

It imports core, score and record. Nothing is computed in it that another room could read.
"""
