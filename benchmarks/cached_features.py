"""Bytes of a teacher's feature map on disk in each form of a cache, and the error of each form.

python -m featkd.benchmarks.cached_features --data DIR [--teacher NAME | run/best.pt]
    [--checkpoint weights.safetensors] [--images 250] [--out docs/cache-sizes.md]
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featkd.cache.lowrank import FORMS, Form, LowRank, compress, dequantise, quantise, restore
from featkd.data import DataConfig
from featkd.diagnostics.model_features import MeasuredModel, ModelFeatures
from featkd.functional import projected_feature_kd
from featkd.models import FeatureModel, create_teacher
from featkd.runtime.checks import check_positive
from featkd.train import checkpoint
from featkd.train.trained import load_trained

from .results import describe_run, versions_of
from .table import aligned, grid, write_into

IMAGENET = 1_281_167  # training images of ImageNet-1K
VIEWS = (1, 30, 300)  # augmented views per image; 300 is one per epoch of the published recipe
ENERGIES = (0.95, 0.99, 0.999)
_WORKERS = 2
_HEADER = (
    "form", "mean rank", "bytes/image", *(f"x {views}" for views in VIEWS), "loss", "dS", "dW"
)  # fmt: skip

Stored = tuple[Tensor, float, int]
"""(maps as they are read back, sum of the matrix ranks, bytes) for some images."""


@dataclass
class Figures:
    """Sums over the images in one form."""

    images: int = 0
    rank: float = 0.0
    size: int = 0
    loss: float = 0.0
    wrong: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Squared norms of the errors of dS and dW, batch by batch."""

    def errors(self, exact: Figures, norms: Sequence[float]) -> tuple[float, ...]:
        """Returns the relative errors of the loss (with its sign), of dS and of dW."""
        pairs = zip(self.wrong, norms, strict=True)
        return (self.loss / exact.loss - 1, *((w / n) ** 0.5 for w, n in pairs))


def _full(features: Tensor, dtype: torch.dtype) -> Stored:
    stored = features.to(dtype)
    return stored, len(features) * min(features.shape[1:]), stored.nbytes


def _full_scaled(features: Tensor, form: Form) -> Stored:
    stored, scale = quantise(features, form)
    count = len(features) * min(features.shape[1:])
    return dequantise(stored, scale), count, stored.nbytes + scale.nbytes


def _low_rank(features: Tensor, energy: float, form: Form) -> Stored:
    factors, ranks = compress(features, energy=energy)
    parts = [quantise(x, form) for x in factors]
    rank = int(ranks.sum())
    # each image at its own rank: a file stores no padding
    column = sum(
        stored.shape[1] * stored.itemsize + scale.shape[1] * scale.itemsize
        for stored, scale in parts
    )
    return restore(LowRank(*(dequantise(*pair) for pair in parts))), rank, rank * column


def forms() -> dict[str, Callable[[Tensor], Stored]]:
    """Returns each form by name; the first is exact."""
    found: dict[str, Callable[[Tensor], Stored]] = {
        "full fp32": partial(_full, dtype=torch.float32),
        "full bf16": partial(_full, dtype=torch.bfloat16),
    }
    for form in FORMS:
        found[f"full {form}"] = partial(_full_scaled, form=form)
    for energy in ENERGIES:
        for form in FORMS:
            found[f"energy {energy:g} {form}"] = partial(_low_rank, energy=energy, form=form)
    return found


def measure(maps: Iterator[Tensor]) -> dict[str, tuple[float, ...]]:
    """Measures rank and bytes per image, and the errors of loss, dS and dW, of every form.

    The loss is the mse. The student's map is random, half as wide, and projected to the root mean
    square of the teacher's. Errors are relative to the float32 map, over the given batches.
    """
    found = {name: Figures() for name in forms()}
    norms = [0.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    for features in maps:
        batch, tokens, channels = features.shape
        width = max(1, channels // 2)
        student = torch.randn(batch, tokens, width, generator=generator)
        weight = torch.randn(channels, width, generator=generator)
        weight *= features.square().mean().sqrt() / width**0.5
        leaves = (student.requires_grad_(), weight.requires_grad_())
        exact: tuple[Tensor, ...] = ()
        for name, store in forms().items():
            teacher, rank, size = store(features)
            loss = projected_feature_kd(student, teacher, weight)
            gradients = torch.autograd.grad(loss, leaves)
            exact = exact or gradients
            figures = found[name]
            figures.images += batch
            figures.rank += rank
            figures.size += size
            figures.loss += batch * loss.item()
            for i, (ours, right) in enumerate(zip(gradients, exact, strict=True)):
                figures.wrong[i] += float((ours - right).double().square().sum())
        for i, right in enumerate(exact):
            norms[i] += float(right.double().square().sum())
    first = next(iter(found.values()))
    if not first.images:
        raise ValueError("--data: none of its images could be read")
    return {
        name: (f.rank / f.images, f.size / f.images, *f.errors(first, norms))
        for name, f in found.items()
    }


def _cells(name: str, values: Sequence[float]) -> list[str]:
    rank, size, loss, *gradients = values
    totals = (f"{_bytes(size * IMAGENET * views)}" for views in VIEWS)
    errors = (f"{loss:+.1e}", *(f"{error:.1e}" for error in gradients))
    return [name, f"{rank:.1f}", f"{size:,.0f}", *totals, *errors]


def _bytes(count: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MB"


def _model(name: str, file: str | None) -> tuple[FeatureModel, DataConfig, str]:
    """Returns the teacher, its preprocessing, and a description."""
    if name.endswith(".pt"):
        if file is not None:
            raise ValueError(f"--checkpoint: got {file}, but {name} already has weights; drop one")
        state = checkpoint.load(name)
        data = state["recipe"]["data"]
        kept = {k: data[k] for k in ("img_size", "mean", "std", "crop_pct", "interpolation")}
        trained: Any = load_trained(name)
        student = state["recipe"]["student"]
        options = ", ".join(f"{k} {v}" for k, v in student["options"].items())
        about = f"{student['base']} ({options}), {state['update']} updates by featkd"
        return trained, DataConfig(workers=_WORKERS, **kept), about
    torch.manual_seed(0)
    model: Any = create_teacher(name, checkpoint=file)
    made = model.pretrained_cfg
    config = DataConfig(
        workers=_WORKERS,
        img_size=made["input_size"][-1],
        mean=tuple(made["mean"]),
        std=tuple(made["std"]),
        crop_pct=made["crop_pct"],
        interpolation=made["interpolation"],
    )
    return model, config, f"{name}, {f'weights of {file}' if file else 'random weights, seed 0'}"


def main(words: Sequence[str] | None = None) -> None:
    """Measures and prints the table, or writes it into a document."""
    parser = argparse.ArgumentParser(
        description="Sizes and errors of a teacher's stored feature maps (last layer)."
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with images below it")
    parser.add_argument(
        "--teacher", default="cait_s24_224", help="timm name, or the .pt of a featkd run"
    )
    parser.add_argument("--checkpoint", default=None, metavar="FILE", help="the teacher's weights")
    parser.add_argument("--images", type=int, default=250, help="most images, spread evenly")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.md", help="document")
    parser.add_argument("--mark", default="cached-features", help="name of the document's marks")
    options = parser.parse_args(words)
    check_positive("--images", options.images)
    check_positive("--batch-size", options.batch_size)
    model, config, about = _model(options.teacher, options.checkpoint)
    source = ModelFeatures(
        [MeasuredModel("", model, (-1,), {})],
        Path(options.data),
        config,
        device=torch.device("cpu"),
        limit=options.images,
        chunk_size=options.batch_size,
    )
    (layer,) = source.layers
    chunks = range(-(-source.num_images // options.batch_size))
    rows = measure(chunk.maps[layer].float() for chunk in source.chunks(chunks))
    lines = [_cells(*row) for row in rows.items()]
    about = (
        f"{about}; {source.num_images} images, last layer; mse to a random "
        f"student, batches of {options.batch_size}; {versions_of(describe_run('cpu'))}"
    )
    print(about)
    print(aligned(_HEADER, lines, numbers=True))
    if options.out is not None:
        described = textwrap.fill(f"{about}.", 120, break_on_hyphens=False)
        write_into(options.out, options.mark, f"{grid(_HEADER, lines)}\n{described}\n")


if __name__ == "__main__":
    main()
