"""Table and report page of the demo."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from featkd.demo.results import STUDENTS, RunResult, spread
from featkd.runtime import environment
from featkd.runtime.files import atomic_write
from featkd.runtime.names import printable_lines
from featkd.runtime.plots import GREY, as_svg, axes_for, legend
from featkd.train.recipe import Recipe, to_yaml

DIAGNOSTICS = "diagnostics"  # subfolder of the demo's output
_COLOURS = ("#8c8c8c", "#d1495b", "#3a86c8", "#2a9d6f")


def rows(teacher: RunResult, results: list[RunResult]) -> list[dict[str, str]]:
    """Rows of the table: the teacher, then each student over its seeds."""
    found = [_row("teacher", [teacher])]
    return found + [_row(name, [r for r in results if r.name == name]) for name in STUDENTS]


def _row(name: str, runs: list[RunResult]) -> dict[str, str]:
    top1, deviation = spread([run.top1 for run in runs])
    speed, _ = spread([run.images_per_s for run in runs])
    return {
        "model": name,
        "parameters": f"{runs[0].parameters:,}",
        "top-1 %": f"{top1:.2f}",
        "std": f"{deviation:.2f}" if len(runs) > 1 else "-",
        "seeds": str(len(runs)),
        "images/s": f"{speed:.0f}",
    }


def as_table(teacher: RunResult, results: list[RunResult]) -> str:
    """Formats the table as text, with names left-aligned and numbers right-aligned."""
    table = rows(teacher, results)
    names = list(table[0])
    widths = {n: max(len(n), *(len(row[n]) for row in table)) for n in names}
    lines = [{n: n for n in names}, {n: "-" * widths[n] for n in names}, *table]
    return "\n".join(
        "  ".join(
            line[n].ljust(widths[n]) if n == "model" else line[n].rjust(widths[n]) for n in names
        )
        for line in lines
    )


def write_report(
    out: Path, recipe: Recipe, teacher: RunResult, results: list[RunResult], seconds: float
) -> Path:
    """Writes `out/report.html`, a self-contained page of table, curves, recipe and versions."""
    page = (
        Environment(loader=PackageLoader("featkd.demo"), autoescape=True)
        .get_template("report.html")
        .render(
            rows=rows(teacher, results),
            accuracy=Markup(_accuracy_plot(teacher, results)),
            features=Markup(_feature_plot(results)),
            recipe=to_yaml(recipe),
            diagnostics=f"{DIAGNOSTICS}/report.html",
            facts={
                **environment.versions(),
                "commit": environment.commit(),
                **environment.machine(),
            },
            minutes=f"{seconds / 60:.1f}",
        )
    )
    path = out / "report.html"
    with atomic_write(path) as file:
        file.write(printable_lines(page).encode())
    return path


def _accuracy_plot(teacher: RunResult, results: list[RunResult]) -> str:
    figure, (axes,) = axes_for([("epoch", "validation top-1 (%)")])
    for colour, name in zip(_COLOURS, STUDENTS, strict=True):
        curves = [run.curve() for run in results if run.name == name]
        epochs = [epoch for epoch, _ in curves[0]]
        values = [[value for _, value in curve] for curve in curves]
        middle = [spread(list(column))[0] for column in zip(*values, strict=True)]
        axes.plot(epochs, middle, color=colour, label=name)
        low, high = ([f(c) for c in zip(*values, strict=True)] for f in (min, max))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(teacher.top1, color=GREY, linestyle=":", label="teacher, last epoch")
    best = max(run.top1 for run in [teacher, *results])
    axes.set_ylim(max(0.0, best - 30), min(100.0, best + 2))
    legend(axes)
    return as_svg(figure)


def _feature_plot(results: list[RunResult]) -> str:
    figure, (axes,) = axes_for([("update", "feature loss (unweighted)")])
    for colour, (name, (_, distilled)) in zip(_COLOURS, STUDENTS.items(), strict=True):
        if not distilled:
            continue
        for number, run in enumerate(r for r in results if r.name == name):
            points = run.feature_losses()
            axes.plot(
                [update for update, _ in points],
                [value for _, value in points],
                color=colour,
                linewidth=1,
                label=name if number == 0 else None,
            )
    axes.set_yscale("log")
    legend(axes)
    return as_svg(figure)
