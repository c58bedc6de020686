"""How long one input may take."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10
"""What one input may take at most; each takes milliseconds."""


@contextmanager
def soon() -> Iterator[None]:
    """AssertionError where the block takes longer than an input may."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done in {SECONDS} s")

    # Of the processor; other tests may have it. What only waits ends by the clock.
    timers = {signal.SIGVTALRM: (signal.ITIMER_VIRTUAL, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 10 * SECONDS)}
    before = {sign: signal.signal(sign, late) for sign in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for sign, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(sign, before[sign])
