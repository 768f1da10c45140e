"""DALI pipeline for given files and parameters, and RandAugment's operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from featkd.data import DataConfig
from featkd.data.augment_params import AugmentParams, RandAugmentOp
from featkd.data.dali import build_pipeline, pipeline_inputs

_BATCH = 32
# near the levels that rand-m9-mstd0.5-inc1 draws, both signs
OPERATIONS = (
    RandAugmentOp("AutoContrast", ()),
    RandAugmentOp("Equalize", ()),
    RandAugmentOp("Invert", ()),
    RandAugmentOp("Rotate", (27.0,)),
    RandAugmentOp("Rotate", (-25.0,)),
    RandAugmentOp("PosterizeIncreasing", (1,)),
    RandAugmentOp("PosterizeIncreasing", (0,)),
    RandAugmentOp("SolarizeIncreasing", (26,)),
    RandAugmentOp("SolarizeAdd", (99,)),
    RandAugmentOp("ColorIncreasing", (1.81,)),
    RandAugmentOp("ColorIncreasing", (0.19,)),
    RandAugmentOp("ContrastIncreasing", (1.81,)),
    RandAugmentOp("ContrastIncreasing", (0.19,)),
    RandAugmentOp("BrightnessIncreasing", (1.81,)),
    RandAugmentOp("BrightnessIncreasing", (0.19,)),
    RandAugmentOp("SharpnessIncreasing", (1.81,)),
    RandAugmentOp("SharpnessIncreasing", (0.19,)),
    RandAugmentOp("ShearX", (0.27,)),
    RandAugmentOp("ShearY", (-0.27,)),
    RandAugmentOp("TranslateXRel", (0.405,)),
    RandAugmentOp("TranslateYRel", (-0.405,)),
)
Pixels = np.ndarray[Any, Any]


def through_dali(
    config: DataConfig,
    files: Sequence[Pixels],
    params: Sequence[AugmentParams],
    *,
    num_ops: int = 0,
    fill_color: tuple[int, int, int] = (0, 0, 0),
) -> Pixels:
    """Runs files through the loader's pipeline on the CPU, without its normalization.

    Args:
        config: sizes and filter; its statistics are not used.
        files: contents of each file, (bytes,) uint8.
        params: parameters of each file.
        num_ops, fill_color: as in `build_pipeline`.

    Returns:
        (B, H, W, 3) float32 levels, 0 to 255.
    """
    levels = replace(config, mean=(0, 0, 0), std=(1 / 255,) * 3, channels_last=True)
    starts = iter(range(0, len(files), _BATCH))

    def feed() -> tuple[list[Any], ...]:
        start = next(starts)  # its StopIteration ends the pipeline
        batch = slice(start, start + _BATCH)
        return pipeline_inputs(list(files[batch]), params[batch], num_ops, config.img_size)

    pipeline = build_pipeline(
        levels,
        feed,
        batch_size=_BATCH,
        num_ops=num_ops,
        fill_color=fill_color,
        device=torch.device("cpu"),
    )
    images: list[Pixels] = []
    while len(images) < len(files):
        (out,) = pipeline.run()
        images += list(np.array(out.as_tensor()))
    return np.stack(images)
