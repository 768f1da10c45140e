"""featkd.linalg against torch and numpy at the sizes of feature maps, in turns on the CPU.

python -m featkd.benchmarks.spectrum --out spectrum.csv
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import featkd
from featkd import linalg
from featkd.runtime.files import write_csv

from . import results, timing
from .variants import step_of

# tokens, channels: DeiT-Tiny, its teachers and large teachers, a 7 x 7 grid, and small ones
SHAPES = (
    *((196, 192), (196, 384), (196, 768), (256, 1024), (256, 1280)),
    *((49, 768), (64, 64), (32, 32), (16, 16)),
)
NUMBERS_PER_CALL = 1_000_000  # elements of all matrices of a call: a dozen of the larger matrices


def feature_maps(tokens: int, channels: int, count: int) -> Tensor:
    """Draws matrices with a common part, channels of unequal scale and a decaying spectrum."""
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


def measure(tokens: int, channels: int, min_seconds: float) -> Iterator[dict[str, Any]]:
    """Times the variants at one size; yields the columns of each, times in ms per matrix."""
    count = max(2, min(128, NUMBERS_PER_CALL // (tokens * channels)))
    x = feature_maps(tokens, channels, count)
    steps = {name: step_of(partial(function, x)) for name, function in VARIANTS.items()}
    clock = timing.wall_clock(x.device)
    times = timing.take_turns(steps, clock, min_seconds=min_seconds, min_rounds=5)
    if featkd.last_backend("spectrum") != "cpu":
        raise RuntimeError("featkd.linalg runs on torch.linalg here: build csrc first")
    load = os.getloadavg()[0]
    for name, seconds in times.items():
        low, median, high = (1e3 * s / count for s in timing.quantiles(seconds))
        yield {
            "shape": f"{tokens}x{channels}",
            "matrices": count,
            "variant": name,
            "q20_ms": low,
            "median_ms": median,
            "q80_ms": high,
            # medians over the rounds of this time / featkd's
            "over_ranks": timing.speedup(seconds, times["featkd energy_ranks"]),
            "over_svdvals": timing.speedup(seconds, times["featkd svdvals"]),
            "load": load,
            "rounds": len(seconds),
        }


def main(words: Sequence[str] | None = None) -> None:
    """Measures, prints a line per variant, and writes the file."""
    parser = argparse.ArgumentParser(description="Times featkd.linalg beside torch and numpy.")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="per variant and size")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.csv", help="rows as CSV")
    options = parser.parse_args(words)
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: no folder {options.out.parent} to write {options.out} in")
    about = results.describe_run("cpu")
    rows = []
    for shape in SHAPES:
        for row in measure(*shape, options.min_seconds):
            print(
                f"{row['shape']:9} {row['variant']:22} {row['median_ms']:8.4f} ms per matrix, "
                f"{row['over_ranks']:6.2f} x energy_ranks, {row['over_svdvals']:6.2f} x svdvals",
                flush=True,
            )
            rows.append({**about, **row})
    if options.out is not None:
        write_csv(options.out, list(rows[0]), [tuple(row.values()) for row in rows], digits=6)


if __name__ == "__main__":
    main()
