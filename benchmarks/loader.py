"""Loaders side by side: featkd's on DALI and on timm, and torchvision's, and the stages alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from featkd.data import DataConfig, build_loader, build_transform, read_image
from featkd.data.workers import shut_down_workers, worker_options

from . import timing
from .photographs import Photographs
from .throughput import Rate
from .variants import Step

LIBRARIES = ("dali", "timm", "torchvision")
FORMS = ("plain", "randaugment")
VARIANTS = tuple(f"{library}/{form}" for form in FORMS for library in LIBRARIES)
RAND_AUGMENT = "rand-m9-n2-mstd0.5-inc1"

Epoch = Callable[[], int]
"""Runs one epoch and returns how many images came."""


@dataclass
class Loaders:
    """What could be built: an epoch of each variant, why others could not, and how to end all."""

    epochs: dict[str, Epoch] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    closing: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """End the loaders' processes."""
        for close in self.closing:
            close()


def measure(
    photos: Photographs, variants: Sequence[str], *, batch_size: int, rounds: int
) -> tuple[list[Rate], dict[str, str]]:
    """Images/s of whole epochs, in turns, after an epoch each to warm up.

    An epoch counts from asking for its first batch to having its last, so that nothing is loaded
    before the clock starts. Worker processes live on from one epoch to the next.

    Args:
        variants: among `VARIANTS`.
        batch_size: images in a batch; a last, partial batch is dropped.
        rounds: epochs a variant.

    Returns:
        The rates, and of each variant that could not be built: why.
    """
    loaders = _build(photos.data, variants, batch_size)
    counts: dict[str, int] = {}

    def counted(name: str) -> None:
        counts[name] = loaders.epochs[name]()

    try:
        seconds = _in_turns({name: partial(counted, name) for name in loaders.epochs}, rounds)
    finally:
        loaders.close()
    rates = [Rate("loader", name, counts[name], seconds[name]) for name in loaders.epochs]
    return rates, loaders.refused


def _step(work: Callable[[], object]) -> Step:
    def run(ready: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        work()
        return ready

    return Step(lambda: (), run)


def _in_turns(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in so many rounds after one to warm up."""
    steps = {name: _step(run) for name, run in work.items()}
    clock = timing.clock_for(torch.device("cpu"))
    return timing.take_turns(steps, clock, min_seconds=0, min_rounds=rounds)


def _build(data: DataConfig, variants: Sequence[str], batch_size: int) -> Loaders:
    # Loaded first, so that no DataLoader here forks beside DALI's threads.
    with suppress(ImportError):
        import nvidia.dali  # noqa: F401
    loaders = Loaders()
    for variant in variants:
        library, form = variant.split("/")
        config = with_form(data, form)
        if library == "torchvision":
            loaders.epochs[variant] = _torchvision_epoch(config, batch_size, loaders)
            continue
        backend: Any = library
        try:
            loader = build_loader(
                replace(config, backend=backend), split="train", batch_size=batch_size
            )
        except ValueError as error:
            loaders.refused[variant] = str(error)
            continue
        loaders.closing.append(loader.close)
        loaders.epochs[variant] = _epoch(loader)
    return loaders


def with_form(data: DataConfig, form: str) -> DataConfig:
    """The published crop, flip and erasing, each image once an epoch, with RandAugment or not."""
    rand_augment = RAND_AUGMENT if form == "randaugment" else None
    augment = replace(data.augment, repeats=1, color_jitter=None, rand_augment=rand_augment)
    return replace(data, augment=augment)


def _epoch(loader: Any) -> Epoch:
    numbers = iter(range(1_000_000))

    def epoch() -> int:
        loader.set_epoch(next(numbers))
        return sum(len(batch.targets) for batch in loader)

    return epoch


def _torchvision_epoch(config: DataConfig, batch_size: int, loaders: Loaders) -> Epoch:
    """torchvision's own data set and transforms in torch's DataLoader, as its users write it."""
    workers = config.workers
    loader = DataLoader(
        datasets.ImageFolder(config.path, torchvision_transform(config)),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        persistent_workers=workers > 0,
        **worker_options(workers),
    )

    loaders.closing.append(partial(shut_down_workers, loader))
    return lambda: sum(len(targets) for _, targets in loader)


def torchvision_transform(config: DataConfig) -> Callable[[Image.Image], torch.Tensor]:
    """The training transform of a configuration in torchvision's v2 transforms.

    Its RandAugment draws another magnitude for the same op: it has no noise of the level. What
    is done to a pixel is as much.
    """
    augment = config.augment
    steps: list[Any] = [
        v2.RandomResizedCrop(
            config.img_size,
            augment.scale,
            augment.ratio,
            interpolation=v2.InterpolationMode(config.interpolation),
        ),
        v2.RandomHorizontalFlip(augment.hflip),
    ]
    if augment.rand_augment is not None:
        steps.append(v2.RandAugment(num_ops=2, magnitude=9))
    steps += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config.mean, config.std),
        v2.RandomErasing(augment.random_erasing, value="random"),
    ]
    transform: Callable[[Image.Image], torch.Tensor] = v2.Compose(steps)
    return transform


def measure_stages(photos: Photographs, *, images: int, rounds: int) -> list[Rate]:
    """Images/s of decoding and of augmenting alone, in this thread, in turns.

    DALI's stages run in one pipeline, which times no stage: only its decoder is set beside the
    others, in a pipeline of its own with one thread. (Its loader decodes the crop's window alone.)

    Args:
        images: of a round.
        rounds: timed rounds, after one to warm up.
    """
    paths = list(islice(cycle(photos.paths), images))
    pictures = [read_image(path) for path in paths]
    work: dict[str, Callable[[], object]] = {
        "decode timm": lambda: [read_image(path) for path in paths],
    }
    with suppress(ImportError):
        work["decode dali"] = _dali_decoder(paths)
    for form in FORMS:
        config = with_form(photos.data, form)
        for library, transform in (
            ("timm", build_transform(config, training=True)),
            ("torchvision", torchvision_transform(config)),
        ):
            work[f"augment {library}/{form}"] = _over(transform, pictures)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        seconds = _in_turns(work, rounds)
    finally:
        torch.set_num_threads(threads)
    split = {name: name.partition(" ") for name in work}
    return [Rate(part, variant, images, seconds[n]) for n, (part, _, variant) in split.items()]


def _over(
    transform: Callable[[Image.Image], torch.Tensor], pictures: Iterable[Image.Image]
) -> Callable[[], object]:
    return lambda: [transform(picture) for picture in pictures]


def _dali_decoder(paths: Sequence[str]) -> Callable[[], object]:
    """Decodes all paths with one DALI thread; waits for the last of them."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types

    def feed() -> list[Any]:
        return [np.fromfile(path, dtype=np.uint8) for path in paths]

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=len(paths), num_threads=1, device_id=None, prefetch_queue_depth=1
    )
    def decode() -> Any:
        files = fn.external_source(source=feed, batch=True, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(files, output_type=types.RGB, adjust_orientation=False)

    pipeline = decode()
    pipeline.build()
    return pipeline.run  # type: ignore[no-any-return]


def busiest(rates: Sequence[Rate], form: str, workers: int) -> tuple[str, dict[str, float]]:
    """What takes most of the timm loader's time for an image, and the share of each part.

    A worker's time for an image is workers / (images/s of the loader); what decoding and
    augmenting alone don't explain of it is stacking, handing over, and waiting for a core.
    """
    known = {(rate.name, rate.variant): rate for rate in rates}
    whole = max(workers, 1) / known["loader", f"timm/{form}"].images_per_s
    shares = {
        "decode": 1 / known["decode", "timm"].images_per_s / whole,
        "augment": 1 / known["augment", f"timm/{form}"].images_per_s / whole,
    }
    shares["hand over"] = max(0.0, 1 - sum(shares.values()))
    return max(shares, key=lambda name: shares[name]), shares
