"""How far the DALI loader's pixels are from timm's, operation by operation, on real images.

    python -m featkd.benchmarks.pixels --data DIR [--out docs/training.md]

A row is one operation alone: both sides start from the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from torch import Tensor

from featkd.cli.arguments import Parser, check_folders
from featkd.data import DataConfig, ImageSet, read_image
from featkd.data.augment import build_transform, kept_generators, seeded
from featkd.data.augment_params import Decisions, Operation, TrainingDecisions, evaluation_decisions
from featkd.data.dali.files import as_png
from featkd.data.dali.pipeline import as_arrays, build_pipeline
from featkd.data.sampler import Key

from .table import write_into

_BATCH = 32
# near the levels that rand-m9-mstd0.5-inc1 draws, both signs
OPERATIONS = (
    Operation("AutoContrast", ()),
    Operation("Equalize", ()),
    Operation("Invert", ()),
    Operation("Rotate", (27.0,)),
    Operation("Rotate", (-25.0,)),
    Operation("PosterizeIncreasing", (1,)),
    Operation("PosterizeIncreasing", (0,)),
    Operation("SolarizeIncreasing", (26,)),
    Operation("SolarizeAdd", (99,)),
    Operation("ColorIncreasing", (1.81,)),
    Operation("ColorIncreasing", (0.19,)),
    Operation("ContrastIncreasing", (1.81,)),
    Operation("ContrastIncreasing", (0.19,)),
    Operation("BrightnessIncreasing", (1.81,)),
    Operation("BrightnessIncreasing", (0.19,)),
    Operation("SharpnessIncreasing", (1.81,)),
    Operation("SharpnessIncreasing", (0.19,)),
    Operation("ShearX", (0.27,)),
    Operation("ShearY", (-0.27,)),
    Operation("TranslateXRel", (0.405,)),
    Operation("TranslateYRel", (-0.405,)),
)
Pixels = np.ndarray[Any, Any]


@dataclass
class Difference:
    """Absolute difference between two sets of images, in levels of 255."""

    name: str
    mean: float
    worst_image: float
    """Mean over the image that differs most."""
    largest: float
    equal: float
    """Share of the values that are equal."""


def through_dali(
    config: DataConfig,
    files: Sequence[Pixels],
    decisions: Sequence[Decisions],
    *,
    layers: int = 0,
    fill: tuple[int, int, int] = (0, 0, 0),
    resize: str = "auto",
) -> Pixels:
    """Run files through the loader's pipeline on the CPU, without its normalisation.

    Args:
        config: sizes and filter; its statistics are not used.
        files: contents, (bytes,) uint8 each.
        decisions: for each file.
        layers, fill, resize: as `build_pipeline`.

    Returns:
        (B, H, W, 3) float32 levels, 0 to 255.
    """
    levels = replace(config, mean=(0, 0, 0), std=(1 / 255,) * 3, channels_last=True)
    starts = iter(range(0, len(files), _BATCH))

    def feed() -> tuple[list[Any], ...]:
        start = next(starts)  # its StopIteration ends the pipeline
        batch = slice(start, start + _BATCH)
        return as_arrays(list(files[batch]), decisions[batch], layers, config.img_size)

    pipeline = build_pipeline(
        levels,
        feed,
        batch_size=_BATCH,
        layers=layers,
        fill=fill,
        device=torch.device("cpu"),
        resize=resize,
    )
    found: list[Pixels] = []
    while len(found) < len(files):
        (out,) = pipeline.run()
        found += list(np.array(out.as_tensor()))
    return np.stack(found)


def step_differences(config: DataConfig, paths: Sequence[str]) -> list[Difference]:
    """Decoding and resizing alone, and the whole transforms of evaluation and training.

    Training is without RandAugment, of which a level of difference can make a whole one, and
    without random erasing, which is equal by construction.
    """
    images = [read_image(path) for path in paths]
    files = [np.fromfile(path, np.uint8) for path in paths]
    corner = min(min(image.size) for image in images)
    cut = [Decisions((0, 0, corner, corner), (corner, corner), (0, 0))] * len(files)
    theirs = _stack([image.crop((0, 0, corner, corner)) for image in images])
    ours = through_dali(replace(config, img_size=corner), files, cut)
    found = [_difference("decode", ours, theirs)]

    augment = replace(config.augment, rand_augment=None, random_erasing=0)
    plain = replace(config, augment=augment, mean=(0, 0, 0), std=(1, 1, 1))
    keys = [Key(0, number, 0) for number in range(len(images))]
    draw = TrainingDecisions(plain, seed=0)
    with kept_generators():
        drawn = [draw.draw(image.size, key) for image, key in zip(images, keys, strict=True)]
    theirs = _stack([_resized(config, *pair) for pair in zip(images, drawn, strict=True)])
    unchanged = [as_png(image) for image in images]
    windows = [replace(decisions, flip=False) for decisions in drawn]
    for name, resize in (("resize (torch)", "auto"), ("resize (DALI, on the CPU)", "dali")):
        ours = through_dali(config, unchanged, windows, resize=resize)
        found.append(_difference(name, ours, theirs))

    training = build_transform(plain, training=True)
    whole = []
    for image, key in zip(images, keys, strict=True):
        with seeded(0, key):
            whole.append(training(image))
    found.append(
        _difference("all of training, plain", through_dali(config, files, drawn), _levels(whole))
    )
    evaluation = build_transform(plain, training=False)
    central = [evaluation_decisions(i.size, config.img_size, config.crop_pct) for i in images]
    whole = [evaluation(image) for image in images]
    found.append(
        _difference("all of evaluation", through_dali(config, files, central), _levels(whole))
    )
    return found


def operation_differences(config: DataConfig, paths: Sequence[str]) -> list[Difference]:
    """RandAugment's operations, each from the same resized pixels."""
    transform = build_transform(config, training=True)
    steps: Sequence[Any] = transform.transforms  # type: ignore[attr-defined]
    ops = {op.name: op for step in steps if isinstance(step, RandAugment) for op in step.ops}
    fill = TrainingDecisions(config, seed=0).fill
    side = config.img_size
    images = [read_image(path).resize((side, side)) for path in paths]
    files = [as_png(image) for image in images]
    whole = Decisions((0, 0, side, side), (side, side), (0, 0))
    found = []
    for operation in OPERATIONS:
        op = ops[operation.name]
        decisions = [replace(whole, operations=[operation])] * len(files)
        ours = through_dali(config, files, decisions, layers=1, fill=fill)
        theirs = [op.aug_fn(image, *operation.arguments, **op.kwargs) for image in images]
        argument = "".join(f" {value:g}" for value in operation.arguments)
        name = operation.name.removesuffix("Increasing") + argument
        found.append(_difference(name, ours, _stack(theirs)))
    return found


def _resized(config: DataConfig, image: Image.Image, decisions: Decisions) -> Image.Image:
    top, left, height, width = decisions.window
    window = image.crop((left, top, left + width, top + height))
    return window.resize(decisions.size, Image.Resampling[config.interpolation.upper()])


def _stack(images: Sequence[Image.Image]) -> Pixels:
    return np.stack([np.asarray(image, np.float32) for image in images])


def _levels(images: Sequence[Tensor]) -> Pixels:
    """(3, H, W) tensors of 0 to 1 as (B, H, W, 3) levels."""
    return 255 * torch.stack(list(images)).permute(0, 2, 3, 1).numpy()


def _difference(name: str, ours: Pixels, theirs: Pixels) -> Difference:
    apart = np.abs(ours - theirs)
    equal = float(np.mean(apart < 0.5))
    worst = float(apart.mean((1, 2, 3)).max())
    return Difference(name, float(apart.mean()), worst, float(apart.max()), equal)


def markdown(differences: Sequence[Difference], images: int) -> str:
    """The differences as a Markdown table."""
    lines = [
        "| step | mean | worst image | largest | equal values |\n|---|--:|--:|--:|--:|\n",
        *(
            f"| {d.name} | {d.mean:.3f} | {d.worst_image:.2f} | {d.largest:.0f} "
            f"| {100 * d.equal:.1f} % |\n"
            for d in differences
        ),
        f"\n{images} images, absolute differences in levels of 255.\n",
    ]
    return "".join(lines)


def main() -> None:
    """Compare, and print the table or put it into a document."""
    parser = Parser(prog="featkd.benchmarks.pixels", description="DALI's pixels beside timm's")
    parser.add_argument("--data", type=str, required=True, help="folder of class folders")
    parser.add_argument(
        "--out", type=str, default=None, metavar="FILE.md", help="document with marks for 'pixels'"
    )
    options = parser.parse_args()
    check_folders(options, ("out",))
    config = DataConfig(options.data, train_split=".", val_split=".", backend="dali", workers=2)
    dataset = ImageSet(config, "train")
    paths = [dataset.name(index) for index in range(len(dataset))]
    found = [*step_differences(config, paths), *operation_differences(config, paths)]
    text = markdown(found, len(paths))
    if options.out is None:
        print(text, end="")
    else:
        write_into(Path(options.out), "pixels", text)


if __name__ == "__main__":
    main()
