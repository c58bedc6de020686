"""A comparison as people read it: sentences, figures, tables, plots, and the page.

It imports core, score and record. It computes nothing that another room needs.
"""
