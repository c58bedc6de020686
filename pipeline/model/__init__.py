"""A model in memory: its checkpoint, how it is loaded, packed, shared and fed, and what it takes of a machine.

It imports core. Training, decoding and scores are not in it: two stages at least need what is here.
"""
