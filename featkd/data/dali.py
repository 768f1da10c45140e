"""The loader on NVIDIA DALI: decode, crop, resize, flip and normalise in its threads or on a GPU.

Every random decision is the one that timm's transform would draw for the same key, by the same
calls in the same order, so that both loaders give the same windows, flips and erased boxes; the
pixels differ by the decoders' and filters' rounding.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from featkd.data.augment import seeded
from featkd.data.config import DataConfig
from featkd.data.imagefolder import BadImageError, ImageFolder, read_image
from featkd.data.loader import Batch, SampledLoader
from featkd.data.sampler import EpochSampler, Key

_END_OF_JPEG = b"\xff\xd9"
_TAIL = 4096  # bytes at the end of a file among which the end marker must be


def why_not(config: DataConfig, training: bool) -> str:
    """Why this loader can't serve a configuration, or nothing."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "nvidia-dali is not installed"
    if training and config.augment.rand_augment is not None:
        return "data.augment.rand_augment is not among what the DALI loader does"
    if training and config.augment.color_jitter is not None:
        return "data.augment.color_jitter is not among what the DALI loader does"
    return ""


@dataclass
class _Decisions:
    """All that is random about a sample, and where it comes from."""

    window: tuple[int, int, int, int]  # top, left, height, width in the image as stored
    size: tuple[int, int]  # that the window is resized to
    crop: tuple[int, int]  # top, left of the final image in it
    flip: bool
    erased: list[tuple[Any, Tensor]]


class DaliLoader(SampledLoader):
    """`Loader` on a DALI pipeline; see `build_loader`, which makes it.

    Args:
        dataset: the files.
        config: sizes, filter, statistics and augmentation.
        sampler: which image comes when.
        batch_size: images in a batch.
        device: where batches end up: "cpu", or a CUDA device, on which JPEGs are decoded too.
    """

    def __init__(
        self,
        dataset: ImageFolder,
        config: DataConfig,
        sampler: EpochSampler,
        *,
        batch_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(dataset, sampler, batch_size)
        self._dataset = dataset
        self._config = config
        self._device = device
        self._erase = RandomErasing(config.augment.random_erasing, mode="pixel", device="cpu")

    def __iter__(self) -> Iterator[Batch]:
        self._iteration += 1
        return self._run(iter(self._batches), self._iteration)

    def close(self) -> None:
        """See `Loader`."""
        self._iteration += 1

    def _run(self, keys: Iterator[Any], own: int) -> Iterator[Batch]:
        waiting: deque[tuple[list[int], list[_Decisions], list[str]]] = deque()
        bad: list[str] = []
        failed: list[BadImageError] = []

        def feed() -> tuple[list[Any], ...]:
            """The next batch's files and decisions; called ahead of the batch that is taken."""
            for batch in keys:
                files, decisions, targets = [], [], []
                for key in batch:
                    try:
                        found = self._sample(key, bad)
                    except BadImageError as error:  # comes up when the batches before are taken
                        failed.append(error)
                        raise StopIteration from error
                    if found is not None:
                        files.append(found[0])
                        decisions.append(found[1])
                        targets.append(found[2])
                if files:
                    waiting.append((targets, decisions, bad[:]))
                    bad.clear()
                    return (files, *_as_arrays(decisions))
            raise StopIteration

        pipeline = _pipeline(self._config, feed, self._batches.batch_size, self._device)
        while True:
            self._check_newest(own)
            try:
                (out,) = pipeline.run()
            except StopIteration:
                if failed:
                    raise failed[0] from None
                return
            targets, decisions, met = waiting.popleft()
            # a copy: the pipeline writes its next batch into the same memory
            images = torch.utils.dlpack.from_dlpack(out.as_tensor()).clone()
            for image, decision in zip(images, decisions, strict=True):
                for where, pixels in decision.erased:
                    image[where] = pixels.to(image.device, non_blocking=True)
            yield Batch(images, torch.tensor(targets, dtype=torch.int64), met)

    def _sample(self, key: Key, bad: list[str]) -> tuple[Any, _Decisions, int] | None:
        """File, decisions and target of a key, or None where its image is left out."""
        found, index, errors = self._dataset.readable(key, _load)
        for error in errors:
            self.bad_images[error.path] = error.cause
            bad.append(error.path)
        if found is None:
            return None
        content, size = found
        return content, self._decide(size, key), self._dataset.target(index)

    def _decide(self, size: tuple[int, int], key: Key) -> _Decisions:
        """What timm's transform would draw for an image of this (width, height)."""
        config = self._config
        side = config.img_size
        if not self._dataset.training:
            return _evaluation(size, side, config.crop_pct)
        augment = config.augment
        blank = Image.new("1", size)  # timm asks an image for its size; a bit a pixel
        with seeded(self._dataset.seed, key):
            top, left, height, width = RandomResizedCropAndInterpolation.get_params(
                blank, augment.scale, augment.ratio
            )
            flip = augment.hflip > 0 and bool(torch.rand(1) < augment.hflip)
            erased = _Recorder()
            if augment.random_erasing > 0:
                self._erase._erase(erased, 3, side, side, torch.float32)
        return _Decisions((top, left, height, width), (side, side), (0, 0), flip, erased.writes)


class _Recorder:
    """Takes what would be written into an image."""

    def __init__(self) -> None:
        self.writes: list[tuple[Any, Tensor]] = []

    def __setitem__(self, where: Any, pixels: Tensor) -> None:
        self.writes.append((where, pixels))


def _evaluation(size: tuple[int, int], side: int, crop_pct: float) -> _Decisions:
    """The shorter side to side / crop_pct, then the centre, rounded as torchvision does."""
    width, height = size
    shorter = int(side / crop_pct)
    longer = int(shorter * max(size) / min(size))
    resized = (shorter, longer) if height <= width else (longer, shorter)
    crop = tuple(round((length - side) / 2.0) for length in resized)
    return _Decisions((0, 0, height, width), resized, (crop[0], crop[1]), False, [])


def _load(path: str) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
    """A file's bytes as DALI decodes them as Pillow would, and its (width, height).

    Raises:
        BadImageError: it can't be opened, is no image, or is cut off.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        with Image.open(io.BytesIO(content)) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            size = image.size
    except Exception:
        read_image(path)  # says what is wrong with it
        raise
    if plain and _END_OF_JPEG in content[-_TAIL:]:
        return np.frombuffer(content, dtype=np.uint8), size
    # CMYK, 16 bits, palettes: the rules are read_image's; PNG carries its pixels unchanged
    rgb, written = read_image(path), io.BytesIO()
    rgb.save(written, "PNG", compress_level=0)
    return np.frombuffer(written.getvalue(), dtype=np.uint8), rgb.size


def _as_arrays(decisions: list[_Decisions]) -> tuple[list[Any], ...]:
    columns: list[tuple[list[Any], Any]] = [
        ([d.window[:2] for d in decisions], np.int32),
        ([d.window[2:] for d in decisions], np.int32),
        ([d.size for d in decisions], np.float32),
        ([d.crop for d in decisions], np.int32),
        ([d.flip for d in decisions], np.int32),
    ]
    return tuple([np.asarray(value, dtype) for value in values] for values, dtype in columns)


def _pipeline(config: DataConfig, feed: Any, batch_size: int, device: torch.device) -> Any:
    """Decode the window, resize it, crop, flip, normalise to (3, H, W)."""
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"
    filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
    kinds = (types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32)

    @pipeline_def  # type: ignore[untyped-decorator]
    def build() -> Any:
        files, start, shape, size, crop, flip = fn.external_source(
            source=feed, num_outputs=6, batch=True, dtype=list(kinds), ndim=[1, 1, 1, 1, 1, 0]
        )
        pixels = fn.decoders.image_slice(
            files,
            start,
            shape,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # as read_image
        )
        interpolation = filters[config.interpolation]
        pixels = fn.resize(pixels, size=size, interp_type=interpolation, antialias=True)
        pixels = fn.slice(
            pixels, crop, (config.img_size, config.img_size), axis_names="HW",
            normalized_anchor=False, normalized_shape=False,
        )  # fmt: skip
        return fn.crop_mirror_normalize(
            pixels,
            mirror=flip,
            mean=[255 * m for m in config.mean],
            std=[255 * s for s in config.std],
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    threads = config.workers or 1
    return build(
        batch_size=batch_size,
        num_threads=min(threads, os.cpu_count() or 1),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=2,
    )
