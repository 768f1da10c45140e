"""The report page, report.html: one self-contained page of findings."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from featkd.diagnostics import figures
from featkd.diagnostics.findings import Findings, format_percent
from featkd.diagnostics.layer_diagnostics import LayerResult
from featkd.diagnostics.source import Layer
from featkd.diagnostics.student_reach import StudentReach
from featkd.diagnostics.verdicts import layer_verdicts, reach_verdict, warnings
from featkd.runtime.pages import render_page


def write_report(out: Path, findings: Findings) -> Path:
    """Writes `out/report.html` and `out/figures/`; returns the path of the page."""
    drawn = figures.save(figures.draw(findings), out / "figures")
    pictures = {name: Markup(svg) for name, svg in drawn.items()}
    texts = layer_verdicts(findings)
    matched = findings.matched_reach()
    any_layer = next(iter(findings.layers.values()))
    sections = [
        {
            "title": str(layer).capitalize(),
            "verdicts": verdicts[1:],
            "figures": [
                (pictures[key], caption)
                for kind, caption in _CAPTIONS.items()
                if (key := f"{kind}-{layer.model or 'model'}-{layer.index}") in pictures
            ],
        }
        for layer, verdicts in texts.items()
    ]
    path = out / "report.html"
    render_page(
        path,
        "featkd.diagnostics",
        title="featkd diagnose",
        findings=findings,
        warnings=warnings(findings),
        reaches=[] if matched is None else [reach_verdict(matched)],
        headlines=[verdicts[0] for verdicts in texts.values()],
        reach_rows=[_reach_row(r) for r in findings.reach],
        sections=sections,
        layers_figure=pictures.get("layers"),
        reach_figure=pictures.get("reach"),
        thresholds=[f"{format_percent(t)} %" for t in any_layer.spectrum.thresholds],
        rows=[_row(layer, r) for layer, r in findings.layers.items()],
        sep_rows=[_sep_row(layer, r) for layer, r in findings.layers.items()],
        shares=[f"{format_percent(s)} %" for s in any_layer.sep.shares],
        about=findings.about,
        centred=any_layer.pca.centred,
    )
    return path


_CAPTIONS = {
    "ranks": "Number of dimensions that an image needs for a share of its energy: of its own "
    "subspace (left), and of the axes that all images share (right).",
    "energy": "Share of the energy in the leading dimensions, mean over images, shaded by one "
    "standard deviation; dotted: Gaussian maps of the same size.",
    "sep": "Spectral energy pattern: cumulative energy over the frequencies of a token's channels, "
    "as published (left) and one-sided (right), beside its null models. If the curves coincide, "
    "the pattern carries no information.",
    "rotation": "Overlap of the leading subspaces of sampled images, by their indices in "
    "images.csv; 1 means the same subspace. The line in the colour bar is the expectation for "
    "random subspaces.",
}


def _row(layer: Layer, r: LayerResult) -> list[str]:
    dims = ["-"] * len(r.spectrum.summaries)
    if r.captured is not None:
        dims = [str(s.percentile99) for s in r.captured.summaries]
    overlap = "-" if r.rotation is None else f"{r.rotation.pair_mean:.2f}"
    random = "-" if r.rotation is None else f"{r.rotation.random:.2f}"
    pairs = zip(r.spectrum.summaries, r.gaussian_spectrum.summaries, strict=True)
    ranks = [f"{rank.percentile99} / {null.percentile99}" for rank, null in pairs]
    return [str(layer), str(r.channels), *ranks, *dims, overlap, random]


def _sep_row(layer: Layer, r: LayerResult) -> list[str]:
    found = [f"{d:.3f}" for d in r.sep.relative()]
    null = [f"{d:.3f}" for d in r.gaussian.relative()]
    both = f"{r.bandwidth.channels90_mean:.2f} / {r.gaussian_bandwidth.channels90_mean:.2f}"
    return [str(layer), *found, *null, f"{min(r.permutation.p_value):.3f}", both]


def _reach_row(r: StudentReach) -> list[str]:
    shares = (r.pooled, r.shared, r.shared_with_bias, r.per_image, r.per_image_gaussian)
    widths = f"{r.channels} / {r.teacher_channels}"
    return [str(r.teacher), widths, *(f"{100 * share:.1f}" for share in shares)]
