"""The factory that gives batches, and the loader of torch, timm and Pillow behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.dataloader import default_collate

from featkd.data.config import DataConfig
from featkd.data.imagefolder import BadImageError, ImageFolder, Sample
from featkd.data.sampler import EpochSampler


class Batch(NamedTuple):
    """images (B, 3, H, W) float32, targets (B,) int64, and the unreadable files met for them.

    `bad` also holds the files of evaluation batches passed over since the batch before; those of
    empty batches at the very end are in `Loader.bad_images` alone.
    """

    images: Tensor
    targets: Tensor
    bad: list[str]


class Loader(Protocol):
    """What every loader offers, whatever decodes the images.

    Attributes:
        classes: class names; targets index them.
        num_samples: images in the split, over all ranks.
        bad_images: every unreadable image met so far: path -> what is wrong with it.
    """

    classes: list[str]
    num_samples: int
    bad_images: dict[str, str]

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch chosen by `set_epoch`; starting anew ends an older iterator."""
        ...

    def __len__(self) -> int:
        """Batches of the whole epoch on this rank, wherever it starts."""
        ...

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next `iter` gives: `epoch` from its batch number `start_batch` on."""
        ...

    def close(self) -> None:
        """End the loader's processes; a later `iter` would start new ones."""
        ...


def build_loader(
    config: DataConfig,
    *,
    split: Literal["train", "val"],
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """The loader of a split.

    Training: shuffled, augmented, the last partial batch dropped; see `EpochSampler` for repeated
    augmentation and ranks. Evaluation: in order, each image on exactly one rank, so that the
    number of batches can differ between ranks, and can be 0 on some.

    Args:
        config: the image set and its preprocessing.
        split: "train" or "val".
        batch_size: images in a batch on this rank.
        seed: seed of the run, the same on all ranks; with (epoch, image, copy) it fixes every
            pixel, whatever the number of workers or ranks.
        rank: this process.
        world_size: number of processes.
        pin_memory: copy batches to page-locked memory (for transfers to a GPU).

    Returns:
        A Loader. Call `set_epoch` before each epoch and `close` at the end.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: an argument is out of its range, or a training epoch is under one batch.

    Notes:
        Each worker holds two batches ahead in shared memory (batch 512 at 224 pixels: 308 MB
        each).
    """
    if split not in ("train", "val"):
        raise ValueError(f"split: expected train or val, got {split!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected >= 1, got {batch_size}")
    dataset = ImageFolder(config, split, seed)
    training = split == "train"
    sampler = EpochSampler(
        len(dataset),
        training=training,
        repeats=config.augment.repeats if training else 1,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    if training and len(sampler) < batch_size:
        raise ValueError(
            f"batch_size: {batch_size} is more than the {len(sampler)} samples of an epoch on "
            f"this rank ({len(dataset)} images in {dataset.folder}, world_size {world_size}), "
            "so that an epoch would have no batch"
        )
    return TorchLoader(
        dataset, sampler, batch_size=batch_size, workers=config.workers, pin_memory=pin_memory
    )


class TorchLoader:
    """`Loader` on torch's DataLoader; see `build_loader`, which makes it."""

    def __init__(
        self,
        dataset: ImageFolder,
        sampler: EpochSampler,
        *,
        batch_size: int,
        workers: int,
        pin_memory: bool,
    ) -> None:
        self.classes = dataset.classes
        self.num_samples = len(dataset)
        self.bad_images: dict[str, str] = {}
        self._sampler = sampler
        # torch types the keys as int, yet hands on whatever the sampler gives.
        self._batches = BatchSampler(
            sampler,  # type: ignore[arg-type]
            batch_size,
            drop_last=sampler.training,
        )
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            persistent_workers=workers > 0,
            # DataLoader draws the workers' base seed. Without a generator of its own it would
            # take it from the training's.
            generator=torch.Generator(),
        )
        self._iteration = 0

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """See `Loader`.

        Raises:
            ValueError: the epoch is negative or `start_batch` lies outside 0..len(self).
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch: expected 0..{len(self)}, got {start_batch}")
        # The last evaluation batch can be partial: its end is the end of the keys.
        start = min(start_batch * self._batches.batch_size, len(self._sampler))
        self._sampler.set_epoch(epoch, start)

    def __iter__(self) -> Iterator[Batch]:
        self._iteration += 1
        return self._checked(iter(self._loader), self._iteration)

    def _checked(
        self,
        batches: Iterator[tuple[Tensor, Tensor, list[BadImageError]] | BadImageError],
        own: int,
    ) -> Iterator[Batch]:
        """Raise what came as data, record bad files, pass over empty batches."""
        bad: list[str] = []
        while True:
            # Persistent workers have one queue: two iterators would take each other's batches.
            if own != self._iteration:
                raise RuntimeError("a newer iteration of this loader has begun; this one is over")
            try:
                batch = next(batches, None)
            except (ConnectionError, EOFError, FileNotFoundError) as lost:
                # Seen where the worker that made a batch dies before its memory is handed over.
                raise RuntimeError("a loader worker died, killed from outside?") from lost
            if batch is None:
                return
            if isinstance(batch, BadImageError):
                raise batch
            images, targets, errors = batch
            for error in errors:
                self.bad_images[error.path] = error.cause
                bad.append(error.path)
            if len(targets):
                yield Batch(images, targets, bad)
                bad = []

    def close(self) -> None:
        """See `Loader`."""
        self._iteration += 1
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            # DataLoader has no public call for it, and leaves it to the garbage collector, which
            # comes late where an exception's traceback still holds the iterator.
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _collate(
    samples: list[Sample] | BadImageError,
) -> tuple[Tensor, Tensor, list[BadImageError]] | BadImageError:
    """Stack the images that are there; in a worker straight into shared memory."""
    if isinstance(samples, BadImageError):
        return samples
    images = [sample.image for sample in samples if sample.image is not None]
    targets = [sample.target for sample in samples if sample.image is not None]
    errors = [error for sample in samples for error in sample.bad]
    stacked = default_collate(images) if images else torch.empty(0)
    return stacked, torch.tensor(targets, dtype=torch.int64), errors


def start_worker(worker: int) -> None:
    """A process group of its own, and one thread, as workers are many.

    Ctrl-C, and SIGTERM to the whole group, then reach the main process alone, which needs its
    workers until it has stopped; it ends them itself, and they end when it is gone.
    """
    os.setpgid(0, 0)
    torch.set_num_threads(1)
