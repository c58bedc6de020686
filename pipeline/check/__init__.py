"""`lora-repro check`: what can be known to be wrong before the expensive work, all of it at once, in seconds.

It imports core, sources, prepare, fetch, model, probes, score and record, but never torch or transformers. It downloads
nothing and changes nothing. Whatever it refuses, a stage would refuse as well: it decides nothing of its own.
"""
