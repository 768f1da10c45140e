"""Preloaded module of the server process that forks workers when DALI is imported.

Only that process may import this module. The server ends with the process that started it. It
ignores SIGTERM, which is meant for that process but may be sent to the whole control group.
"""

import signal

import featkd.data.loader  # noqa: F401  imported here once, because it takes seconds

signal.signal(signal.SIGTERM, signal.SIG_IGN)
