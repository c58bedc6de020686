"""The command `lora-repro`: a file for each verb.

It imports any room. Nothing imports it.
"""
