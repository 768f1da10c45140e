r"""featkd.diagnostics beside plain numpy that follows the published method, in turns.

python -m featkd.benchmarks.diagnostics --out benchmarks/results/diagnostics-NAME.csv
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import featkd
from featkd.cli.arguments import Parser, add_json, check_folders
from featkd.diagnostics import SEP, CapturedEnergy, DatasetPCA, SpectrumStats
from featkd.runtime.checks import check_positive
from featkd.runtime.files import write_csv

from . import results, timing
from .spectrum import feature_maps
from .variants import Step

CHUNK = 16
_UNITS = {
    "q20_ms": "ms/image", "median_ms": "ms/image", "q80_ms": "ms/image",
    "numpy_over_this": "ratio", "rounds": "count", "load": "processes",
}  # fmt: skip
_COLUMNS = ("part", "variant", *_UNITS)
Timed = tuple[str, str, float, float, float, float, int, float]
"""One value a column."""


def _chunks(features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some maps and their images at a time, as a run has them."""
    for images in torch.split(torch.arange(len(features)), CHUNK):
        yield features[images[0] : images[-1] + 1], images


def spectra(features: Tensor) -> object:
    """Energy ranks and curves of every image."""
    stats = SpectrumStats()
    for part, images in _chunks(features):
        stats.update(part, images)
    return stats.result()


def pca(features: Tensor) -> object:
    """The data set's axes, and every image's energy in them."""
    stats = DatasetPCA()
    for part, _ in _chunks(features):
        stats.update(part)
    second = CapturedEnergy(stats.result())
    for part, images in _chunks(features):
        second.update(part, images)
    return second.result()


def sep(features: Tensor) -> object:
    """The mean and the deviation of the tokens' cumulative spectra."""
    stats = SEP()
    for part, _ in _chunks(features):
        stats.update(part)
    return stats.result()


def numpy_spectra(features: Tensor) -> object:
    """A singular value decomposition an image."""
    curves = []
    for x in features.numpy():
        energy = np.linalg.svd(x, compute_uv=False) ** 2
        curves.append(np.cumsum(energy) / energy.sum())
    return [[np.searchsorted(c, t) + 1 for t in (0.8, 0.9, 0.95, 0.99)] for c in curves]


def numpy_pca(features: Tensor) -> object:
    """Two passes in float64."""
    x = features.numpy()
    second = np.zeros((x.shape[2], x.shape[2]))
    for image in x:
        wide = image.astype(np.float64)
        second += wide.T @ wide
    vectors = np.linalg.eigh(second)[1][:, ::-1]
    curves = []
    for image in x:
        energy = ((image.astype(np.float64) @ vectors) ** 2).sum(0)
        curves.append(np.cumsum(energy) / energy.sum())
    return curves


def numpy_sep(features: Tensor) -> object:
    """A complex FFT of every token."""
    total, square, count = 0.0, 0.0, 0
    for image in features.numpy():
        power = np.abs(np.fft.fft(image, axis=-1)) ** 2
        curve = np.cumsum(power, -1) / power.sum(-1, keepdims=True)
        total, square = total + curve.sum(0), square + (curve**2).sum(0)
        count += len(image)
    mean = total / count
    return mean, np.sqrt(np.maximum(square / count - mean**2, 0))


PARTS: dict[str, tuple[Callable[[Tensor], object], Callable[[Tensor], object]]] = {
    "spectra": (spectra, numpy_spectra),
    "pca": (pca, numpy_pca),
    "sep": (sep, numpy_sep),
}


def measure(images: int, min_seconds: float) -> list[Timed]:
    """Rows of `_COLUMNS`, of each part and of all three; milliseconds an image."""
    features = feature_maps(196, 384, images)
    steps = {}
    for name, pair in PARTS.items():
        for variant, function in zip(("featkd", "numpy"), pair, strict=True):
            steps[f"{name} {variant}"] = _step(function, features)
    times = timing.take_turns(
        steps, timing.clock_for(features.device), min_seconds=min_seconds, min_rounds=3
    )
    if featkd.last_backend("spectrum") != "cpu":
        raise RuntimeError("featkd.linalg runs on torch.linalg here: csrc is not built")
    rounds = min(len(seconds) for seconds in times.values())
    for variant in ("featkd", "numpy"):
        parts = [times[f"{name} {variant}"][:rounds] for name in PARTS]
        times[f"all {variant}"] = [sum(turn) for turn in zip(*parts, strict=True)]
    load = os.getloadavg()[0]
    rows = []
    for name in (*PARTS, "all"):
        for variant in ("featkd", "numpy"):
            seconds = times[f"{name} {variant}"]
            low, median, high = (1e3 * s / images for s in timing.quantiles(seconds))
            ratio = timing.speedup(times[f"{name} numpy"], seconds)
            rows.append((name, variant, low, median, high, ratio, len(seconds), load))
    return rows


def _step(function: Callable[[Tensor], object], features: Tensor) -> Step:
    def run(ready: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        function(features)
        return ready

    return Step(lambda: (), run)


def measured(rows: Iterable[Timed]) -> list[results.Measured]:
    """Every figure of the rows, in the JSON form."""
    return [
        (f"diagnostics/{part}", variant, metric, unit, value)
        for part, variant, *figures in rows
        for (metric, unit), value in zip(_UNITS.items(), figures, strict=True)
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a line a variant, and write the files that are named."""
    parser = Parser(prog="featkd.benchmarks.diagnostics", description="time featkd.diagnostics")
    parser.add_argument("--images", type=int, default=500, help="of 196 x 384, in memory")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="for each variant")
    add_json(parser)
    parser.add_argument("--out", type=str, default=None, metavar="FILE.csv")
    options = parser.parse_args(words)
    check_positive("--images", options.images)
    check_positive("--min-seconds", options.min_seconds)
    check_folders(options, ("json", "out"))
    about = results.describe_run("cpu")
    rows = measure(options.images, options.min_seconds)
    for row in rows:
        part, variant, _, median, _, ratio, *_ = row
        print(f"{part:8} {variant:7} {median:8.3f} ms an image, numpy takes {ratio:5.1f} x")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    print(f"peak memory of the process: {peak / 2**20:.0f} MiB, the features among it")
    if options.json is not None:
        meta = {**results.meta_of(about), "images": options.images}
        memory = ("diagnostics", "process", "peak_bytes", "bytes", peak)
        results.write_json(Path(options.json), meta, [*measured(rows), memory])
    if options.out is not None:
        lines = ((*about.values(), *row) for row in rows)
        write_csv(Path(options.out), (*about, *_COLUMNS), lines, digits=6)


if __name__ == "__main__":
    main()
