"""Runs a command that does not outlive the process which started it, however that one ends.

    python -I pipeline/search/leash.py <command>...

The starter keeps the other end of standard input open. When it closes that, or dies (`kill -9` too), the whole process
group here gets SIGKILL. To be started in a session of its own. Works on any POSIX system.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    threading.Thread(target=_watch, daemon=True).start()
    sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))


def _watch() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
