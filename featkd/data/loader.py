"""The base class of the loaders, and the one with torch's DataLoader, timm and Pillow."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.dataloader import default_collate

from featkd.data.augment import AUGMENTATION_VERSION
from featkd.data.device import DeviceStage, SentBatch
from featkd.data.images import BadImageError
from featkd.data.imageset import DATA_ERRORS, DataError, ImageSet, Sample
from featkd.data.sampler import EpochSampler, SampleKey
from featkd.data.workers import shut_down_workers, worker_options

_BATCHES_AHEAD = 1  # on the device, besides the one that is returned
NO_IMAGES = torch.empty(0, 0, 0, 3, dtype=torch.uint8)


class Batch(NamedTuple):
    """A batch of images with their labels and keys.

    Attributes:
        images: (B, 3, H, W) float32 on the loader's device, normalized, in training also erased;
            the batch's own memory.
        targets: (B,) int64 class indices on the loader's device; (B, K) float32 labels after a
            `Mixer`.
        bad: paths of unreadable files met since the previous batch, including those of evaluation
            batches that were skipped because they had no readable image. Files met after the last
            batch are listed only in `Loader.bad_images`.
        keys: (B, 3) int64 on the CPU, the `SampleKey` of each image.
        source_index: (B,) int64 on the CPU, the index of the image that was loaded. It differs
            from the key's image if that one was unreadable and another took its place.
    """

    images: Tensor
    targets: Tensor
    bad: list[str]
    keys: Tensor
    source_index: Tensor


class RawBatch(NamedTuple):
    """A batch as a loader assembles it, before the `DeviceStage`.

    Attributes:
        images: (B, H, W, 3) uint8, in host memory or on the device; B = 0 if no image was readable.
        targets, keys, source_index: as in `Batch`, on the CPU.
        errors: unreadable files met since the previous batch.
        covered: 1, plus the number of batches skipped before it, as no image was readable.
    """

    images: Tensor
    targets: Tensor
    keys: Tensor
    source_index: Tensor
    errors: list[BadImageError]
    covered: int


class Loader:
    """Batches of the samples of an `EpochSampler`, made by `build_loader`; tracks the position.

    One batch is copied to the device ahead of the one that is returned.

    Args:
        dataset: the images.
        sampler: the order of the samples.
        batch_size: images per batch; the last, partial batch of a training epoch is dropped.
        device: device of the batches.
        note: reason why another loader than the preferred one is used; "" if there is none.

    Attributes:
        classes: class names; targets index them.
        num_samples: number of images in the split, over all ranks.
        bad_images: all unreadable images met so far, path -> reason.
        dataset: the images.
        sampler: the order of the samples.
        decoder: name of the library that decodes and transforms, with its device. Loaders with
            different decoders return pixels that differ by rounding.
        note: see the argument.
    """

    decoder: str

    def __init__(
        self,
        dataset: ImageSet,
        sampler: EpochSampler,
        *,
        batch_size: int,
        device: torch.device,
        note: str = "",
    ) -> None:
        self.classes = dataset.classes
        self.num_samples = len(dataset)
        self.bad_images: dict[str, str] = {}
        self.note = note
        self.dataset = dataset
        self.sampler = sampler
        self._config = dataset.config
        self._device = device
        # torch annotates the keys as int but passes on any type.
        self._batches = BatchSampler(cast(Any, sampler), batch_size, sampler.drop_last)
        self._stage = DeviceStage(
            self._config, training=dataset.training, seed=dataset.seed, device=device
        )
        self._iteration = 0  # number of the newest iteration
        self._start_batch = 0  # first batch of the next iteration
        self._next_batch = 0  # next batch of the iteration whose position is tracked
        self._tracked_iteration = 1

    def __iter__(self) -> Iterator[Batch]:
        """Iterates over the epoch chosen by `set_epoch`; invalidates earlier iterators.

        On a GPU, take all batches of an iteration on one CUDA stream.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Ends the loader's processes; the next iteration starts new ones."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Returns the number of batches of a whole epoch on this rank."""
        return len(self._batches)

    def upcoming(self) -> Iterator[Tensor]:
        """Iterates over the `Batch.keys` of the next iteration, assuming all files are readable."""
        return (as_tensor(cast("list[SampleKey]", keys)) for keys in self._batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Makes the next iteration yield `epoch`, beginning with batch `start_batch`.

        Raises:
            ValueError: `epoch` is negative or `start_batch` is outside 0..len(self).
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch: expected 0..{len(self)}, got {start_batch}")
        # The last evaluation batch can be partial, so it ends at the last key.
        start = min(start_batch * self._batches.batch_size, len(self.sampler))
        self.sampler.set_epoch(epoch, start)
        self._start_batch = self._next_batch = start_batch
        self._tracked_iteration = self._iteration + 1

    def state_dict(self) -> dict[str, int]:
        """Returns the position: the epoch, its next batch, what its order depends on, and the
        version of the random draws.

        In training it is the same on all ranks. Batches that workers have prefetched do not count.
        """
        sampler = self.sampler
        return {
            "epoch": sampler.epoch,
            "batch": min(self._next_batch, len(self)),
            "batch_size": self._batches.batch_size,
            "world_size": sampler.world_size,
            "seed": sampler.seed,
            "repeats": sampler.repeats,
            "shuffle_epoch": sampler.shuffle_epoch(sampler.epoch),
            "num_images": sampler.num_images,
            "augmentation_version": AUGMENTATION_VERSION,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues at the position of a loader of the same images.

        The batch size and the number of ranks may differ. k batches of b images on w ranks are
        the first k b w positions of the epoch (see `EpochSampler`). This loader continues after
        them if they form whole batches here. At the start of an epoch everything may differ.

        Args:
            state: result of `state_dict` on any rank.

        Raises:
            ValueError: the position is within an epoch, and either the epoch's order has changed
                or the position is not between two batches of this loader.
        """
        own = self.state_dict()
        if state["batch"] == 0:
            self.set_epoch(state["epoch"])
            return
        own["shuffle_epoch"] = self.sampler.shuffle_epoch(state["epoch"])
        # Older checkpoints call it "ordered_as"; the oldest ones lack it.
        shuffle_epoch = state.get("ordered_as", state["epoch"])
        state = {"shuffle_epoch": shuffle_epoch, **state}
        for name in ("num_images", "seed", "repeats", "shuffle_epoch"):
            if state[name] != own[name]:
                raise ValueError(
                    f"{name}: {state[name]} when the loader stopped within epoch {state['epoch']}, "
                    f"now {own[name]}, which changes the order of the images; expected "
                    f"{state[name]} until the epoch ends"
                )
        done = state["batch"] * state["batch_size"] * state["world_size"]
        batch, rest = divmod(done, own["batch_size"] * own["world_size"])
        if rest or batch > len(self):
            raise ValueError(
                f"batch_size: the loader stopped after {done} images of epoch {state['epoch']} "
                f"(batch_size {state['batch_size']} on {state['world_size']} ranks), which is not "
                f"a whole number of batches of {own['batch_size']} on {own['world_size']} ranks; "
                f"expected batch_size x ranks to divide {done}"
            )
        self.set_epoch(state["epoch"], batch)

    def _ready(self, raw_batches: Iterator[RawBatch], iteration: int) -> Iterator[Batch]:
        """Takes batches through the `DeviceStage`, one ahead; records position and bad files.

        An error is raised in its turn, after the batches before it.
        """
        pending: deque[tuple[RawBatch, SentBatch | None] | Exception | None] = deque()
        bad: list[str] = []
        more = True
        while True:
            if iteration != self._iteration:
                raise RuntimeError("a newer iteration of this loader has begun; this one is over")
            self._advance(iteration, 0)
            while more and len(pending) <= _BATCHES_AHEAD:
                pending.append(self._send_next(raw_batches))
                more = isinstance(pending[-1], tuple)
            item = pending.popleft()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            raw, sent = item
            self._advance(iteration, raw.covered)
            self.bad_images.update((error.path, error.cause) for error in raw.errors)
            bad += [error.path for error in raw.errors]
            if sent is not None:
                images, targets = self._stage.finish(sent)
                yield Batch(images, targets, bad, raw.keys, raw.source_index)
                bad = []

    def _send_next(
        self, raw_batches: Iterator[RawBatch]
    ) -> tuple[RawBatch, SentBatch | None] | Exception | None:
        """Sends the next batch, if it has images, to the device; returns an error, None at the end.

        The returned `RawBatch` does not hold the images.
        """
        try:
            raw = next(raw_batches, None)
        except Exception as error:
            return error
        if raw is None:
            return None
        has_images = len(raw.targets) > 0
        sent = self._stage.send(raw.images, raw.targets, raw.keys) if has_images else None
        return raw._replace(images=NO_IMAGES), sent

    def _advance(self, iteration: int, batches: int) -> None:
        """Moves the position by `batches`, if it is that of `iteration`."""
        if iteration > self._tracked_iteration:  # begun without set_epoch
            self._tracked_iteration, self._next_batch = iteration, self._start_batch
        if iteration == self._tracked_iteration:  # otherwise set_epoch has set the next position
            self._next_batch += batches


class TorchLoader(Loader):
    """`Loader` with torch's DataLoader and timm's transforms."""

    decoder = "timm"
    _loader: DataLoader[Sample] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """See `Loader`."""
        self._iteration += 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # see self.note
            if self._loader is None:  # the options depend on whether DALI has been imported by now
                self._loader = DataLoader(
                    self.dataset,
                    batch_sampler=self._batches,
                    collate_fn=_collate,
                    pin_memory=self._device.type == "cuda",
                    persistent_workers=self._config.workers > 0,
                    # DataLoader draws a base seed for its workers. Without this it would advance
                    # the global generator, which training uses.
                    generator=torch.Generator(),
                    **worker_options(self._config.workers),
                )
            batches = iter(self._loader)
        return self._ready(_raised(batches), self._iteration)

    def close(self) -> None:
        """See `Loader`."""
        self._iteration += 1
        if self._loader is not None:
            shut_down_workers(self._loader)
            self._loader = None


def _raised(batches: Iterator[RawBatch | DataError]) -> Iterator[RawBatch]:
    """Raises the errors that workers returned, or that they died of."""
    try:
        for batch in batches:
            if isinstance(batch, DATA_ERRORS):
                raise batch
            yield batch
    except (ConnectionError, EOFError, FileNotFoundError) as lost:
        # A worker died before the main process had opened the shared memory of its batch.
        raise RuntimeError("a DataLoader worker died.") from lost


def _collate(samples: list[Sample] | DataError) -> RawBatch | DataError:
    """Stacks the samples that have an image; in a worker directly into shared memory."""
    if isinstance(samples, DATA_ERRORS):
        return samples
    present = [sample for sample in samples if sample.image is not None]
    # as Pillow's memory has them: stacking in another order takes ten times as long
    images = [sample.image.permute(1, 2, 0) for sample in present]
    bad = [error for sample in samples for error in sample.bad]
    return raw_batch(default_collate(images) if images else NO_IMAGES, present, bad, covered=1)


def raw_batch(
    images: Tensor, samples: Sequence[Sample], errors: list[BadImageError], covered: int
) -> RawBatch:
    """Assembles a batch of the samples that have an image."""
    return RawBatch(
        images,
        torch.tensor([sample.target for sample in samples], dtype=torch.int64),
        as_tensor([sample.key for sample in samples]),
        torch.tensor([sample.source_index for sample in samples], dtype=torch.int64),
        errors,
        covered,
    )


def as_tensor(keys: Sequence[SampleKey]) -> Tensor:
    """Returns the keys as a (B, 3) int64 tensor of epoch, image and copy."""
    return torch.tensor(keys, dtype=torch.int64).reshape(-1, 3)
