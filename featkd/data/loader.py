"""What a loader is, and the one on torch, timm and Pillow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.dataloader import default_collate

from featkd.data.images import BadImageError
from featkd.data.imageset import DATA_ERRORS, DataError, ImageSet, Sample
from featkd.data.sampler import EpochSampler, Key
from featkd.data.workers import end_workers, worker_options


class Batch(NamedTuple):
    """images (B, 3, H, W) float32, targets (B,) int64, and the unreadable files met for them.

    `keys`, (B, 3) int64 on the CPU, are the images' `Key`s. An unreadable one's stays with the
    image that takes its place, whose number is in `shown`, (B,) int64 on the CPU. From a `Mixer`
    targets are (B, K) float32.

    `bad` also holds the files of evaluation batches passed over since the batch before; those of
    empty batches at the very end are in `Loader.bad_images` alone.
    """

    images: Tensor
    targets: Tensor
    bad: list[str]
    keys: Tensor
    shown: Tensor


class Loader(Protocol):
    """What every loader offers, whatever decodes the images.

    Attributes:
        classes: class names; targets index them.
        num_samples: images in the split, over all ranks.
        bad_images: every unreadable image met so far: path -> what is wrong with it.
        dataset: the files.
        sampler: which image comes when.
        pixels: what decodes and transforms: loaders of which this differs differ by rounding.
        note: why it is not the loader that was wanted, if so.
    """

    classes: list[str]
    num_samples: int
    bad_images: dict[str, str]
    dataset: ImageSet
    sampler: EpochSampler
    pixels: str
    note: str

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch chosen by `set_epoch`; starting anew ends an older iterator."""
        ...

    def __len__(self) -> int:
        """Batches of the whole epoch on this rank, wherever it starts."""
        ...

    def upcoming(self) -> Iterator[Tensor]:
        """The `Batch.keys` that the next `iter` will give, if no file is unreadable."""
        ...

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose what the next `iter` gives: `epoch` from its batch number `start_batch` on."""
        ...

    def state_dict(self) -> dict[str, int]:
        """Where the loader is: the epoch, its next batch, and what the order depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Choose as the next `iter` what follows on the batches that `state` had given."""
        ...

    def close(self) -> None:
        """End the loader's processes; a later `iter` would start new ones."""
        ...


class SampledLoader:
    """What loaders over an `EpochSampler` have in common.

    Args:
        dataset: the files.
        sampler: which image comes when.
        batch_size: images in a batch; a training epoch's last, partial batch is dropped.
    """

    def __init__(self, dataset: ImageSet, sampler: EpochSampler, batch_size: int) -> None:
        self.classes = dataset.classes
        self.num_samples = len(dataset)
        self.bad_images: dict[str, str] = {}
        self.note = ""
        self.dataset = dataset
        self.sampler = sampler
        # torch types the keys as int, yet hands on whatever the sampler gives.
        self._batches = BatchSampler(
            sampler,  # type: ignore[arg-type]
            batch_size,
            drop_last=sampler.drop_last,
        )
        self._iteration = 0
        self._start = 0  # batch that the next iteration starts at
        self._next = 0  # batch that comes next, of iteration number:
        self._followed = 1

    def __len__(self) -> int:
        return len(self._batches)

    def upcoming(self) -> Iterator[Tensor]:
        """See `Loader`."""
        return (as_tensor(cast("list[Key]", keys)) for keys in self._batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """See `Loader`.

        Raises:
            ValueError: the epoch is negative or `start_batch` lies outside 0..len(self).
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch: expected 0..{len(self)}, got {start_batch}")
        # The last evaluation batch can be partial: its end is the end of the keys.
        start = min(start_batch * self._batches.batch_size, len(self.sampler))
        self.sampler.set_epoch(epoch, start)
        self._start = self._next = start_batch
        self._followed = self._iteration + 1

    def state_dict(self) -> dict[str, int]:
        """Where the loader is, as whole numbers; in training the same on all ranks.

        "batch" is the next one: those that workers have loaded ahead don't count as given.
        """
        sampler = self.sampler
        return {
            "epoch": sampler.epoch,
            "batch": min(self._next, len(self)),
            "batch_size": self._batches.batch_size,
            "world_size": sampler.world_size,
            "seed": sampler.seed,
            "repeats": sampler.repeats,
            "ordered_as": sampler.ordered_as(sampler.epoch),
            "num_images": sampler.num_images,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where a loader of the same images was, maybe with other batches or ranks.

        k batches of b images on each of w ranks are the first k b w positions of the epoch,
        whatever b and w (see `EpochSampler`): what follows on them is the same where they make
        up whole batches here. At the start of an epoch anything may have changed.

        Args:
            state: of `state_dict`, of any rank.

        Raises:
            ValueError: within an epoch, its order has changed, or the position is none of this
                loader's.
        """
        own = self.state_dict()
        if state["batch"] == 0:
            self.set_epoch(state["epoch"])
            return
        own["ordered_as"] = self.sampler.ordered_as(state["epoch"])
        state = {"ordered_as": state["epoch"], **state}  # of checkpoints that do not have it yet
        for name in ("num_images", "seed", "repeats", "ordered_as"):
            if state[name] != own[name]:
                raise ValueError(
                    f"{name}: {state[name]} when the loader stopped within epoch {state['epoch']}, "
                    f"now {own[name]}, which changes the order of its images; expected "
                    f"{state[name]} to the epoch's end"
                )
        given = state["batch"] * state["batch_size"] * state["world_size"]
        together = own["batch_size"] * own["world_size"]
        batch, rest = divmod(given, together)
        if rest or batch > len(self):
            raise ValueError(
                f"batch_size: the loader stopped after {given} images of epoch {state['epoch']} "
                f"(batch_size {state['batch_size']} on {state['world_size']} ranks), which is no "
                f"whole number of batches of {own['batch_size']} on {own['world_size']} ranks; "
                f"expected batch_size x ranks to divide {given}"
            )
        self.set_epoch(state["epoch"], batch)

    def _check_newest(self, own: int) -> None:
        """The `own`-th iteration is about to be asked for a batch.

        Raises:
            RuntimeError: another iteration has begun since.
        """
        if own != self._iteration:
            raise RuntimeError("a newer iteration of this loader has begun; this one is over")

    def _count(self, own: int, batches: int) -> None:
        """The `own`-th iteration has come further by so many batches."""
        if own > self._followed:  # begun anew without set_epoch
            self._followed, self._next = own, self._start
        if own == self._followed:  # else set_epoch has chosen what the next one gives
            self._next += batches


class TorchLoader(SampledLoader):
    """`Loader` on torch's DataLoader; see `build_loader`, which makes it."""

    pixels = "timm"

    def __init__(
        self,
        dataset: ImageSet,
        sampler: EpochSampler,
        *,
        batch_size: int,
        workers: int,
        pin_memory: bool,
        channels_last: bool,
        note: str = "",
    ) -> None:
        super().__init__(dataset, sampler, batch_size)
        self.note = note
        self._workers = workers
        self._make = partial(
            DataLoader,
            dataset,
            batch_sampler=self._batches,
            collate_fn=partial(_collate, channels_last=channels_last),
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            # DataLoader draws the workers' base seed. Without a generator of its own it would
            # take it from the training's.
            generator=torch.Generator(),
        )
        self._loader: DataLoader[Sample] | None = None

    def __iter__(self) -> Iterator[Batch]:
        self._iteration += 1
        if self._loader is None:  # only now is it known what the workers will run beside
            self._loader = self._make(**worker_options(self._workers))
        return self._checked(iter(self._loader), self._iteration)

    def _checked(
        self,
        batches: Iterator[tuple[Tensor, Tensor, list[BadImageError], Tensor, Tensor] | DataError],
        own: int,
    ) -> Iterator[Batch]:
        """Raise what came as data, record bad files, pass over empty batches."""
        bad: list[str] = []
        while True:
            # Persistent workers have one queue: two iterators would take each other's batches.
            self._check_newest(own)
            self._count(own, 1)
            try:
                batch = next(batches, None)
            except (ConnectionError, EOFError, FileNotFoundError) as lost:
                # Seen where the worker that made a batch dies before its memory is handed over.
                raise RuntimeError("a DataLoader worker died.") from lost
            if batch is None:
                return
            if isinstance(batch, DATA_ERRORS):
                raise batch
            images, targets, errors, keys, shown = batch
            for error in errors:
                self.bad_images[error.path] = error.cause
                bad.append(error.path)
            if len(targets):
                yield Batch(images, targets, bad, keys, shown)
                bad = []

    def close(self) -> None:
        """See `Loader`."""
        self._iteration += 1
        if self._loader is not None:
            end_workers(self._loader)
            self._loader = None


def _collate(
    samples: list[Sample] | DataError, *, channels_last: bool
) -> tuple[Tensor, Tensor, list[BadImageError], Tensor, Tensor] | DataError:
    """Stack the images that are there; in a worker straight into shared memory."""
    if isinstance(samples, DATA_ERRORS):
        return samples
    there = [sample for sample in samples if sample.image is not None]
    targets = torch.tensor([sample.target for sample in there], dtype=torch.int64)
    shown = torch.tensor([sample.shown for sample in there], dtype=torch.int64)
    errors = [error for sample in samples for error in sample.bad]
    stacked = default_collate([x.image for x in there]) if there else torch.empty(0)
    if there and channels_last:
        stacked = stacked.contiguous(memory_format=torch.channels_last)
    return stacked, targets, errors, as_tensor([sample.key for sample in there]), shown


def as_tensor(keys: Sequence[Key]) -> Tensor:
    """(B, 3) int64: epochs, images and copies."""
    return torch.tensor(keys, dtype=torch.int64).reshape(-1, 3)
