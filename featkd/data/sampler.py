"""Order of the samples: shuffling, repeated augmentation, sharding over ranks, resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from featkd.runtime.seeding import derive_seed

# DeiT cuts an epoch of repeated augmentation to a multiple of this many images.
_ROUND = 256


class SampleKey(NamedTuple):
    """Identifies one sample of a run: the epoch, the image's index in the split, and the copy.

    The key and the run's seed together determine every pixel of the sample.
    """

    epoch: int
    image: int
    copy: int


@dataclass(eq=False)
class EpochSampler(Sampler[SampleKey]):
    """Yields the keys of one rank in one epoch, in order.

    All ranks share one sequence of positions. Rank r of w takes positions r, r + w, r + 2w, ...

    - Training: the images are shuffled by (seed, epoch).

      - With R = 1 each rank takes ceil(n / w) positions.
      - With repeats R > 1 each image occurs R times in a row, so its copies fall on different
        ranks. Each rank takes floor(n // 256 * 256 / w) positions, which is DeiT's repeated
        augmentation: the epoch keeps its length and covers about n / R images. A set of fewer
        than 256 images takes ceil(n / w) positions instead.
      - Positions past the end wrap around, and `copy` keeps counting. All keys of an epoch are
        distinct, across ranks too.
    - Evaluation: file order, each image on exactly one rank, no padding. The ranks can differ by
      one image.

    Each key carries the epoch, because persistent workers hold a copy of the data set that
    `set_epoch` cannot reach.

    With `views` V, used with a cache of teacher outputs, epoch e has the pixels of epoch e % V, and
    its keys carry that number. With R = 1 the shuffle order is still that of epoch e. With R > 1
    it is that of epoch e % V, because another order would contain other images.

    Args:
        num_images: images in the split, n.
        training: shuffle, repeat and pad; otherwise evaluation order.
        repeats: R; must be 1 in evaluation.
        seed: seed of the run, the same on all ranks.
        rank: this process, 0 <= rank < world_size.
        world_size: number of processes, w.
        views: V; None gives every epoch different pixels.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> [list(EpochSampler(5, training=False, rank=r, world_size=2)) for r in (0, 1)][1]
        [SampleKey(epoch=0, image=1, copy=0), SampleKey(epoch=0, image=3, copy=0)]
    """

    num_images: int
    _: KW_ONLY
    training: bool
    repeats: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    views: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "world_size", "views"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected >= 1, got {value}")
        if self.repeats < 1 or (self.repeats > 1 and not self.training):
            allowed = "a whole number >= 1" if self.training else "1 in evaluation"
            raise ValueError(f"repeats: expected {allowed}, got {self.repeats}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 <= seed < 2**63, got {self.seed}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank: expected 0 <= rank < world_size = {self.world_size}, got {self.rank}"
            )
        self.drop_last = self.training
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Returns the number of keys of a whole epoch on this rank, whatever `start` is."""
        if not self.training:
            return len(range(self.rank, self.num_images, self.world_size))
        if self.repeats > 1 and self.num_images >= _ROUND:
            return self.num_images // _ROUND * _ROUND // self.world_size
        return -(-self.num_images // self.world_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Makes the next iteration yield `epoch`, beginning with its key number `start`.

        Raises:
            ValueError: `epoch` is negative or `start` is outside 0..len(self).
        """
        if epoch < 0:
            raise ValueError(f"epoch: expected >= 0, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start: expected 0 <= start <= {len(self)}, got {start}")
        self.epoch = epoch
        self.start = start

    def view(self, epoch: int) -> int:
        """Returns the epoch number in the keys of `epoch`, which determines their pixels."""
        return epoch if self.views is None else epoch % self.views

    def shuffle_epoch(self, epoch: int) -> int:
        """Returns the epoch whose shuffle order `epoch` uses."""
        return epoch if self.repeats == 1 else self.view(epoch)

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Returns the image indices, (n,), in the order of `epoch`, each once."""
        order = np.arange(self.num_images)
        if self.training:
            np.random.default_rng(derive_seed(self.seed, self.shuffle_epoch(epoch))).shuffle(order)
        return order

    def __iter__(self) -> Iterator[SampleKey]:
        steps = range(self.start, len(self))
        return self.keys(self.rank + step * self.world_size for step in steps)

    def keys(self, positions: Iterable[int]) -> Iterator[SampleKey]:
        """Yields the keys at some positions of the epoch, whatever the rank."""
        view, n, repeats = self.view(self.epoch), self.num_images, self.repeats
        order = self.order(self.epoch)
        # A generator, because a million tuples in a list take 150 MB.
        return (
            SampleKey(
                view,
                int(order[position // repeats % n]),
                position % repeats + position // (n * repeats) * repeats,
            )
            for position in positions
        )


class RangeSampler(EpochSampler):
    """Yields chosen ranges of positions of a training epoch, in one process.

    A cache is built from these: each of its shards holds one range of positions.

    Args:
        num_images, repeats, seed: as in the `EpochSampler` whose keys these are.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, num_images: int, *, repeats: int, seed: int) -> None:
        super().__init__(num_images, training=True, repeats=repeats, seed=seed)
        self.drop_last = False
        self._ranges: Sequence[range] = ()

    def set_ranges(self, epoch: int, ranges: Sequence[range]) -> None:
        """Makes the next iteration yield the keys at these positions of `epoch`."""
        self.set_epoch(epoch)
        self._ranges = ranges

    def __iter__(self) -> Iterator[SampleKey]:
        return self.keys(chain.from_iterable(self._ranges))


class SpreadSampler(EpochSampler):
    """Yields the keys of one rank for at most `limit` images, in evaluation order.

    The images are spread evenly over the split, because files are sorted by class.

    Args:
        num_images: images in the split.
        limit: maximum number of images; None for all.
        rank: this process, 0 <= rank < world_size.
        world_size: number of processes.
    """

    def __init__(
        self, num_images: int, limit: int | None, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self._chosen = spread_evenly(num_images, limit)
        super().__init__(len(self._chosen), training=False, rank=rank, world_size=world_size)

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """See `EpochSampler`."""
        return np.array(self._chosen)


def spread_evenly(count: int, limit: int | None) -> Sequence[int]:
    """Selects at most `limit` of `count` positions, evenly, because files are sorted by class."""
    if limit is None or limit >= count:
        return range(count)
    return [position * count // limit for position in range(limit)]
