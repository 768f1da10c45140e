"""The one place that picks a loader."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from featkd.data.config import DataConfig
from featkd.data.imageset import ImageSet
from featkd.data.loader import Loader, TorchLoader
from featkd.data.sampler import EpochSampler


def build_loader(
    config: DataConfig,
    *,
    split: Literal["train", "val"],
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    views: int | None = None,
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
        device: where the batches are going. DALI puts them there; timm's loader leaves them in
            memory, page-locked where they go to a GPU.
        views: in training, go through the pixels of so many epochs again and again; see
            `EpochSampler`.

    Returns:
        A Loader. Call `set_epoch` before each epoch and `close` at the end.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: an argument is out of its range, a training epoch is under one batch, or
            data.backend is "dali" and can't do what is asked; it says why.

    Notes:
        A worker of timm's loader holds two batches ahead in shared memory (batch 512 at 224
        pixels: 308 MB each).
    """
    if split not in ("train", "val"):
        raise ValueError(f"split: expected train or val, got {split!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected >= 1, got {batch_size}")
    dataset = ImageSet(config, split, seed)
    training = split == "train"
    sampler = EpochSampler(
        len(dataset),
        training=training,
        repeats=config.augment.repeats if training else 1,
        seed=seed,
        rank=rank,
        world_size=world_size,
        views=views if training else None,
    )
    if training and len(sampler) < batch_size:
        raise ValueError(
            f"batch_size: {batch_size} is more than the {len(sampler)} samples of an epoch on "
            f"this rank ({len(dataset)} images in {dataset.folder}, world_size {world_size}), "
            "so that an epoch would have no batch"
        )
    return build_over(dataset, config, sampler, batch_size=batch_size, device=torch.device(device))


def build_over(
    dataset: ImageSet,
    config: DataConfig,
    sampler: EpochSampler,
    *,
    batch_size: int,
    device: torch.device,
) -> Loader:
    """The loader of the images that a sampler names; the arguments as of `build_loader`."""
    why_not = _why_not_dali(config, dataset.training, device)
    if why_not is None:
        from featkd.data.dali.loader import DaliLoader

        return DaliLoader(dataset, config, sampler, batch_size=batch_size, device=device)
    return TorchLoader(
        dataset,
        sampler,
        batch_size=batch_size,
        workers=config.workers,
        pin_memory=device.type == "cuda",
        channels_last=config.channels_last,
        note=why_not,
    )


def _why_not_dali(config: DataConfig, training: bool, device: torch.device) -> str | None:
    """None for DALI; else what its user should know, which is nothing where nobody asked for it."""
    if config.backend == "timm" or (config.backend == "auto" and device.type != "cuda"):
        return ""
    from featkd.data.dali.loader import why_not

    why = why_not(config, training)
    if not why:
        return None
    if config.backend == "dali":
        raise ValueError(f'data.backend: "dali" can\'t be used: {why}; allowed: "timm", "auto"')
    note = f"images are loaded by timm, not by DALI: {why}"
    warnings.warn(note, stacklevel=4)
    return note
