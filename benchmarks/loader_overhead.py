"""Images per second of the DALI loader's own work: everything in its process but the pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from featkd.data import DataConfig, ImageSet
from featkd.data.dali.loader import DaliLoader
from featkd.data.sampler import EpochSampler
from featkd.data.source import ImageSource


def overhead_loader(config: DataConfig, batch_size: int) -> DaliLoader:
    """Builds the DALI loader with its files in memory and without work on pixels.

    It orders the samples, reads and checks each file in its threads, draws all random parameters,
    makes the pipeline's inputs and assembles the batches. The pipeline returns the same images for
    each batch, which are neither normalized nor erased.

    Args:
        config: the images and their augmentation.
        batch_size: images per batch.
    """
    dataset = ImageSet(config, "train")
    dataset._source = _Memory(dataset._source)  # type: ignore[assignment]
    sampler = EpochSampler(len(dataset), training=True)
    loader = _Stubbed(dataset, sampler, batch_size=batch_size, device=torch.device("cpu"))
    loader._stage.finish = lambda sent: (sent.images, sent.targets)  # type: ignore[method-assign]
    return loader


class _Memory:
    """An `ImageSource` whose files have been read."""

    def __init__(self, source: ImageSource) -> None:
        self.classes, self.folder = source.classes, source.folder
        self.name, self.file_size = source.name, source.file_size
        self._files = [source.read(index) for index in range(len(source))]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[bytes, int]:
        return self._files[index]


class _Stubbed(DaliLoader):
    def _build_pipeline(self, feed: Callable[[], tuple[Any, ...]], batch_size: int) -> Any:
        side = self._config.img_size
        return _Pipeline(feed, torch.zeros(batch_size, 3, side, side, dtype=torch.uint8))


class _Pipeline:
    """Takes the inputs of each batch like DALI's pipeline, and returns the same images."""

    def __init__(self, feed: Callable[[], tuple[Any, ...]], images: torch.Tensor) -> None:
        self._feed, self._images = feed, images

    def run(self, stream: object) -> tuple[_Pipeline]:
        self._feed()
        return (self,)

    def as_tensor(self) -> torch.Tensor:
        return self._images

    def reset(self) -> None:
        pass
