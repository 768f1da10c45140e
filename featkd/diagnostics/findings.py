"""Results of a diagnostics run: figures per layer, conclusions in words, and the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featkd.diagnostics.layer_diagnostics import LayerResult
from featkd.diagnostics.source import Layer
from featkd.diagnostics.student_reach import StudentReach


@dataclass
class Findings:
    """Results of `featkd.diagnostics.diagnose`.

    Under torchrun process 0 has the results; on the other processes everything is empty.

    Attributes:
        layers: figures of each layer.
        names: image names by image index.
        left_out: reason for each image that was left out, by name.
        images: number of images counted.
        images_per_s: images per second in the first pass of process 0; None if that pass had
            ended before this start.
        notes: facts that affect how the figures are to be read.
        reach: limits of the student on each teacher layer; empty without a student.
        about: "command", "run" (models and data in words), "source", "settings", "facts"
            (versions and machine).
    """

    layers: dict[Layer, LayerResult] = field(default_factory=dict)
    names: Sequence[str] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    images: int = 0
    images_per_s: float | None = None
    notes: list[str] = field(default_factory=list)
    reach: list[StudentReach] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def last_layers(self) -> list[Layer]:
        """The last layer of each model, which `featkd distill` matches by default."""
        last = {layer.model: layer for layer in sorted(self.layers, key=lambda la: la.index)}
        return list(last.values())

    def matched_reach(self) -> StudentReach | None:
        """The student's limits on the last teacher layer, or None."""
        return next((r for r in self.reach if r.teacher in self.last_layers()), None)

    def conclusions(self) -> list[str]:
        """Sentences about the last layers, each figure beside its null model; then the notes."""
        from featkd.diagnostics.verdicts import layer_verdicts, reach_verdict, warnings

        texts = [text for found in layer_verdicts(self).values() for text in found]
        matched = self.matched_reach()
        if matched is not None:
            texts.append(reach_verdict(matched))
        return [*texts, *(f"note: {text}" for text in warnings(self))]

    def write(self, folder: str | Path) -> Path | None:
        """Writes report.html, figures/, summary.json, the CSV tables and per_image.safetensors.

        Args:
            folder: created if it does not exist.

        Returns:
            The path of report.html; None, with nothing written, if there are no results.
        """
        from featkd.diagnostics import report, tables  # they load matplotlib

        if not self.layers:
            return None
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        tables.write_tables(out, self)
        return report.write_report(out, self)


def format_share(share: float) -> str:
    """Formats 0.9 as "0.9", 1.0 as "1", with all digits, so that no two shares look alike."""
    return repr(float(share)).removesuffix(".0")


def format_percent(share: float) -> str:
    """Formats 0.9 as "90", 0.9999999 as "99.99999"."""
    return f"{100 * share:.14g}"
