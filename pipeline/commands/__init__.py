"""The command `lora-repro`: one file for each verb.

It imports any room. Nothing imports it.
"""
