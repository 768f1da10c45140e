"""Batches on the training device: copied there ahead of time, normalized and erased."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from featkd.data.config import DataConfig
from featkd.data.erasing import Eraser


class SentBatch(NamedTuple):
    """A batch on its way to the device.

    Attributes:
        images: (B, H, W, 3) uint8.
        targets: (B,) int64.
        boxes: (B, 5) int32, see `Eraser.boxes`; None without erasing.
        copied: recorded after the copies; None if there is no separate stream.
    """

    images: Tensor
    targets: Tensor
    boxes: Tensor | None
    copied: torch.cuda.Event | None


class DeviceStage:
    """Turns uint8 images in host memory into normalized and erased ones on the device.

    `send` starts the copies and returns at once. On CUDA they run on a separate stream, beside
    the kernels of the previous update, and neither call waits for the device.

    Args:
        config: statistics, augmentation and memory format.
        training: erase boxes.
        seed: seed of the run.
        device: device of the finished batches.
    """

    def __init__(
        self, config: DataConfig, *, training: bool, seed: int, device: torch.device
    ) -> None:
        self._device = device
        self._channels_last = config.channels_last
        self._statistics = torch.tensor((config.mean, config.std))
        probability = config.augment.random_erasing if training else 0
        self._eraser = Eraser(probability, config.img_size, seed) if probability > 0 else None
        self._noise: Tensor | None = None
        self._compute: Callable[..., Tensor] | None = None
        self._stream: torch.cuda.Stream | None = None

    def send(self, images: Tensor, targets: Tensor, keys: Tensor) -> SentBatch:
        """Starts the copies of a batch to the device.

        Args:
            images: (B, H, W, 3) uint8, on the CPU or the device.
            targets: (B,) int64.
            keys: (B, 3) int64 on the CPU.
        """
        if self._compute is None:
            self._set_up()
        boxes = None if self._eraser is None else torch.from_numpy(self._eraser.boxes(keys.numpy()))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return SentBatch(
                _copied(images, self._device),
                _copied(targets, self._device),
                None if boxes is None else _copied(boxes, self._device),
                None if self._stream is None else self._stream.record_event(),
            )

    def finish(self, sent: SentBatch) -> tuple[Tensor, Tensor]:
        """Returns the images, (B, 3, H, W) float32, and targets, for use on the current stream."""
        if sent.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(sent.copied)
            for x in (sent.images, sent.targets, sent.boxes):
                if x is not None:
                    x.record_stream(stream)  # its memory is not reused before this stream is done
        assert self._compute is not None
        images = self._compute(
            sent.images,
            self._statistics,
            sent.boxes,
            self._noise,
            channels_last=self._channels_last,
        )
        return images, sent.targets

    def _set_up(self) -> None:
        """Prepares the device; not before the first batch, when the workers have been forked."""
        self._statistics = self._statistics.to(self._device)
        if self._eraser is not None:
            self._noise = self._eraser.noise().to(self._device)
        # The meta device, which has no values to read, checks the elementwise form for reads.
        on_cpu = self._device.type == "cpu"
        self._compute = normalize_and_erase_each if on_cpu else normalize_and_erase
        if self._device.type == "cuda":
            self._compute = torch.compile(normalize_and_erase)
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]


def _copied(x: Tensor, device: torch.device) -> Tensor:
    """Copies to the device on the current stream, without waiting."""
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def normalize_and_erase(
    images: Tensor,
    statistics: Tensor,
    boxes: Tensor | None,
    noise: Tensor | None,
    *,
    channels_last: bool,
) -> Tensor:
    """Normalizes and erases a batch elementwise, in one pass once compiled.

    Args:
        images: (B, H, W, 3) uint8.
        statistics: (2, 3), mean and standard deviation, for values in 0..1.
        boxes: (B, 5) int32, see `Eraser.boxes`; None erases nothing.
        noise: see `Eraser.noise`.
        channels_last: memory format of the result.

    Returns:
        (B, 3, H, W) float32.
    """
    height, width = images.shape[1:3]
    if channels_last:
        shapes = [(1, 1, 3), (height, 1, 1), (1, width, 1)]
    else:
        shapes = [(3, 1, 1), (1, height, 1), (1, 1, width)]
        images = images.permute(0, 3, 1, 2).contiguous()
    mean, std = statistics.view(2, *shapes[0])
    finished: Tensor = (images.float() / 255 - mean) / std
    if boxes is not None and noise is not None:
        channel, row, column = (
            torch.arange(math.prod(shape), device=images.device, dtype=torch.int32).view(shape)
            for shape in shapes
        )
        top, left, rows, columns, offset = boxes.T[..., None, None, None]
        inside = (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)
        place = offset + (channel * height + row) * width + column
        # Pixels outside of the boxes all read the first number, which costs no traffic.
        finished = torch.where(inside, noise[torch.where(inside, place, 0)], finished)
    return finished.permute(0, 3, 1, 2) if channels_last else finished


def normalize_and_erase_each(
    images: Tensor,
    statistics: Tensor,
    boxes: Tensor | None,
    noise: Tensor | None,
    *,
    channels_last: bool,
) -> Tensor:
    """Computes `normalize_and_erase` on the CPU, bitwise as torchvision's transforms normalize.

    Image by image, so that the operations on an image find it in the processor's cache.
    """
    count, height, width, _ = images.shape
    if channels_last:
        # torch is slow on rows of three numbers, so the statistics are repeated for a row of pixels
        mean, std = statistics.repeat(1, width)
        images = images.flatten(2)
    else:
        mean, std = statistics[:, :, None, None]
        images = images.permute(0, 3, 1, 2)
    finished = torch.empty(images.shape)
    for image, result in zip(images, finished, strict=True):
        result.copy_(image).div_(255).sub_(mean).div_(std)
    if channels_last:
        finished = finished.view(count, height, width, 3).permute(0, 3, 1, 2)
    if boxes is not None and noise is not None:
        for result, (top, left, rows, columns, offset) in zip(
            finished, boxes.tolist(), strict=True
        ):
            if rows:
                box = slice(None), slice(top, top + rows), slice(left, left + columns)
                own = noise[offset : offset + result.numel()].view(result.shape)
                result[box] = own[box]
    return finished
