"""Many experiments: combinations through DVC's queue, and searches whose trials are chosen on validation loss.

It imports core, check and record. It does not know how an experiment is computed: DVC does that.
"""
