"""Plot of time and peak memory of every case in a results file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featkd.runtime.files import atomic_write

from .results import Measured, ResultsError, Row, newest, origin
from .variants import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
_COLOURS = {"eager": "#777777", "compile": "#c06010", "reference": "#208040", "featkd": "#1060c0"}
_MARKS = {"eager": "|", "compile": "s", "reference": "d", "featkd": "o"}

Group = dict[str, dict[str, Row]]
"""Rows by case and variant."""


def draw(rows: Sequence[Row], path: Path) -> list[Measured]:
    """Draws the newest figures, a row of panels per dtype and direction; returns what was drawn.

    Left: times relative to eager, with the range from the 20 % to the 80 % quantile. Right: peak
    memory.

    Raises:
        ResultsError: the suffix is not .svg or .png, or no case has a time of the eager variant.
    """
    if path.suffix not in FORMATS:
        raise ResultsError(f"out: expected a name that ends in {' or '.join(FORMATS)}, got {path}")
    groups = _groups(rows)
    if not groups:
        raise ResultsError("no case in the results has a time of the eager variant")
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    # no random ids, date or fonts as paths: equal results give equal files
    with mpl.rc_context({"svg.hashsalt": "featkd", "svg.fonttype": "none", "font.size": 8}):
        heights = [len(cases) for cases in groups.values()]
        figure = Figure(
            figsize=(10, 1 + sum(0.2 * h + 0.45 for h in heights)), layout="constrained"
        )
        panels = figure.subplots(
            len(groups), 2, squeeze=False, height_ratios=heights, sharex="col", sharey="row"
        )
        for (title, cases), (left, right) in zip(groups.items(), panels, strict=True):
            _draw(left, right, title, cases)
        left, right = panels[-1]
        left.set_xlabel("time as a multiple of eager's")
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_minor_locator(NullLocator())
        right.set_xlabel("extra peak memory, MiB")
        right.set_xscale("symlog", linthresh=1)
        right.set_xlim(left=-0.1)
        for axis in (left.xaxis, right.xaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=4)
        figure.suptitle(origin(newest(rows).values()), fontsize=7, x=0, ha="left")
        with atomic_write(path) as file:
            meta = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=meta)
    return [
        (row.case, name, metric, unit, value)
        for cases in groups.values()
        for by_variant in cases.values()
        for name, row in by_variant.items()
        for metric, unit, value in (
            ("time_to_eager", "ratio", 1 / row.speedup),
            ("peak_bytes", "bytes", row.peak_bytes),
        )
    ]


def _groups(rows: Sequence[Row]) -> dict[str, Group]:
    latest = newest(rows)
    groups: dict[str, Group] = {}
    for (case, variant), row in latest.items():
        if (case, "eager") in latest and variant in VARIANTS:
            group = groups.setdefault(f"{row.dtype}, {row.direction}", {})
            group.setdefault(f"{row.op} {row.form} {row.shape}", {})[variant] = row
    return groups


def _draw(left: Axes, right: Axes, title: str, cases: Group) -> None:
    """Draws the times of a group on the left, its memory on the right."""
    for variant in VARIANTS:
        places = [y for y, by in enumerate(cases.values()) if variant in by]
        rows = [by[variant] for by in cases.values() if variant in by]
        mark, colour = _MARKS[variant], _COLOURS[variant]
        spread = [
            [(1 - row.q20_ms / row.median_ms) / row.speedup for row in rows],
            [(row.q80_ms / row.median_ms - 1) / row.speedup for row in rows],
        ]
        left.errorbar(
            [1 / row.speedup for row in rows],
            places,
            xerr=spread,
            fmt=mark,
            markersize=4,
            linewidth=1,
            color=colour,
            label=variant,
        )
        memory = [row.peak_bytes / 2**20 for row in rows]
        right.plot(memory, places, mark, markersize=4, color=colour)
    left.axvline(1, color=_COLOURS["eager"], linewidth=0.5)
    left.set_yticks(range(len(cases)), list(cases), fontsize=7)
    left.invert_yaxis()
    left.set_title(title, loc="left", fontsize=8)
