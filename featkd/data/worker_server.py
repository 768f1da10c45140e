"""What the server process imports that forks workers beside DALI; no other process may.

It lives as long as the process that started it. SIGTERM is for that one, but reaches this one too
where it goes to a whole control group.
"""

import signal

import featkd.data.loader  # noqa: F401  each worker would take seconds to import it

signal.signal(signal.SIGTERM, signal.SIG_IGN)
