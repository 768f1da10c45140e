"""Results of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from featkd.compare.mismatch import MapFigures
from featkd.train.logs import read_csv
from featkd.train.recipe import Recipe


@dataclass(frozen=True)
class RunResult:
    """Results of one finished run.

    Attributes:
        name: arm of the comparison.
        seed: random seed of the run.
        parameters: number of parameters of the model, without projectors.
        gmacs: billions of multiply-adds of one image's forward pass.
        top1: validation accuracy of the last weights, or of their average, in per cent.
        images_per_s: median training throughput.
        folder: folder of the run.
        map: figures of the student's map that is compared with the teacher's, or the reason why
            they can't be measured; None if an earlier version stored none.
    """

    name: str
    seed: int
    parameters: int
    gmacs: float
    top1: float
    images_per_s: float
    folder: Path
    map: MapFigures | str | None = None

    def curve(self, weights: str = "model") -> list[tuple[int, float]]:
        """Points (epoch, top-1 in per cent) of all evaluations of the "model" or "ema" weights."""
        rows = read_csv(self.folder / "eval.csv")
        return [(int(r["epoch"]), float(r["top1"])) for r in rows if r["weights"] == weights]


def weights_scored(recipe: Recipe) -> str:
    """Weights whose last score is the result of a run: the average if the recipe has one."""
    return "model" if recipe.ema_decay is None else "ema"


def throughput(folder: Path) -> float:
    """Median of the images/s in a run's log, which finished runs have too."""
    return median(float(row["images_per_s"]) for row in read_csv(folder / "metrics.csv"))
