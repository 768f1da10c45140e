"""Table and report page of a comparison; parts of them are shared with the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup

from featkd.compare.analysis import ArmResult
from featkd.compare.arms import ARMS, REFERENCE
from featkd.compare.results import RunResult, spread, weights_scored
from featkd.compare.statistics import Interval
from featkd.runtime import environment
from featkd.runtime.files import atomic_write
from featkd.runtime.names import printable_lines
from featkd.runtime.plots import GREY, as_svg, axes_for, legend
from featkd.train.recipe import Recipe, to_yaml

Curve = list[tuple[int, float]]
_COLOURS = ("#8c8c8c", "#b08900", "#d1495b", "#8a5fbf", "#3a86c8", "#2a9d6f", "#c46a1b")


def rows(results: Sequence[ArmResult]) -> list[dict[str, str]]:
    """Rows of the table, one per arm."""
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
        for arm in results
    ]


def _ends(found: Interval | None, sign: str = "") -> str:
    if found is None or found.low is None or found.high is None:
        return "-"
    return f"{found.low:{sign}.2f} to {found.high:{sign}.2f}"


def as_table(table: Sequence[Mapping[str, str]]) -> str:
    """Formats rows as text; the first column is left-aligned, numbers are right-aligned."""
    names = list(table[0])
    widths = {n: max(len(n), *(len(row[n]) for row in table)) for n in names}
    lines = [{n: n for n in names}, {n: "-" * widths[n] for n in names}, *table]
    return "\n".join(
        "  ".join(
            line[n].ljust(widths[n]) if n == names[0] else line[n].rjust(widths[n]) for n in names
        )
        for line in lines
    )


def write_report(
    path: Path,
    recipe: Recipe,
    results: Sequence[ArmResult],
    runs: Sequence[RunResult],
    notes: Sequence[str],
) -> None:
    """Writes the page of a comparison: table, conclusions, curves, recipe and versions."""
    weights = weights_scored(recipe)
    curves = {arm.name: [r.curve(weights) for r in runs if r.name == arm.name] for arm in results}
    write_page(
        *(path, "featkd.compare", recipe),
        rows=rows(results),
        arms={arm.name: ARMS[arm.name].about for arm in results},
        conclusions=[arm.conclusion for arm in results if arm.conclusion],
        notes=notes,
        weights="their average" if weights == "ema" else "the weights",
        accuracy=curves_plot(curves, _COLOURS),
        reference=REFERENCE,
    )


def write_page(path: Path, package: str, recipe: Recipe, **content: Any) -> Path:
    """Writes a self-contained page from the template `report.html` of a package.

    Args:
        path: the page.
        package: "featkd.compare" or "featkd.demo".
        recipe: the recipe that is shown.
        content: variables of the template; strings that begin with <svg are not escaped.
    """
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("featkd.compare")])
    facts = {
        **environment.versions(),
        "commit": environment.commit(),
        **environment.machine(),
    }
    figures = {
        name: Markup(value)
        for name, value in content.items()
        if isinstance(value, str) and value.startswith("<svg")
    }
    template = Environment(loader=loader, autoescape=True).get_template("report.html")
    page = template.render(recipe=to_yaml(recipe), facts=facts, **{**content, **figures})
    with atomic_write(path) as file:
        file.write(printable_lines(page).encode())
    return path


def curves_plot(
    curves: Mapping[str, Sequence[Curve]], colours: Sequence[str], teacher: float | None = None
) -> str:
    """Plots accuracy over epochs: mean over seeds, shaded from the lowest to the highest.

    Args:
        curves: points (epoch, top-1 in per cent) of each seed, by name.
        colours: a colour per name.
        teacher: accuracy of the teacher, drawn as a line.
    """
    figure, (axes,) = axes_for([("epoch", "validation top-1 (%)")])
    best = 0.0 if teacher is None else teacher
    for colour, (name, seeds) in zip(colours, curves.items(), strict=False):
        epochs = [epoch for epoch, _ in seeds[0]]
        columns = list(zip(*([value for _, value in curve] for curve in seeds), strict=True))
        middle = [spread(list(column))[0] for column in columns]
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, middle, color=colour, label=name, marker=marker)
        low, high = ([f(column) for column in columns] for f in (min, max))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        best = max(best, *(curve[-1][1] for curve in seeds))
    if teacher is not None:
        axes.axhline(teacher, color=GREY, linestyle=":", label="teacher, last epoch")
    axes.set_ylim(max(0.0, best - 30), min(100.0, best + 2))
    legend(axes)
    return as_svg(figure)
