"""report.html: one self-contained page of a run's findings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from featkd.diagnostics import figures
from featkd.diagnostics.findings import Findings
from featkd.diagnostics.reach import Reach, of_focus
from featkd.diagnostics.shares import percent
from featkd.diagnostics.source import Layer
from featkd.diagnostics.stream import LayerResult
from featkd.diagnostics.verdicts import reach_verdict, verdicts, warnings
from featkd.runtime.files import atomic_write


def focus_layers(layers: Sequence[Layer]) -> list[Layer]:
    """The last layer of each model: the one that is matched by default."""
    last = {layer.model: layer for layer in sorted(layers, key=lambda layer: layer.index)}
    return list(last.values())


def write_report(
    out: Path, findings: Findings, reaches: Sequence[Reach], about: dict[str, Any]
) -> Path:
    """Write `out/report.html` and `out/figures/`.

    Args:
        out: the folder.
        findings: of a finished run.
        reaches: the student's limits, if there is a student.
        about: "command", "facts" (versions and machine), "run" (what was run on what).
    """
    focus = focus_layers(list(findings.layers))
    drawn = figures.save(figures.draw(findings, focus, reaches), out / "figures")
    pictures = {name: Markup(svg) for name, svg in drawn.items()}
    texts = verdicts(findings, focus)
    matched = of_focus(reaches, focus)
    sections = [
        {
            "title": str(layer).capitalize(),
            "verdicts": found[1:],
            "figures": [
                (pictures[key], caption)
                for kind, caption in _CAPTIONS.items()
                if (key := f"{kind}-{layer.model or 'model'}-{layer.index}") in pictures
            ],
        }
        for layer, found in texts.items()
    ]
    page = (
        Environment(loader=PackageLoader("featkd.diagnostics"), autoescape=True)
        .get_template("report.html")
        .render(
            findings=findings,
            warnings=warnings(findings),
            reaches=[] if matched is None else [reach_verdict(matched)],
            headlines=[found[0] for found in texts.values()],
            reach_rows=[_reach_row(r) for r in reaches],
            sections=sections,
            layers_figure=pictures.get("layers"),
            reach_figure=pictures.get("reach"),
            thresholds=[
                f"{percent(t)} %" for t in next(iter(findings.layers.values())).spectrum.thresholds
            ],
            rows=[_row(layer, r) for layer, r in findings.layers.items()],
            sep_rows=[_sep_row(layer, r) for layer, r in findings.layers.items()],
            shares=[f"{percent(s)} %" for s in next(iter(findings.layers.values())).sep.shares],
            about=about,
            centred=next(iter(findings.layers.values())).pca.centred,
        )
    )
    path = out / "report.html"
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


_CAPTIONS = {
    "ranks": "How many dimensions an image needs for a share of its energy: of its own subspace "
    "(left), and of the axes that all images share (right).",
    "energy": "Share of the energy in the leading dimensions, mean over images, shaded by one "
    "standard deviation; dotted, Gaussian maps of the same size.",
    "sep": "Spectral energy pattern: cumulative energy over the frequencies of a token's channels, "
    "as published (left) and one-sided (right), beside its null models. Where the curves lie on "
    "one another the pattern says nothing.",
    "rotation": "Overlap of leading subspaces of the images of a sample, by their numbers in "
    "images.csv: 1 is the same subspace. "
    "The line in the colour bar is the expectation for random subspaces.",
}


def _row(layer: Layer, r: LayerResult) -> list[str]:
    dims = ["-"] * len(r.spectrum.summaries)
    if r.captured is not None:
        dims = [str(s.percentile99) for s in r.captured.summaries]
    overlap = "-" if r.rotation is None else f"{r.rotation.pair_mean:.2f}"
    random = "-" if r.rotation is None else f"{r.rotation.random:.2f}"
    pairs = zip(r.spectrum.summaries, r.gaussian_spectrum.summaries, strict=True)
    ranks = [f"{own.percentile99} / {null.percentile99}" for own, null in pairs]
    return [str(layer), str(r.channels), *ranks, *dims, overlap, random]


def _sep_row(layer: Layer, r: LayerResult) -> list[str]:
    mine = [f"{d:.3f}" for d in r.sep.relative()]
    null = [f"{d:.3f}" for d in r.gaussian.relative()]
    both = f"{r.bandwidth.channels90_mean:.2f} / {r.gaussian_bandwidth.channels90_mean:.2f}"
    return [str(layer), *mine, *null, f"{min(r.permutation.p_value):.3f}", both]


def _reach_row(r: Reach) -> list[str]:
    shares = (r.pooled, r.shared, r.shared_with_bias, r.per_image, r.per_image_gaussian)
    widths = f"{r.channels} / {r.teacher_channels}"
    return [str(r.teacher), widths, *(f"{100 * share:.1f}" for share in shares)]
