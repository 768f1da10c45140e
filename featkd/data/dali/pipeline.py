"""The DALI pipeline: one definition for a GPU and for the CPU's threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from featkd.data.augment_params import Decisions
from featkd.data.config import DataConfig
from featkd.data.dali import augment


def build_pipeline(
    config: DataConfig,
    feed: Callable[[], tuple[list[Any], ...]],
    *,
    batch_size: int,
    layers: int,
    fill: tuple[int, int, int],
    device: torch.device,
    resize: str = "auto",
) -> Any:
    """Decode a window of each file, resize, crop, flip, RandAugment, normalise.

    Args:
        config: sizes, filter, statistics, threads, memory format.
        feed: called for every batch; returns `as_arrays` of its files and decisions, or raises
            StopIteration.
        batch_size: most images in a batch.
        layers: operations of RandAugment to an image.
        fill: see `augment.augment`.
        device: "cpu", or a CUDA device, on which JPEGs are decoded and images augmented.
        resize: "dali" resizes with DALI's operator; "auto" does so on a GPU alone. On the CPU
            torch's vectorised filter takes an eighth of the time, and is closer to Pillow's.

    Returns:
        A nvidia.dali.Pipeline with one output: (B, H, W, 3) float32 with config.channels_last,
        else (B, 3, H, W).
    """
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"
    filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
    by_torch = _RESIZE[config.interpolation] if resize == "auto" and not on_gpu else None
    kinds = [types.UINT8, types.INT32, types.INT32, types.INT32, types.INT32, types.INT32]
    kinds += [types.INT32, types.FLOAT] * layers

    @pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def define() -> Any:
        files, start, shape, size, crop, flip, *operations = fn.external_source(
            source=feed,
            num_outputs=len(kinds),
            batch=True,
            dtype=kinds,
            ndim=[1, 1, 1, 1, 1, 0] + [0, 1] * layers,
        )
        images = fn.decoders.image_slice(
            files,
            start,
            shape,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=on_gpu,  # of the chroma, as libjpeg does it anyway
            adjust_orientation=False,  # as read_image
        )
        if by_torch is not None:
            images = fn.python_function(images, size, function=by_torch, output_layouts="HWC")
        else:
            images = fn.resize(
                images,
                size=fn.cast(size, dtype=types.FLOAT),
                interp_type=filters[config.interpolation],
                antialias=True,
            )
        images = fn.slice(
            images, crop, (config.img_size, config.img_size), axis_names="HW",
            normalized_anchor=False, normalized_shape=False,
        )  # fmt: skip
        if layers:  # flipped first, as in timm: some operations know left from right
            images = fn.flip(images, horizontal=flip)
        for layer in range(layers):
            kind, values = operations[2 * layer : 2 * layer + 2]
            images = augment.augment(images, kind, values, fill, on_gpu)
        return fn.crop_mirror_normalize(
            images,
            mirror=0 if layers else flip,
            mean=[255 * m for m in config.mean],
            std=[255 * s for s in config.std],
            dtype=types.FLOAT,
            output_layout="HWC" if config.channels_last else "CHW",
        )

    return define(
        batch_size=batch_size,
        num_threads=min(config.workers or 1, os.cpu_count() or 1),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=2,
    )


def as_arrays(
    files: list[Any], decisions: Sequence[Decisions], layers: int, side: int
) -> tuple[list[Any], ...]:
    """A batch as the pipeline takes it: for each input a list with an array for each sample."""
    columns: list[tuple[list[Any], Any]] = [
        ([d.window[:2] for d in decisions], np.int32),
        ([d.window[2:] for d in decisions], np.int32),
        ([d.size for d in decisions], np.int32),
        ([d.crop for d in decisions], np.int32),
        ([d.flip for d in decisions], np.int32),
    ]
    for layer in range(layers):
        codes = [
            augment.encode(d.operations[layer] if layer < len(d.operations) else None, side)
            for d in decisions
        ]
        columns += [
            ([kind for kind, _ in codes], np.int32),
            ([values for _, values in codes], np.float32),
        ]
    return files, *(list(np.asarray(values, dtype)) for values, dtype in columns)


def _resize(
    image: np.ndarray[Any, Any], size: np.ndarray[Any, Any], mode: str
) -> np.ndarray[Any, Any]:
    """(H, W, 3) uint8 to (size[0], size[1], 3)."""
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    height, width = size.tolist()
    resized = F.interpolate(planes, (height, width), mode=mode, antialias=True)
    array: np.ndarray[Any, Any] = resized[0].permute(1, 2, 0).numpy()
    return array


def _bicubic(image: np.ndarray[Any, Any], size: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return _resize(image, size, "bicubic")


def _bilinear(image: np.ndarray[Any, Any], size: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return _resize(image, size, "bilinear")


# functions of the module: DALI rewrites functions that are made while a pipeline is defined
_RESIZE = {"bicubic": _bicubic, "bilinear": _bilinear}
