"""Many experiments: combinations through DVC's queue, and searches whose trials are chosen on validation loss.

It imports core and record. How one experiment is computed is not in it: DVC does that.
"""
