"""The nearest known name, for error messages; imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the nearest known name, or "".

    Known names are also compared by as many of their first words as `name` has, so that
    "deit_tinny" finds "deit_tiny_patch16_224".
    """
    words = name.count("_") + 1
    nearest: dict[str, str] = {}  # of the names that begin alike, the shortest
    for full in sorted(known, key=lambda full: (-len(full), full)):
        nearest["_".join(full.split("_")[:words])] = full
        nearest[full] = full
    found = difflib.get_close_matches(name, nearest, n=1, cutoff=0.5)
    return f"; did you mean {nearest[found[0]]!r}?" if found else ""
