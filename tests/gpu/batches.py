"""Batches on a GPU: their pixels, and copies that nothing waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu.recorder import NotHere
from featkd.data import AugmentConfig, DataConfig
from featkd.data.device import DeviceStage

_UPDATE = 1_000_000_000  # clock cycles, about half a second; a batch is copied in some milliseconds


def _side(device: torch.device) -> int:
    return 16 if device.type == "cpu" else 224


def _stage(device: torch.device, side: int, *, channels_last: bool = False) -> DeviceStage:
    """Returns a stage that erases half of the images."""
    augment = AugmentConfig(random_erasing=0.5)
    config = DataConfig(img_size=side, augment=augment, channels_last=channels_last)
    return DeviceStage(config, training=True, seed=1, device=device)


def _batch(count: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random images, targets and keys in pageable host memory."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    keys = torch.arange(3 * count).view(count, 3)
    return images, keys[:, 0], keys


@contextmanager
def _nothing_waits(device: torch.device) -> Iterator[None]:
    """Raises an error at every operation that waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def _busy(device: torch.device, cycles: int) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(cycles)


def pixels(device: torch.device) -> None:
    """Whole and partial batches in both memory formats have the pixels of a CPU."""
    for channels_last in (False, True):
        side = _side(device)
        stage = _stage(device, side, channels_last=channels_last)
        reference = _stage(torch.device("cpu"), side, channels_last=channels_last)
        for count in (12, 5, 12):
            batch = _batch(count, side)
            images, targets = stage.finish(stage.send(*batch))
            want, _ = reference.finish(reference.send(*batch))
            assert images.device.type == targets.device.type == device.type
            assert images.stride() == want.stride()
            assert torch.equal(targets.cpu(), batch[1])
            error = (images.cpu() - want).abs().max().item()
            assert error <= 2e-6, f"{count} images differ by {error:.1e}"


def memory_is_not_reused(device: torch.device) -> None:
    """Copies run ahead of a busy stream and leave the batches that it has yet to read alone."""
    side = _side(device)
    stage = _stage(device, side)
    batches = [_batch(count, side) for count in (8, 9, 10, 11)]
    wants = [stage.finish(stage.send(*batch))[0].clone() for batch in batches]
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = []
    for _ in range(2):
        for batch in batches:
            _busy(device, _UPDATE // 20)
            found.append(stage.finish(stage.send(*batch))[0])
    for images, want in zip(found, wants * 2, strict=True):
        assert torch.equal(images, want)


def copies_overlap(device: torch.device) -> None:
    """A batch arrives while an update runs, and neither sending nor finishing it waits."""
    if device.type != "cuda":
        raise NotHere("needs a GPU")
    side = _side(device)
    stage, batch = _stage(device, side), _batch(64, side)
    want = stage.finish(stage.send(*batch))[0]  # compiled, memory pinned
    torch.cuda.synchronize()
    updated = torch.cuda.Event()
    with _nothing_waits(device):
        _busy(device, _UPDATE)
        updated.record()
        sent = stage.send(*batch)
        images, _ = stage.finish(sent)
    assert sent.copied is not None
    sent.copied.synchronize()
    assert not updated.query(), "the copy waited for the update"
    torch.cuda.synchronize()
    assert torch.equal(images, want)


CHECKS: tuple[Callable[[torch.device], None], ...] = (pixels, memory_is_not_reused, copies_overlap)
