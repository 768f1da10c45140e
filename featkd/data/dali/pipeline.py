"""Definition of the DALI pipeline, for a GPU and for the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from featkd.data.augment_params import AugmentParams
from featkd.data.config import DataConfig
from featkd.data.dali.randaugment import NUM_VALUES, apply_op, encode_ops


def build_pipeline(
    config: DataConfig,
    feed: Callable[[], tuple[Any, ...]],
    *,
    batch_size: int,
    num_ops: int,
    fill_color: tuple[int, int, int],
    device: torch.device,
) -> Any:
    """Builds the pipeline: decode a box of each file, resize, crop, flip, RandAugment.

    Args:
        config: sizes, filter and threads.
        feed: called for each batch; returns `pipeline_inputs`, or raises StopIteration at the end.
        batch_size: largest number of images per batch.
        num_ops: RandAugment operations per image.
        fill_color: red, green and blue that geometric operations fill with.
        device: "cpu", or a CUDA device on which JPEGs are decoded and images augmented.

    Returns:
        A nvidia.dali.Pipeline with one output, (B, H, W, 3) uint8.
    """
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"
    filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
    kinds = [types.UINT8] + [types.INT32] * 5 + [types.INT32, types.FLOAT] * num_ops

    @pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
    def define() -> Any:
        files, box_start, box_shape, resize_to, crop_offset, flip, *operations = fn.external_source(
            source=feed,
            num_outputs=len(kinds),
            batch=True,
            dtype=kinds,
            ndim=[1, 1, 1, 1, 1, 0] + [0, 1] * num_ops,
        )
        images = fn.decoders.image_slice(
            files,
            box_start,
            box_shape,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=on_gpu,  # interpolated chroma, libjpeg's default on the CPU
            adjust_orientation=False,  # as in decode_image
        )
        if on_gpu:
            images = fn.resize(
                images,
                size=fn.cast(resize_to, dtype=types.FLOAT),
                interp_type=filters[config.interpolation],
                antialias=True,
            )
        else:  # torch's vectorized filter is faster than DALI's, and closer to Pillow's
            images = fn.python_function(
                images, resize_to, function=_RESIZE[config.interpolation], output_layouts="HWC"
            )
        # Named arguments stay on the CPU. DALI would copy a GPU input back and wait for it.
        size = [config.img_size] * 2
        images = fn.slice(images, start=crop_offset, shape=size, axis_names="HW")
        if num_ops:  # before RandAugment, as in timm
            images = fn.flip(images, horizontal=flip)
        for n in range(num_ops):
            kind, values = operations[2 * n : 2 * n + 2]
            images = apply_op(images, kind, values, fill_color, on_gpu)
        return fn.crop_mirror_normalize(
            images,
            mirror=0 if num_ops else flip,
            dtype=types.UINT8,
            output_layout="HWC",
        )

    return define(
        batch_size=batch_size,
        num_threads=min(config.workers or 1, os.cpu_count() or 1),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=2,
    )


def pipeline_inputs(files: list[Any], params: AugmentParams, side: int) -> tuple[Any, ...]:
    """Returns a batch in the form that the pipeline takes: one array or list per input.

    Args:
        files: contents of the image files, (bytes,) uint8 each.
        params: their parameters.
        side: height and width of the images when they are augmented.
    """
    b, num_ops = params.ops.shape
    kinds, values = encode_ops(params.ops.T.ravel(), params.arguments.T.ravel(), side)
    layers = zip(kinds.reshape(num_ops, b), values.reshape(num_ops, b, NUM_VALUES), strict=True)
    return (
        files,
        params.source_box[:, :2].copy(),  # DALI takes no strided arrays
        params.source_box[:, 2:].copy(),
        params.resize_to,
        params.crop_offset,
        params.flip.astype(np.int32),
        *chain.from_iterable(layers),
    )


def _resize(
    image: np.ndarray[Any, Any], size: np.ndarray[Any, Any], mode: str
) -> np.ndarray[Any, Any]:
    """Resizes (H, W, 3) uint8 to (size[0], size[1], 3)."""
    planes = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    height, width = size.tolist()
    resized = F.interpolate(planes, (height, width), mode=mode, antialias=True)
    array: np.ndarray[Any, Any] = resized[0].permute(1, 2, 0).numpy()
    return array


# Made here, because DALI rewrites functions defined while a pipeline is defined.
_RESIZE = {mode: partial(_resize, mode=mode) for mode in ("bicubic", "bilinear")}
