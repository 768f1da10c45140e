r"""What a teacher's feature map costs on a disk, in each form, and what the form does to the loss.

python -m featkd.benchmarks.cached_features --data DIR [--teacher NAME | run/best.pt]
    [--checkpoint weights.safetensors] [--images 250] [--json FILE] [--out docs/cache-sizes.md]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featkd.cache.lowrank import FORMS, Form, LowRank, compress, dequantise, quantise, restore
from featkd.cli.arguments import Parser, add_json, check_folders
from featkd.data import DataConfig
from featkd.diagnostics.model_features import ModelFeatures, Subject
from featkd.functional import projected_feature_kd
from featkd.models import FeatureModel, create_teacher
from featkd.runtime.checks import check_positive
from featkd.train import checkpoint
from featkd.train.trained import load_trained

from .results import Measured, describe_run, meta_of, versions_of, write_json
from .table import aligned, grid, write_into

IMAGENET = 1_281_167  # training images of ImageNet-1K
VIEWS = (1, 30, 300)  # augmented views an image: a fixed crop, some, one an epoch as published
ENERGIES = (0.95, 0.99, 0.999)
WORKERS = 2

_HEADER = (
    "form", "mean rank", "bytes/image", *(f"x {views}" for views in VIEWS), "loss", "dS", "dW"
)  # fmt: skip

Stored = tuple[Tensor, float, int]
"""(maps as they are read back, summed matrix rank, bytes) of some images."""


@dataclass
class Figures:
    """Sums over the images of one form."""

    images: int = 0
    rank: float = 0.0
    size: int = 0
    loss: float = 0.0
    wrong: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Squared norms of the errors of dS and dW, batch by batch."""

    def errors(self, exact: Figures, norms: Sequence[float]) -> tuple[float, ...]:
        """Relative errors of the loss (signed: a map that lost energy is another distance away),
        of dS and of dW."""
        pairs = zip(self.wrong, norms, strict=True)
        return (self.loss / exact.loss - 1, *((w / n) ** 0.5 for w, n in pairs))


def _whole(features: Tensor, dtype: torch.dtype) -> Stored:
    stored = features.to(dtype)
    return stored, len(features) * min(features.shape[1:]), stored.nbytes


def _whole_scaled(features: Tensor, form: Form) -> Stored:
    stored, scale = quantise(features, form)
    count = len(features) * min(features.shape[1:])
    return dequantise(stored, scale), count, stored.nbytes + scale.nbytes


def _thin(features: Tensor, energy: float, form: Form) -> Stored:
    """Bytes are those of each image's own rank: a file needs no padding."""
    factors, ranks = compress(features, energy=energy)
    parts = [quantise(x, form) for x in factors]
    rank = int(ranks.sum())
    column = sum(
        stored.shape[1] * stored.itemsize + scale.shape[1] * scale.itemsize
        for stored, scale in parts
    )
    return restore(LowRank(*(dequantise(*pair) for pair in parts))), rank, rank * column


def forms() -> dict[str, Callable[[Tensor], Stored]]:
    """Each form by its name; the first is exact."""
    found: dict[str, Callable[[Tensor], Stored]] = {
        "full fp32": partial(_whole, dtype=torch.float32),
        "full bf16": partial(_whole, dtype=torch.bfloat16),
    }
    for form in FORMS:
        found[f"full {form}"] = partial(_whole_scaled, form=form)
    for energy in ENERGIES:
        for form in FORMS:
            found[f"energy {energy:g} {form}"] = partial(_thin, energy=energy, form=form)
    return found


def measure(maps: Iterator[Tensor]) -> dict[str, tuple[float, ...]]:
    """Rank and bytes an image, and the errors of loss, dS and dW, of every form.

    The student's map is random, half as wide, and projected to the teacher's root mean square; the
    loss is the mse. Errors are against the float32 map, in batches as they come.
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


def markdown(rows: dict[str, tuple[float, ...]], about: str) -> str:
    """The table, and a line on where it comes from."""
    return f"{grid(_HEADER, [_cells(*row) for row in rows.items()])}\n{about}.\n"


def _model(word: str, file: str | None) -> tuple[FeatureModel, DataConfig, str]:
    """The teacher, the preprocessing that it was made for, and what it is."""
    if word.endswith(".pt"):
        if file is not None:
            raise ValueError(f"--checkpoint: got {file} beside {word}, which holds its weights")
        state = checkpoint.load(word)
        data = state["recipe"]["data"]
        kept = {k: data[k] for k in ("img_size", "mean", "std", "crop_pct", "interpolation")}
        trained: Any = load_trained(word)
        student = state["recipe"]["student"]
        options = ", ".join(f"{k} {v}" for k, v in student["options"].items())
        about = f"{student['base']} ({options}) of {word}, {state['update']} updates by featkd"
        return trained, DataConfig(workers=WORKERS, **kept), about
    torch.manual_seed(0)
    model: Any = create_teacher(word, checkpoint=file)
    made = model.pretrained_cfg
    config = DataConfig(
        workers=WORKERS,
        img_size=made["input_size"][-1],
        mean=tuple(made["mean"]),
        std=tuple(made["std"]),
        crop_pct=made["crop_pct"],
        interpolation=made["interpolation"],
    )
    return model, config, f"{word}, {f'weights of {file}' if file else 'random weights, seed 0'}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print the table; write it where asked."""
    parser = Parser(
        prog="featkd.benchmarks.cached_features",
        description="sizes and errors of a teacher's stored feature maps (last layer)",
    )
    parser.add_argument("--data", type=str, required=True, metavar="DIR", help="images below it")
    parser.add_argument(
        "--teacher", type=str, default="cait_s24_224", help="a timm name, or a featkd run's .pt"
    )
    parser.add_argument("--checkpoint", type=str, default=None, metavar="FILE", help="its weights")
    parser.add_argument("--images", type=int, default=250, help="at most, spread evenly")
    parser.add_argument("--batch-size", type=int, default=32)
    add_json(parser)
    parser.add_argument(
        "--out", type=str, default=None, metavar="FILE.md", help="a document with marks"
    )
    parser.add_argument("--mark", type=str, default="cached-features", help="of the document")
    options = parser.parse_args(words)
    check_positive("--images", options.images)
    check_positive("--batch-size", options.batch_size)
    check_folders(options, ("json", "out"))
    model, config, about = _model(options.teacher, options.checkpoint)
    source = ModelFeatures(
        [Subject("", model, (-1,), {})],
        Path(options.data),
        config,
        device=torch.device("cpu"),
        limit=options.images,
        chunk_size=options.batch_size,
    )
    run = describe_run("cpu")
    (layer,) = source.layers
    chunks = range(-(-source.num_images // options.batch_size))
    maps = (chunk.maps[layer].float() for chunk in source.chunks(chunks))
    rows = measure(maps)
    about = (
        f"{about}; {source.num_images} images of {options.data}, last layer; mse to a random "
        f"student, batches of {options.batch_size}; {versions_of(run)}"
    )
    print(about)
    print(aligned(_HEADER, [_cells(*row) for row in rows.items()], numbers=True))
    if options.json is not None:
        measured = _measured(options.teacher, rows)
        write_json(Path(options.json), meta_of(run) | {"about": about}, measured)
    if options.out is not None:
        write_into(Path(options.out), options.mark, markdown(rows, about))


def _measured(teacher: str, rows: dict[str, tuple[float, ...]]) -> list[Measured]:
    metrics = (
        ("rank", "count"), ("bytes", "bytes/image"), ("loss_error", "ratio"),
        ("student_gradient_error", "ratio"), ("weight_gradient_error", "ratio"),
    )  # fmt: skip
    return [
        (f"cached_features/{teacher}", name, metric, unit, value)
        for name, values in rows.items()
        for (metric, unit), value in zip(metrics, values, strict=True)
    ]


if __name__ == "__main__":
    main()
