"""Identity of a process, which tells whether it still runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def machine() -> str:
    """Identifies this kernel and process namespace; the host name if they are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def start_time(pid: int) -> str:
    """Start time of a process on this machine; "" if it does not run.

    It tells a process from a later one with the same number. A stopped process runs.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
