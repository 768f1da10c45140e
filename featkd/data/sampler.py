"""Which image comes when: shuffling, repeated augmentation, sharding over ranks, resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from featkd.runtime.seeding import derive_seed

# DeiT cuts an epoch of repeated augmentation to a multiple of this many images.
_ROUND = 256


class Key(NamedTuple):
    """Names one sample of a run: the epoch, the image's index in the split, and which copy of it.

    With the run's seed it fixes every pixel.
    """

    epoch: int
    image: int
    copy: int


class EpochSampler(Sampler[Key]):
    """The keys of one rank in one epoch, in order.

    All ranks see one sequence of positions, and rank r of w takes r, r + w, r + 2w, ...

    - Training: the images are shuffled by (seed, epoch). With repeats R > 1 each image stands R
      times in a row, so that its copies fall on different ranks, and each rank takes only
      floor(n // 256 * 256 / w) of the positions (DeiT's repeated augmentation: an epoch has its
      usual length and sees about n / R images). With R = 1, or under 256 images, each rank takes
      ceil(n / w). Positions past the end wrap, and the `copy` of a wrapped one goes on
      counting: no two keys of an epoch are equal on any rank.
    - Evaluation: in the order of the files, each image on exactly one rank, nothing padded, so
      that ranks can differ by one image.

    Keys carry the epoch because persistent workers hold a copy of the data set that no
    `set_epoch` would reach.

    With `views` V, as a cache of a teacher's outputs holds them, epoch e has the pixels of epoch
    e % V: its keys say so. Without repeats they come in the order of epoch e all the same, shuffled
    anew; with repeats in that of epoch e % V, as another order is of other images.

    Args:
        num_images: images in the split, n.
        training: shuffle, repeat and pad; otherwise evaluation order.
        repeats: R; in evaluation it must be 1.
        seed: seed of the run, the same on all ranks.
        rank: this process, 0 <= rank < world_size.
        world_size: number of processes, w.
        views: V; None gives every epoch pixels of its own.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> [list(EpochSampler(5, training=False, rank=r, world_size=2)) for r in (0, 1)][1]
        [Key(epoch=0, image=1, copy=0), Key(epoch=0, image=3, copy=0)]
    """

    def __init__(
        self,
        num_images: int,
        *,
        training: bool,
        repeats: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        views: int | None = None,
    ) -> None:
        counts = {"num_images": num_images, "world_size": world_size, "views": views}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected >= 1, got {value}")
        if repeats < 1 or (repeats > 1 and not training):
            allowed = "a whole number >= 1" if training else "1 in evaluation"
            raise ValueError(f"repeats: expected {allowed}, got {repeats}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, got {rank}")
        self.num_images = num_images
        self.training = training
        self.repeats = repeats
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.views = views
        self.drop_last = training
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Keys of the whole epoch on this rank, wherever `start` lies."""
        if not self.training:
            return len(range(self.rank, self.num_images, self.world_size))
        if self.repeats > 1 and self.num_images >= _ROUND:
            return self.num_images // _ROUND * _ROUND // self.world_size
        return -(-self.num_images // self.world_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what the next `iter` gives: `epoch` from its key number `start` on.

        Raises:
            ValueError: the epoch is negative or `start` lies outside 0..len(self).
        """
        if epoch < 0:
            raise ValueError(f"epoch: expected >= 0, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start: expected 0 <= start <= {len(self)}, got {start}")
        self.epoch = epoch
        self.start = start

    def view(self, epoch: int) -> int:
        """The epoch that the keys of `epoch` say."""
        return epoch if self.views is None else epoch % self.views

    def ordered_as(self, epoch: int) -> int:
        """The epoch of the run without `views` whose order of the images `epoch` has."""
        return epoch if self.repeats == 1 else self.view(epoch)

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(n,): the images in the order in which `epoch` has them, each once."""
        order = np.arange(self.num_images)
        if self.training:
            np.random.default_rng(derive_seed(self.seed, self.ordered_as(epoch))).shuffle(order)
        return order

    def __iter__(self) -> Iterator[Key]:
        steps = range(self.start, len(self))
        return self._keys(self.rank + step * self.world_size for step in steps)

    def _keys(self, positions: Iterable[int]) -> Iterator[Key]:
        view, n, repeats = self.view(self.epoch), self.num_images, self.repeats
        order = self.order(self.epoch)
        # An array and a generator: a million-image epoch as a list of tuples takes 150 MB.
        return (
            Key(
                view,
                int(order[position // repeats % n]),
                position % repeats + position // (n * repeats) * repeats,
            )
            for position in positions
        )


class StretchSampler(EpochSampler):
    """Stretches of one process's training epochs: what a part of a cache is made of.

    Args:
        num_images, repeats, seed: as of the `EpochSampler` whose keys these are.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, num_images: int, *, repeats: int, seed: int) -> None:
        super().__init__(num_images, training=True, repeats=repeats, seed=seed)
        self.drop_last = False
        self._stretches: Sequence[range] = ()

    def choose(self, epoch: int, stretches: Sequence[range]) -> None:
        """Choose what the next `iter` gives: the keys at these positions of `epoch`."""
        self.set_epoch(epoch)
        self._stretches = stretches

    def __iter__(self) -> Iterator[Key]:
        return self._keys(position for stretch in self._stretches for position in stretch)
