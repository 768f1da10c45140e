"""matplotlib figures for report pages, readable on light and on dark backgrounds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

GREY = "#888888"


def axes_for(labels: Sequence[tuple[str, str]], height: float = 3.8) -> tuple[Figure, list[Any]]:
    """Creates a figure with axes side by side, one per (x label, y label)."""
    figure = Figure(figsize=(6.4, height), layout="constrained")
    figure.patch.set_alpha(0)
    subplots = [figure.add_subplot(1, len(labels), n + 1) for n in range(len(labels))]
    for axes, (x, y) in zip(subplots, labels, strict=True):
        axes.patch.set_alpha(0)
        axes.set_xlabel(x, color=GREY)
        axes.set_ylabel(y, color=GREY)
        axes.tick_params(which="both", colors=GREY)
        for spine in axes.spines.values():
            spine.set_color(GREY)
        axes.grid(alpha=0.25)
    return figure, subplots


def legend(on: Any, title: str | None = None, loc: str = "best", columns: int = 1) -> None:
    """Adds a frameless grey legend to axes or a figure, at matplotlib's location `loc`."""
    style: dict[str, Any] = {"frameon": False, "labelcolor": GREY, "fontsize": 9}
    drawn = on.legend(title=title, loc=loc, ncols=columns, **style)
    drawn.get_title().set_color(GREY)


def as_svg(figure: Figure) -> str:
    """Returns the figure as an <svg> element; equal figures give equal text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "featkd"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
