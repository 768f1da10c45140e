"""The loader on NVIDIA DALI: decode, crop, resize, flip, RandAugment and normalise in its threads
or on a GPU.

Every random decision is the one that timm's transform would draw for the same key, by the same
calls in the same order, so that both loaders give the same windows, flips, operations and erased
boxes; the pixels differ by the decoders' and filters' rounding.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featkd.data.augment import kept_generators
from featkd.data.config import DataConfig
from featkd.data.dali_augment import supported
from featkd.data.dali_pipeline import as_arrays, build_pipeline
from featkd.data.decisions import Decisions, TrainingDecisions, evaluation_decisions
from featkd.data.images import BadImageError, decode_image
from featkd.data.imageset import ImageSet
from featkd.data.loader import Batch, SampledLoader, as_tensor
from featkd.data.sampler import EpochSampler, Key

_END_OF_JPEG = b"\xff\xd9"
_TAIL = 4096  # bytes at the end of a file among which the end marker must be
_READ_AHEAD = 2  # batches

_File = tuple[np.ndarray[Any, Any], tuple[int, int]]  # content, (width, height)
# what ImageSet.readable gives
_Read = tuple[tuple[_File, int, int] | None, list[BadImageError]]


def why_not(config: DataConfig, training: bool) -> str:
    """Why this loader can't serve a configuration, or nothing."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "nvidia-dali is not installed"
    if not training:
        return ""
    if config.augment.color_jitter is not None:
        return "data.augment.color_jitter is not among what the DALI loader does"
    names = TrainingDecisions(config, 0).operations
    unknown = [name for name in names if not supported(name)]
    if unknown:
        return (
            f"data.augment.rand_augment: {', '.join(unknown)} of {config.augment.rand_augment!r} "
            "can't be done by the DALI loader"
        )
    return ""


class DaliLoader(SampledLoader):
    """`Loader` on a DALI pipeline; see `build_loader`, which makes it.

    Files are read ahead in threads, and decisions drawn in this process; everything that touches
    a pixel is DALI's.

    Args:
        dataset: the files.
        config: sizes, filter, statistics and augmentation.
        sampler: which image comes when.
        batch_size: images in a batch.
        device: where batches end up: "cpu", or a CUDA device, on which JPEGs are decoded too.
    """

    def __init__(
        self,
        dataset: ImageSet,
        config: DataConfig,
        sampler: EpochSampler,
        *,
        batch_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(dataset, sampler, batch_size)
        self.pixels = f"dali on {device.type}"
        self._config = config
        self._device = device
        self._draw = TrainingDecisions(config, dataset.seed) if dataset.training else None
        self._layers = 0 if self._draw is None else self._draw.layers
        self._epoch: _Epoch | None = None
        self._pipeline: Any = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        return self._run(self._iteration)

    def close(self) -> None:
        """See `Loader`."""
        self._iteration += 1
        if self._epoch is not None:  # what its pipeline holds ready belongs to no later epoch
            self._epoch.close()
            self._epoch = self._pipeline = None

    def _run(self, own: int) -> Iterator[Batch]:
        epoch = self._epoch = _Epoch(self.dataset, iter(self._batches), self._config.workers)
        pipeline = self._ready_pipeline()
        while True:
            self._check_newest(own)
            try:
                (out,) = pipeline.run(_stream(self._device))
            except StopIteration:
                break
            targets, decisions, errors, keys, passed = epoch.fed.popleft()
            self._count(own, passed)
            # no copy: the pipeline takes the memory back when the tensor is gone
            images = torch.utils.dlpack.from_dlpack(out.as_tensor())
            if self._config.channels_last:
                images = images.permute(0, 3, 1, 2)
            _erase(images, decisions)
            self.bad_images.update((error.path, error.cause) for error in errors)
            bad = [error.path for error in errors]
            yield Batch(images, torch.tensor(targets, dtype=torch.int64), bad, as_tensor(keys))
        epoch.close()
        self._epoch = None
        self._count(own, epoch.passed)
        self.bad_images.update((error.path, error.cause) for error in epoch.bad)
        if epoch.failed is not None:
            raise epoch.failed

    def _ready_pipeline(self) -> Any:
        """The pipeline of the epoch before where that came to its end, else a new one."""
        if self._pipeline is None:
            self._pipeline = build_pipeline(
                self._config,
                self._feed,
                batch_size=self._batches.batch_size,
                layers=self._layers,
                fill=(0, 0, 0) if self._draw is None else self._draw.fill,
                device=self._device,
            )
        else:
            self._pipeline.reset()
        return self._pipeline

    def _feed(self) -> tuple[list[Any], ...]:
        """The next batch's files and decisions; called ahead of the batch that is taken."""
        epoch = self._epoch
        if epoch is None:
            raise StopIteration
        for batch in epoch:
            files, keys, targets = [], [], []
            for key, (found, errors) in batch:
                epoch.bad += errors
                if found is not None:
                    files.append(found[0])
                    targets.append(found[1])
                    keys.append(key)
            if not files:
                epoch.passed += 1
                continue
            decisions = self._decide([size for _, size in files], keys)
            epoch.fed.append(_Fed(targets, decisions, epoch.bad[:], keys, epoch.passed))
            epoch.bad.clear()
            epoch.passed = 0
            contents = [content for content, _ in files]
            return as_arrays(contents, decisions, self._layers, self._config.img_size)
        raise StopIteration

    def _decide(self, sizes: list[tuple[int, int]], keys: list[Key]) -> list[Decisions]:
        config = self._config
        if self._draw is None:
            return [evaluation_decisions(s, config.img_size, config.crop_pct) for s in sizes]
        with kept_generators():
            return [self._draw.draw(s, key) for s, key in zip(sizes, keys, strict=True)]


class _Fed(NamedTuple):
    """Of a batch that the pipeline holds; `passed` counts those before it that had no image."""

    targets: list[int]
    decisions: list[Decisions]
    errors: list[BadImageError]
    keys: list[Key]
    passed: int


class _Epoch:
    """The files of an epoch, read ahead in threads, batch by batch; and what was fed of them.

    Attributes:
        fed: of the batches that the pipeline holds.
        bad: bad files met since the last of these.
        passed: batches without a readable image since then.
        failed: why the epoch ended early, to be raised after the batches before.
    """

    def __init__(self, dataset: ImageSet, keys: Iterator[Any], threads: int) -> None:
        self.fed: deque[_Fed] = deque()
        self.bad: list[BadImageError] = []
        self.passed = 0
        self.failed: BadImageError | None = None
        self._dataset = dataset
        self._keys = keys
        self._threads = ThreadPoolExecutor(max(threads, 1), "featkd-read")
        self._reading: deque[list[tuple[Key, Future[_Read]]]] = deque()

    def __iter__(self) -> Iterator[list[tuple[Key, _Read]]]:
        return self

    def __next__(self) -> list[tuple[Key, _Read]]:
        while len(self._reading) <= _READ_AHEAD and (batch := next(self._keys, None)) is not None:
            started = [self._threads.submit(self._dataset.readable, key, _load) for key in batch]
            self._reading.append(list(zip(batch, started, strict=True)))
        if not self._reading or self.failed is not None:
            raise StopIteration
        try:
            return [(key, found.result()) for key, found in self._reading.popleft()]
        except BadImageError as error:
            self.failed = error
            raise StopIteration from error

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


def _stream(device: torch.device) -> Any:
    """What the pipeline's output is ordered by: torch's stream, so that nothing waits for it."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _erase(images: Tensor, decisions: list[Decisions]) -> None:
    """Write what random erasing drew; to a GPU in one copy."""
    writes = [(n, *write) for n, decision in enumerate(decisions) for write in decision.erased]
    if not writes:
        return
    if images.device.type == "cpu":
        array = images.numpy()  # torch would wake a second thread for a box
        for number, where, pixels in writes:
            array[number][where] = pixels.numpy()
        return
    flat = torch.cat([pixels.flatten() for _, _, pixels in writes]).pin_memory()
    sizes = [pixels.numel() for _, _, pixels in writes]
    parts = torch.split(flat.to(images.device, non_blocking=True), sizes)
    for (number, where, pixels), part in zip(writes, parts, strict=True):
        images[number][where] = part.view(pixels.shape)


def _load(content: bytes, name: str) -> _File:
    """A file's content as DALI decodes it as Pillow would, and its (width, height).

    Raises:
        BadImageError: it is no image, or is cut off.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            size = image.size
    except Exception:
        decode_image(content, name)  # says what is wrong with it
        raise
    if plain and _END_OF_JPEG in content[-_TAIL:]:
        return np.frombuffer(content, dtype=np.uint8), size
    # CMYK, 16 bits, palettes: the rules are decode_image's
    rgb = decode_image(content, name)
    return as_png(rgb), rgb.size


def as_png(image: Image.Image) -> np.ndarray[Any, Any]:
    """The content of a file that every decoder reads to the image's own pixels."""
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=0, icc_profile=None)
    return np.frombuffer(written.getvalue(), dtype=np.uint8)
