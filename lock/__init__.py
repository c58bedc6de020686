"""The exact bytes of every package that an installation takes: see `lock.renew`."""
