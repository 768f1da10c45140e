"""Preloaded module of the server process that forks workers when DALI is imported.

The server ends with the process that started it. It ignores SIGTERM, which is meant for that
process but may be sent to the whole control group. In any other process this module does nothing.
"""

import signal
import sys

import featkd.data.loader  # noqa: F401  imported here once, because it takes seconds

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
