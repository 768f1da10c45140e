"""How OpenMP's threads wait for each other: to be set before torch loads it."""

from __future__ import annotations

import os


def set_defaults() -> None:
    """Let threads sleep after a moment, unless the environment says something else."""
    # Threads that wait by spinning take the cores that loader workers need (measured on 2 cores
    # with 1 worker and a second job: 29 images/s spinning, 268 passive).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A moment of spinning joins one operation's parallel part to the next one's, where passive
    # threads sleep: the loss of (32, 196, 192) to 384 took 20 ms with it and 26 without.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
