"""What a run is asked for beside its figures, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from featkd.diagnostics.source import Layer
from featkd.diagnostics.stream import LayerResult


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about it; `Settings` says what it measures.

    Args:
        keep: precision of the features kept for the second pass, or "never".
        budget_gib: most disk that kept features may take, over all processes.
        on_bad: "error" stops at features that can't be used; "skip" leaves the image out.
        compiled: run elementwise and FFT parts through torch.compile.
        resume: go on from the state in `out`, if any.
        save_seconds: least time between two states.

    Raises:
        ValueError: a field is out of its range.
    """

    keep: Literal["fp32", "bf16", "never"] = "fp32"
    budget_gib: float = 8.0
    on_bad: Literal["error", "skip"] = "error"
    compiled: bool = False
    resume: bool = True
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, allowed in (("keep", ("fp32", "bf16", "never")), ("on_bad", ("error", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        for name in ("budget_gib", "save_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")


@dataclass
class Findings:
    """What a finished run found.

    Attributes:
        layers: for each layer its figures.
        names: of all images, by index.
        bad: what is wrong with the images that were left out, by name.
        images: images that were counted.
        images_per_s: of process 0's first pass, since it was last started; None where that had
            ended before.
        notes: what a reader must know about the figures.
    """

    layers: dict[Layer, LayerResult]
    names: Sequence[str]
    bad: dict[str, str]
    images: int
    images_per_s: float | None
    notes: list[str]
