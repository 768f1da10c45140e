"""The loader on NVIDIA DALI: decode, crop, resize, flip, RandAugment and normalise in its threads
or on a GPU.

Every random decision is the one that timm's transform would draw for the same key, by the same
calls in the same order, so that both loaders give the same windows, flips, operations and erased
boxes; the pixels differ by the decoders' and filters' rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featkd.data.augment import kept_generators
from featkd.data.augment_params import Decisions, TrainingDecisions, evaluation_decisions
from featkd.data.config import DataConfig
from featkd.data.dali.augment import supported
from featkd.data.dali.files import File, load, load_decodable
from featkd.data.dali.pipeline import as_arrays, build_pipeline
from featkd.data.images import BadImageError
from featkd.data.imageset import DATA_ERRORS, DataError, ImageSet
from featkd.data.loader import Batch, SampledLoader, as_tensor
from featkd.data.sampler import EpochSampler, Key

_READ_AHEAD = 2  # batches

# what ImageSet.readable gives
_Read = tuple[tuple[File, int, int] | None, list[BadImageError]]


def why_not(config: DataConfig, training: bool) -> str:
    """Why this loader can't serve a configuration, or nothing."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "nvidia-dali is not installed"
    return (_cannot(config) if training else "") or _not_importable()


def _cannot(config: DataConfig) -> str:
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


def _not_importable() -> str:
    """Asked last: beside an imported DALI, workers start more slowly."""
    try:
        import_module("nvidia.dali")
    except Exception as error:  # of a broken installation, of any type
        return f"nvidia-dali can't be imported: {type(error).__name__}: {error}"
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
        self._check_newest(own)  # first: the pipeline is fed from `_epoch`, the newest one's
        epoch = self._epoch = _Epoch(self.dataset, iter(self._batches), self._config.workers)
        self._prepare_pipeline()
        while True:
            self._check_newest(own)
            self._count(own, 1)
            try:
                out = self._output(epoch)
            except StopIteration:
                break
            fed = epoch.fed.popleft()
            self._count(own, len(fed.taken) - 1)
            # no copy: the pipeline takes the memory back when the tensor is gone
            images = torch.utils.dlpack.from_dlpack(out.as_tensor())
            if self._config.channels_last:
                images = images.permute(0, 3, 1, 2)
            _erase(images, fed.decisions)
            self.bad_images.update((error.path, error.cause) for error in fed.errors)
            bad = [error.path for error in fed.errors]
            targets = torch.tensor(fed.targets, dtype=torch.int64)
            shown = torch.tensor(fed.shown, dtype=torch.int64)
            yield Batch(images, targets, bad, as_tensor(fed.keys), shown)
        epoch.close()
        self._epoch = None
        self._count(own, len(epoch.taken))
        self.bad_images.update((error.path, error.cause) for error in epoch.bad)
        if epoch.failed is not None:
            raise epoch.failed

    def _output(self, epoch: _Epoch) -> Any:
        """The pipeline's next output.

        A file that can't be decoded ends the pipeline, without a name. Then a new one is fed what
        that one held, each file looked at first.

        Raises:
            StopIteration: there is none.
            RuntimeError: the pipeline failed on files that can be decoded.
        """
        while True:
            try:
                (out,) = self._pipeline.run(_stream(self._device))
                return out
            except RuntimeError as error:
                self._pipeline = None
                if not epoch.fed:
                    raise
                if all(fed.decodable for fed in epoch.fed):
                    keys = epoch.fed[0].keys
                    raise RuntimeError(
                        f"DALI failed on a batch of {len(keys)} images, all of which Pillow "
                        f"decodes, the first for {self.dataset.name(keys[0].image)}; "
                        "data.backend: timm does without DALI"
                    ) from error
            epoch.read_again()
            self._prepare_pipeline()

    def _prepare_pipeline(self) -> None:
        """Begin with the last epoch's pipeline where that came to its end, else with a new one."""
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

    def _feed(self) -> tuple[list[Any], ...]:
        """The next batch's files and decisions; called ahead of the batch that is taken."""
        epoch = self._epoch
        if epoch is None:
            raise StopIteration
        for batch, decodable in epoch:
            files, keys, targets, shown = [], [], [], []
            for key, (found, errors) in batch:
                epoch.bad += errors
                if found is not None:
                    files.append(found[0])
                    targets.append(found[1])
                    shown.append(found[2])
                    keys.append(key)
            epoch.taken.append([key for key, _ in batch])
            if not files:
                continue
            decisions = self._decide([size for _, size in files], keys)
            bad, taken = epoch.bad, epoch.taken
            epoch.fed.append(_Fed(targets, decisions, bad, keys, shown, taken, decodable))
            epoch.bad, epoch.taken = [], []
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
    """Of a batch that the pipeline holds.

    `taken` has the keys asked for: those of the batches before it that had no image, and its own.
    `decodable`: Pillow has decoded all its files.
    """

    targets: list[int]
    decisions: list[Decisions]
    errors: list[BadImageError]
    keys: list[Key]
    shown: list[int]
    taken: list[list[Key]]
    decodable: bool


class _Reading(NamedTuple):
    """A batch on its way from the disk."""

    files: list[tuple[Key, Future[_Read]]]
    decodable: bool


class _Epoch:
    """The files of an epoch, read ahead in threads, batch by batch; and what was fed of them.

    Attributes:
        fed: of the batches that the pipeline holds.
        taken: keys of batches since the last of these, which had no readable image.
        bad: bad files met in them.
        failed: why the epoch ended early, to be raised after the batches before.
    """

    def __init__(self, dataset: ImageSet, keys: Iterator[Any], threads: int) -> None:
        self.fed: deque[_Fed] = deque()
        self.taken: list[list[Key]] = []
        self.bad: list[BadImageError] = []
        self.failed: DataError | None = None
        self._dataset = dataset
        self._keys = keys
        self._threads = ThreadPoolExecutor(max(threads, 1), "featkd-read")
        self._reading: deque[_Reading] = deque()

    def __iter__(self) -> Iterator[tuple[list[tuple[Key, _Read]], bool]]:
        return self

    def __next__(self) -> tuple[list[tuple[Key, _Read]], bool]:
        """A batch's keys and what their files hold, and whether all of it can be decoded."""
        while self.failed is None and len(self._reading) <= _READ_AHEAD:
            if (batch := next(self._keys, None)) is None:
                break
            self._reading.append(self._begin(batch))
        if not self._reading:
            raise StopIteration
        files, decodable = self._reading.popleft()
        try:
            return [(key, found.result()) for key, found in files], decodable
        except DATA_ERRORS as error:
            self.failed = error
            self._reading.clear()
            raise StopIteration from error

    def read_again(self) -> None:
        """Put back what the pipeline held, to be looked at file by file before it gets it again."""
        held = [keys for fed in self.fed for keys in fed.taken] + self.taken
        again = [self._begin(keys, decodable=True) for keys in held]
        self._reading.extendleft(reversed(again))
        self.fed.clear()
        self.taken, self.bad = [], []

    def _begin(self, batch: list[Key], *, decodable: bool = False) -> _Reading:
        read = partial(self._dataset.readable, decode=load_decodable if decodable else load)
        return _Reading([(key, self._threads.submit(read, key)) for key in batch], decodable)

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
