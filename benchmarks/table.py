"""Tables as text and as Markdown, on their own or inside a document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featkd.runtime.files import atomic_write
from featkd.runtime.names import aligned

from .results import Measured, ResultsError, Row, newest, origin
from .variants import VARIANTS

_HEAD = (
    "| case | eager ms | compile ms | reference compiled ms | featkd ms | vs eager | vs best | "
    "MiB, eager | compile | reference | featkd | roofline | backend |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n"
)


def pivot(title: str, figures: Sequence[Measured]) -> str:
    """Returns a text table with a line per name and variant, and a column per metric.

    A metric that comes again right after its line begins another line of that name and variant.
    """
    metrics = {metric: unit for _, _, metric, unit, _ in figures}
    rows: list[tuple[str, str, dict[str, float]]] = []
    for name, variant, metric, _, value in figures:
        if not rows or rows[-1][:2] != (name, variant) or metric in rows[-1][2]:
            rows.append((name, variant, {}))
        rows[-1][2][metric] = value
    header = [m if unit in ("count", "ratio") else f"{m}, {unit}" for m, unit in metrics.items()]
    lines = [
        (name, variant, *(f"{found[m]:.5g}" if m in found else "" for m in metrics))
        for name, variant, found in rows
    ]
    return aligned((title, "", *header), lines, numbers=True)


def markdown(rows: Sequence[Row]) -> str:
    """Returns the newest figures of every case that has all variants, with a line on their origin.

    A ratio to the best other variant is bold if featkd is slower.
    """
    latest = newest(rows)
    lines = [_HEAD]
    for case in dict.fromkeys(case for case, _ in latest):
        if all((case, variant) in latest for variant in VARIANTS):
            lines.append(_line(case, *(latest[case, variant] for variant in VARIANTS)))
    return "".join([*lines, "\n", origin(latest.values()), ".\n"])


def _line(case: str, *rows: Row) -> str:
    *others, ours = rows
    times = [f"{_short(r.median_ms)} [{_short(r.q20_ms)}, {_short(r.q80_ms)}]" for r in rows]
    # by the ratios to eager: the two medians were taken moments apart
    best = ours.speedup / max(row.speedup for row in others)
    memory = [f"{r.peak_bytes / 2**20:.1f}" for r in rows]
    against = f"{best:.2f}" if best >= 1 else f"**{best:.2f}**"
    share = f"{100 * ours.roofline_share:.0f} %"
    cells = [case, *times, f"{ours.speedup:.2f}", against, *memory, share, ours.backend]
    return f"| {' | '.join(cells)} |\n"


def _short(ms: float) -> str:
    return f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def write_into(document: Path, name: str, text: str) -> None:
    """Replaces the text between a document's marks `<!-- bench NAME -->` and `<!-- end ... -->`.

    Raises:
        FileNotFoundError: the document does not exist.
        ResultsError: the document lacks the marks.
    """
    if not document.is_file():
        raise FileNotFoundError(f"no document {document}")
    begin, end = f"<!-- bench {name} -->\n", f"<!-- end bench {name} -->"
    before, found, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ResultsError(
            f"{document}: expected the lines {begin.strip()!r} and {end!r}; add them where the "
            "table is to go"
        )
    with atomic_write(document) as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}".encode())
