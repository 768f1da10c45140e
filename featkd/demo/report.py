"""Students, table and report page of the demo."""

from __future__ import annotations

from pathlib import Path

from featkd.compare.report import curves_plot, write_page
from featkd.compare.results import RunResult, spread
from featkd.runtime.plots import as_svg, axes_for, legend
from featkd.train.recipe import Arch, Recipe

DIAGNOSTICS = "diagnostics"  # subfolder of the demo's output
# (arch, distilled) of each student; everything else is set by recipes/demo.yaml.
STUDENTS: dict[str, tuple[Arch, bool]] = {
    "plain, cross-entropy": ("plain", False),
    "plain, feature KD": ("plain", True),
    "Lift, feature KD": ("lift", True),
    "WideLast, feature KD": ("widelast", True),
}
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


def write_report(
    out: Path, recipe: Recipe, teacher: RunResult, results: list[RunResult], seconds: float
) -> Path:
    """Writes `out/report.html`, a self-contained page of table, curves, recipe and versions."""
    curves = {name: [r.curve() for r in results if r.name == name] for name in STUDENTS}
    return write_page(
        *(out / "report.html", "featkd.demo", recipe),
        rows=rows(teacher, results),
        accuracy=curves_plot(curves, _COLOURS, teacher.top1),
        features=_feature_plot(results),
        diagnostics=f"{DIAGNOSTICS}/report.html",
        minutes=f"{seconds / 60:.1f}",
    )


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
