"""Images per second of featkd's loaders on DALI and timm, of torchvision's, and of their stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count, cycle, islice
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from featkd.data import DataConfig, SampleKey, build_loader, read_image
from featkd.data.augment import TrainTransform
from featkd.data.workers import shut_down_workers, worker_options

from . import timing
from .loader_overhead import overhead_loader
from .photographs import Photographs
from .throughput import Rate
from .variants import step_of

LIBRARIES = ("dali", "timm", "torchvision")
FORMS = ("plain", "randaugment")
VARIANTS = tuple(f"{library}/{form}" for form in FORMS for library in LIBRARIES)
RAND_AUGMENT = "rand-m9-n2-mstd0.5-inc1"


def measure(
    photos: Photographs, variants: Sequence[str], *, batch_size: int, rounds: int
) -> tuple[list[Rate], dict[str, str]]:
    """Times whole epochs in turns, after one epoch each to warm up.

    An epoch lasts from the request for its first batch to the last batch, so that nothing is loaded
    before the clock starts. Worker processes are kept from one epoch to the next.

    Args:
        variants: names in `VARIANTS`.
        batch_size: images per batch; the last, partial batch is dropped.
        rounds: timed epochs per variant.

    Returns:
        (rates, reason by variant for those that cannot be built).
    """
    # loaded first: no DataLoader may fork beside DALI's threads
    with suppress(ImportError):
        import nvidia.dali  # noqa: F401
    loaders: dict[str, Any] = {}
    refused: dict[str, str] = {}
    with ExitStack() as closing:
        for variant in variants:
            library, form = variant.split("/")
            config = with_form(photos.data, form)
            if library == "torchvision":
                loaders[variant] = _torchvision_loader(config, batch_size)
                closing.callback(shut_down_workers, loaders[variant])
                continue
            backend: Any = library
            try:
                loader = build_loader(
                    replace(config, backend=backend), split="train", batch_size=batch_size
                )
            except ValueError as error:
                refused[variant] = str(error)
                continue
            loaders[variant] = loader
            closing.callback(loader.close)
        return _epochs("loader", loaders, batch_size, rounds), refused


def measure_overhead(photos: Photographs, *, batch_size: int, rounds: int) -> list[Rate]:
    """Times whole epochs of the DALI loader's own work, in turns; see `overhead_loader`."""
    with ExitStack() as closing:
        loaders = {}
        for form in FORMS:
            loader = overhead_loader(with_form(photos.data, form), batch_size)
            closing.callback(loader.close)
            loaders[f"dali/{form}"] = loader
        return _epochs("overhead", loaders, batch_size, rounds)


def _epochs(name: str, loaders: Mapping[str, Any], batch_size: int, rounds: int) -> list[Rate]:
    """Times epochs of loaders that drop the last, partial batch, in turns."""
    seconds = _in_turns({v: _epoch(loader) for v, loader in loaders.items()}, rounds)
    return [Rate(name, v, len(x) * batch_size, seconds[v]) for v, x in loaders.items()]


def _epoch(loader: Any) -> Callable[[], None]:
    numbers = count()

    def epoch() -> None:
        if not isinstance(loader, DataLoader):
            loader.set_epoch(next(numbers))
        for _ in loader:
            pass

    return epoch


def _in_turns(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each by round, after one round to warm up."""
    steps = {name: step_of(run) for name, run in work.items()}
    return timing.take_turns(steps, timing.wall_clock(torch.device("cpu")), min_rounds=rounds)


def with_form(data: DataConfig, form: str) -> DataConfig:
    """Returns the published augmentation without repeats, with or without RandAugment."""
    rand_augment = RAND_AUGMENT if form == "randaugment" else None
    augment = replace(data.augment, repeats=1, color_jitter=None, rand_augment=rand_augment)
    return replace(data, augment=augment)


def _torchvision_loader(config: DataConfig, batch_size: int) -> Any:
    """Builds torchvision's data set and transforms in torch's DataLoader, as its users do."""
    return DataLoader(
        datasets.ImageFolder(config.path, torchvision_transform(config)),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        persistent_workers=config.workers > 0,
        **worker_options(config.workers),
    )


def torchvision_transform(config: DataConfig) -> Callable[[Image.Image], torch.Tensor]:
    """Builds the training transform of a configuration from torchvision's v2 transforms.

    Its RandAugment has no noise of the magnitude. It does as much work per pixel.
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
    """Times decoding and augmenting alone, in this thread, in turns.

    Of DALI only the decoder is timed, in a pipeline with one thread: a pipeline does not time its
    stages. DALI's loader decodes only the window of the crop.

    Args:
        images: images per round.
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
        work[f"augment timm/{form}"] = _over(_with_new_keys(TrainTransform(config, 0)), pictures)
        work[f"augment torchvision/{form}"] = _over(torchvision_transform(config), pictures)
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


def _with_new_keys(transform: TrainTransform) -> Callable[[Image.Image], torch.Tensor]:
    numbers = count()
    return lambda image: transform(image, SampleKey(0, next(numbers), 0))


def _dali_decoder(paths: Sequence[str]) -> Callable[[], object]:
    """Returns a call that decodes all paths with one DALI thread and waits for the last."""
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
