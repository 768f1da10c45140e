"""OpenMP's wait policy, to be set before torch loads OpenMP."""

from __future__ import annotations

import os


def set_defaults() -> None:
    """Makes OpenMP threads sleep after a short wait, unless the environment sets another policy."""
    # Threads that spin while they wait occupy the cores that loader workers need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A short spin bridges the gap between two parallel operations, which sleeping threads lengthen.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
