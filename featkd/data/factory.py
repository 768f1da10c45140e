"""Construction of the loader of a split."""

from __future__ import annotations

import os
import warnings
from typing import Literal

import torch

from featkd.data.config import DataConfig
from featkd.data.imageset import ImageSet
from featkd.data.loader import Loader, TorchLoader
from featkd.data.sampler import EpochSampler, SpreadSampler
from featkd.runtime.names import plural


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
    """Builds the loader of a split.

    Training: shuffled and augmented, without the last partial batch; see `EpochSampler` for
    repeated augmentation and ranks. Evaluation: in file order, each image on exactly one rank. The
    number of batches can then differ between ranks, and can be 0.

    Args:
        config: the image set and its preprocessing.
        split: "train" or "val".
        batch_size: images per batch on this rank.
        seed: seed of the run, the same on all ranks. With the `SampleKey` it determines every
            pixel, whatever the number of workers or ranks.
        rank: this process.
        world_size: number of processes.
        device: device of the batches. The timm loader decodes on the CPU, and DALI on the device;
            both normalize and erase there.
        views: number of epochs whose pixels training repeats; see `EpochSampler`.

    Returns:
        A Loader. Call `set_epoch` before each epoch and `close` at the end.

    Raises:
        FileNotFoundError: a folder is missing or holds no images.
        ValueError: an argument is out of range, a training epoch has no full batch, or
            data.backend is "dali" and DALI cannot be used.

    Notes:
        A worker of the timm loader holds two prefetched batches in shared memory (77 MB each for
        512 images of 224 pixels). The next batch is copied to a GPU while the last one is used.
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
        facts = [f"{plural(len(dataset), 'training image')} in {dataset.folder}"]
        if config.val_split is None:
            facts.append(f"data.val_fraction {config.held_out:g} left out")
        if config.augment.repeats > 1:
            facts.append(f"data.augment.repeats {config.augment.repeats}")
        if world_size > 1:
            facts.append(plural(world_size, "process"))
        raise ValueError(
            f"batch_size: expected at most {len(sampler)}, the samples of an epoch per process "
            f"({', '.join(facts)}); got {batch_size}"
        )
    return build_loader_for(dataset, sampler, batch_size=batch_size, device=device)


def build_evaluation_loader(
    config: DataConfig,
    *,
    split: Literal["train", "val"],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    limit: int | None = None,
) -> Loader:
    """Builds a loader that treats either split as in evaluation: in file order, not augmented.

    Args:
        limit: maximum number of images, spread evenly over the split.

    The other arguments and the errors are those of `build_loader`.
    """
    dataset = ImageSet(config, split, training=False)
    sampler = SpreadSampler(len(dataset), limit, rank=rank, world_size=world_size)
    return build_loader_for(dataset, sampler, batch_size=batch_size, device=device)


def build_loader_for(
    dataset: ImageSet, sampler: EpochSampler, *, batch_size: int, device: torch.device | str
) -> Loader:
    """Builds the loader for the keys of `sampler`; see `build_loader` for the arguments."""
    config, device = dataset.config, torch.device(device)
    reason = _reason_against_dali(config, dataset.training, device)
    if reason is None:
        from featkd.data.dali import DaliLoader

        return DaliLoader(dataset, sampler, batch_size=batch_size, device=device)
    note = "; ".join(filter(None, (reason, _excess_of_workers(config.workers))))
    return TorchLoader(dataset, sampler, batch_size=batch_size, device=device, note=note)


def _excess_of_workers(workers: int) -> str:
    """Returns a note if there are more worker processes than CPU cores, else ""."""
    cores = len(os.sched_getaffinity(0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    if workers * ranks <= cores:
        return ""
    return (
        f"data.workers: {workers * ranks} processes share {plural(cores, 'CPU core')}; "
        f"try --data.workers {cores // ranks}"
    )


def _reason_against_dali(config: DataConfig, training: bool, device: torch.device) -> str | None:
    """Returns None if DALI is to be used, otherwise the reason ("" if it was not requested)."""
    if config.backend == "timm" or (config.backend == "auto" and device.type != "cuda"):
        return ""
    from featkd.data.dali import unsupported_reason

    reason = unsupported_reason(config, training)
    if not reason:
        return None
    if config.backend == "dali":
        raise ValueError(f'data.backend: "dali" can\'t be used: {reason}; allowed: "timm", "auto"')
    note = f"using the timm loader instead of DALI: {reason}"
    warnings.warn(note, stacklevel=4)
    return note
