r"""featkd.linalg beside torch and numpy at the sizes of feature maps, in turns.

python -m featkd.benchmarks.spectrum --out benchmarks/results/spectrum-NAME.csv
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import featkd
from featkd import linalg
from featkd.cli.arguments import Parser, add_json, check_folders
from featkd.runtime.checks import check_positive
from featkd.runtime.files import write_csv

from . import results, timing
from .variants import Step

# tokens, channels: of DeiT-Tiny, its teachers and large teachers, a 7 x 7 grid, and small ones
SHAPES = (
    *((196, 192), (196, 384), (196, 768), (256, 1024), (256, 1280)),
    *((49, 768), (64, 64), (32, 32), (16, 16)),
)
NUMBERS_A_CALL = 1_000_000  # of all matrices of a call: a dozen of the larger ones


@dataclass(frozen=True)
class Timed:
    """One variant at one size."""

    shape: str
    matrices: int
    variant: str
    q20_ms: float
    """Of a matrix, as are the next two."""
    median_ms: float
    q80_ms: float
    over_ranks: float
    """Median over the rounds of this time / that of featkd's energy_ranks."""
    over_svdvals: float
    """The same with featkd's svdvals."""
    load: float
    rounds: int


def feature_maps(tokens: int, channels: int, count: int) -> Tensor:
    """A common part, channels of unequal scale, and a decaying spectrum."""
    generator = torch.Generator().manual_seed(0)
    n = min(tokens, channels)
    left = torch.randn(count, tokens, n, generator=generator) / torch.arange(1, n + 1)
    right = torch.randn(count, n, channels, generator=generator)
    common = torch.randn(count, 1, channels, generator=generator)
    scales = torch.randn(channels, generator=generator).exp()
    return torch.bmm(left, right).add(common).mul(scales)


def _gram_values(x: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x)
    return values


VARIANTS: dict[str, Callable[[Tensor], object]] = {
    "featkd energy_ranks": linalg.energy_ranks,
    "featkd svdvals": linalg.svdvals,
    "torch svdvals": torch.linalg.svdvals,
    "torch eigvalsh(X X^T)": _gram_values,
    "numpy svd": lambda x: np.linalg.svd(x.numpy(), full_matrices=False),
}


def measure(min_seconds: float) -> Iterator[list[Timed]]:
    """The variants of each size, as they are measured."""
    for tokens, channels in SHAPES:
        count = max(2, min(128, NUMBERS_A_CALL // (tokens * channels)))
        x = feature_maps(tokens, channels, count)
        steps = {name: _step(function, x) for name, function in VARIANTS.items()}
        times = timing.take_turns(
            steps, timing.clock_for(x.device), min_seconds=min_seconds, min_rounds=5
        )
        if featkd.last_backend("spectrum") != "cpu":
            raise RuntimeError("featkd.linalg runs on torch.linalg here: csrc is not built")
        load = os.getloadavg()[0]
        rows = []
        for name, seconds in times.items():
            low, median, high = (1e3 * s / count for s in timing.quantiles(seconds))
            ranks, values = (timing.speedup(seconds, times[our]) for our in list(VARIANTS)[:2])
            shape, rounds = f"{tokens}x{channels}", len(seconds)
            rows.append(Timed(shape, count, name, low, median, high, ranks, values, load, rounds))
        yield rows


def _step(function: Callable[[Tensor], object], x: Tensor) -> Step:
    def run(ready: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        function(x)
        return ready

    return Step(lambda: (), run)


_UNITS = {
    "matrices": "count", "q20_ms": "ms/matrix", "median_ms": "ms/matrix", "q80_ms": "ms/matrix",
    "over_ranks": "ratio", "over_svdvals": "ratio", "load": "processes", "rounds": "count",
}  # fmt: skip


def measured(rows: Iterable[Timed]) -> list[results.Measured]:
    """Every figure of the rows, in the JSON form."""
    return [
        (f"spectrum/{row.shape}", row.variant, metric, unit, getattr(row, metric))
        for row in rows
        for metric, unit in _UNITS.items()
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a line a variant, and write the files that are named."""
    parser = Parser(prog="featkd.benchmarks.spectrum", description="time featkd.linalg")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="for each variant and size")
    add_json(parser)
    parser.add_argument("--out", type=str, default=None, metavar="FILE.csv")
    options = parser.parse_args(words)
    check_positive("--min-seconds", options.min_seconds)
    check_folders(options, ("json", "out"))
    about = results.describe_run("cpu")
    rows: list[Timed] = []
    for several in measure(options.min_seconds):
        for row in several:
            print(
                f"{row.shape:9} {row.variant:22} {row.median_ms:8.4f} ms a matrix, "
                f"{row.over_ranks:6.2f} x energy_ranks, {row.over_svdvals:6.2f} x svdvals",
                flush=True,
            )
        rows += several
    if options.json is not None:
        results.write_json(Path(options.json), results.meta_of(about), measured(rows))
    if options.out is not None:
        names = [*about, *Timed.__dataclass_fields__]
        lines = ((*about.values(), *vars(row).values()) for row in rows)
        write_csv(Path(options.out), names, lines, digits=6)


if __name__ == "__main__":
    main()
