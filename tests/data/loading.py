"""Helpers of the loader tests: a loader of small images, and a comparison of batches."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from featkd.data import AugmentConfig, Batch, DataConfig, ImageSet, Loader, build_loader

Split = Literal["train", "val"]
# Every augmentation is likely to be drawn.
STRONG = AugmentConfig(random_erasing=0.5, repeats=1)
DEFAULTS: dict[str, Any] = {"augment": STRONG}


# torch's CUDA libraries are in the package nvidia too
_NO_DALI = find_spec("nvidia") is None or find_spec("nvidia.dali") is None
DALI = pytest.param("dali", marks=pytest.mark.skipif(_NO_DALI, reason="no DALI"))


def config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(str(root), **{"img_size": 16, "workers": 0, **options})


def image_set(root: Path, split: Split = "train", **options: Any) -> ImageSet:
    return ImageSet(config(root, **options), split)


def names(root: Path, split: Split = "train", **options: Any) -> list[str]:
    """Names of the images, relative to the root."""
    dataset = image_set(root, split, **options)
    return [os.path.relpath(dataset.name(i), root) for i in range(len(dataset))]


def refused(error: type[Exception], message: str, *args: Any, **options: Any) -> str:
    """Checks that `image_set` raises an error; returns its text."""
    with pytest.raises(error, match=message) as raised:
        image_set(*args, **options)
    return str(raised.value)


@contextlib.contextmanager
def loading(
    root: Path, split: Split = "train", batch_size: int = 4, **options: Any
) -> Iterator[Loader]:
    names = ("seed", "rank", "world_size", "device", "views")
    call = {name: options.pop(name) for name in names if name in options}
    data = config(root, **{**DEFAULTS, **options})
    loader = build_loader(data, split=split, batch_size=batch_size, **call)
    try:
        yield loader
    finally:
        loader.close()


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
        for a, b in zip(first, second, strict=True)
    )


def alive() -> list[int | None]:
    return [child.pid for child in multiprocessing.active_children()]
