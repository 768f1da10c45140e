"""Shares of energy as text: short where they are round, and never two of them alike."""

from __future__ import annotations


def plain(share: float) -> str:
    """0.9 as "0.9", 1.0 as "1"."""
    return repr(float(share)).removesuffix(".0")


def percent(share: float) -> str:
    """0.9 as "90", 0.9999999 as "99.99999"."""
    return f"{100 * share:.14g}"
