"""Tables, figures and the report page of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from featkd.compare.analysis import Analysis, ArmResult
from featkd.compare.arms import ARMS, REFERENCE
from featkd.compare.mismatch import MapFigures, TeacherMap
from featkd.compare.results import RunResult, weights_scored
from featkd.compare.statistics import Interval
from featkd.runtime import environment
from featkd.runtime.files import atomic_write
from featkd.runtime.names import aligned
from featkd.runtime.pages import render_page
from featkd.runtime.plots import GREY, as_svg, axes_for, legend
from featkd.train.recipe import Recipe, to_yaml

Row = dict[str, str]
_MAP_COLUMNS = (
    *("channels", "reach %", "rank / noise", "overlap / random"),
    "channels used % / noise",
)
_COLOURS = ("#8c8c8c", "#b08900", "#d1495b", "#8a5fbf", "#3a86c8", "#2a9d6f", "#c46a1b")


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        recipe: the recipe that the arms change.
        runs: all runs.
        teacher: figures of the teacher's map; None if they can't be measured.
        analysis: what the runs show.
        notes: facts about how it was done.
    """

    recipe: Recipe
    runs: Sequence[RunResult]
    teacher: TeacherMap | None
    analysis: Analysis
    notes: Sequence[str]

    def text(self) -> str:
        """The finding, the tables, the conclusions and the notes, for a terminal."""
        found = self.analysis
        accuracies, maps = (_as_text(rows) for rows in (result_rows(found.arms), map_rows(self)))
        conclusions, notes = "\n".join(found.conclusions), "\n".join(self.notes)
        return "\n\n".join(filter(None, (found.finding, accuracies, conclusions, maps, notes)))


def result_rows(arms: Sequence[ArmResult]) -> list[Row]:
    """Rows of the table of accuracies, one per arm."""
    return [
        {
            "arm": arm.name,
            "parameters": f"{arm.parameters:,}",
            "GMACs": f"{arm.gmacs:.3g}",
            "images/s": f"{arm.images_per_s:.0f}",
            "seeds": str(arm.top1.count),
            "top-1 %": f"{arm.top1.mean:.2f}",
            "95 % interval": _ends(arm.top1),
            f"minus {REFERENCE}": "-" if arm.difference is None else f"{arm.difference.mean:+.2f}",
            "its 95 % interval": _ends(arm.difference, "+"),
        }
        for arm in arms
    ]


def _ends(found: Interval | None, sign: str = "") -> str:
    if found is None or found.low is None or found.high is None:
        return "-"
    return f"{found.low:{sign}.2f} to {found.high:{sign}.2f}"


def map_rows(found: Comparison) -> list[Row]:
    """Rows of the table of mismatch diagnostics: the teacher's map, then each arm's."""
    teacher = found.teacher
    rows = [_map_row("teacher", None if teacher is None else teacher.figures, None)]
    return rows + [_map_row(arm.name, arm.map, teacher) for arm in found.analysis.arms]


def _map_row(name: str, figures: MapFigures | None, teacher: TeacherMap | None) -> Row:
    def beside(value: float | None, null: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f} / {null:.{digits}f}"

    row = {"map of": name, **dict.fromkeys(_MAP_COLUMNS, "-")}
    if figures is None:
        return row
    width = "" if figures.width == figures.channels else f"{figures.width:.0f} to "
    cells = (
        f"{width}{figures.channels:.0f}",
        "-" if teacher is None else f"{100 * teacher.reach_of(figures.width):.1f}",
        beside(figures.rank, figures.gaussian_rank, 0),
        beside(figures.overlap, figures.random_overlap, 2),
        beside(100 * figures.used, 100 * figures.gaussian_used, 0),
    )
    return {**row, **dict(zip(_MAP_COLUMNS, cells, strict=True))}


def _as_text(rows: Sequence[Row]) -> str:
    return aligned([*rows[0]], [[*row.values()] for row in rows], numbers=True)


def write_page(
    path: Path, title: str, intro: str, cases: Mapping[str, tuple[str, Comparison]]
) -> None:
    """Writes a self-contained page: findings and figures first, then tables, recipes, versions.

    The figures are also written as SVG files, to `figures/` beside the page.

    Args:
        path: the page.
        title, intro: heading and first paragraph.
        cases: comparisons with a paragraph about each, by name; a single one may have no name.
    """
    commit = {"commit": environment.commit()}
    facts = {**environment.versions(), **commit, **environment.machine()}
    described = [_case(name, about, found) for name, (about, found) in cases.items()]
    (path.parent / "figures").mkdir(exist_ok=True)
    for case in described:
        for kind in ("finding", "curves"):
            with atomic_write(path.parent / case["files"][kind]) as file:
                file.write(case[kind].encode())
    about = {"title": title, "intro": intro, "reference": REFERENCE, "facts": facts}
    render_page(path, "featkd.compare", cases=described, **about)


def _case(name: str, about: str, found: Comparison) -> dict[str, Any]:
    """Variables of the template for one comparison."""
    weights, arms = weights_scored(found.recipe), found.analysis.arms
    curves = {
        arm.name: [run.curve(weights) for run in found.runs if run.name == arm.name] for arm in arms
    }
    prefix = "".join(c if c.isalnum() else "-" for c in f"{name} " if name).lower()
    return {
        "name": name,
        "about": about,
        "found": found,
        "finding": Markup(_finding_plot(arms, found.teacher)),
        "files": {kind: f"figures/{prefix}{kind}.svg" for kind in ("finding", "curves")},
        "rows": result_rows(arms),
        "map_rows": map_rows(found),
        "weights": "their average" if weights == "ema" else "the weights",
        "curves": Markup(_curves_plot(curves)),
        "arms": {arm.name: ARMS[arm.name].about for arm in arms},
        "recipe": to_yaml(found.recipe),
    }


def _finding_plot(arms: Sequence[ArmResult], teacher: TeacherMap | None) -> str:
    """Plots the reach by width beside the differences to the reference arm."""
    figure, (left, right) = axes_for(
        [("channels", "share of the teacher's energy"), (f"points above {REFERENCE}", "")]
    )
    (plain,) = (arm for arm in arms if arm.name == REFERENCE)
    if teacher is not None:
        left.plot(range(1, len(teacher.reach) + 1), teacher.reach, color="#3a86c8")
    if teacher is not None and plain.map is not None:
        width, reach = plain.map.width, teacher.reach_of(plain.map.width)
        label = f"student: {width:.0f} channels, {100 * reach:.1f} %"
        left.plot([width], [reach], "o", color="#3a86c8", label=label)
        legend(left, loc="lower right")
    left.set_ylim(0, 1.04)
    others = [arm for arm in arms if arm.difference is not None]
    for place, arm in enumerate(others):
        found, colour = arm.difference, _COLOURS[arms.index(arm) % len(_COLOURS)]
        assert found is not None
        right.plot([found.mean], [place], "o", color=colour)
        if found.low is not None:
            right.plot([found.low, found.high], [place, place], color=colour)
    right.set_yticks(range(len(others)), [arm.name for arm in others])
    right.set_ylim(max(len(others), 1) - 0.5, -0.5)
    right.axvline(0, color=GREY, linewidth=1)
    return as_svg(figure)


def _curves_plot(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> str:
    """Plots accuracy over epochs: mean over seeds, shaded from the lowest to the highest."""
    figure, (axes,) = axes_for([("epoch", "validation top-1 (%)")])
    best = 0.0
    for colour, (name, seeds) in zip(_COLOURS, curves.items(), strict=False):
        epochs = [epoch for epoch, _ in seeds[0]]
        columns = list(zip(*([value for _, value in curve] for curve in seeds), strict=True))
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, list(map(fmean, columns)), color=colour, label=name, marker=marker)
        low, high = ([f(column) for column in columns] for f in (min, max))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        best = max(best, *(curve[-1][1] for curve in seeds))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(max(0.0, best - 30), min(100.0, best + 2))
    legend(axes)
    return as_svg(figure)
