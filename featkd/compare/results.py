"""Results of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from featkd.train.logs import read_csv
from featkd.train.recipe import Recipe


@dataclass(frozen=True)
class RunResult:
    """Results of one finished run.

    Attributes:
        name: arm of the comparison, or the demo's name of the model.
        seed: random seed of the run.
        parameters: number of parameters of the model, without projectors.
        gmacs: billions of multiply-adds of one image's forward pass.
        top1: validation accuracy of the last weights, or of their average, in per cent.
        images_per_s: median training throughput.
        folder: folder of the run.
    """

    name: str
    seed: int
    parameters: int
    gmacs: float
    top1: float
    images_per_s: float
    folder: Path

    def curve(self, weights: str = "model") -> list[tuple[int, float]]:
        """Points (epoch, top-1 in per cent) of all evaluations of the "model" or "ema" weights."""
        rows = read_csv(self.folder / "eval.csv")
        return [(int(r["epoch"]), float(r["top1"])) for r in rows if r["weights"] == weights]

    def feature_losses(self) -> list[tuple[int, float]]:
        """Points (update, feature loss) of all logged rows."""
        rows = read_csv(self.folder / "metrics.csv")
        return [(int(r["update"]), float(r["feature_loss"])) for r in rows]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for one value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def weights_scored(recipe: Recipe) -> str:
    """Weights whose last score is the result of a run: the average if the recipe has one."""
    return "model" if recipe.ema_decay is None else "ema"


def throughput(folder: Path) -> float:
    """Median of the images/s in a run's log, which finished runs have too."""
    return median(float(row["images_per_s"]) for row in read_csv(folder / "metrics.csv"))
