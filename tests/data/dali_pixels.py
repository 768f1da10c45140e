"""DALI pipeline for given files and parameters, and RandAugment's operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from featkd.data import DataConfig
from featkd.data.augment_params import AugmentParams
from featkd.data.dali import build_pipeline, pipeline_inputs

_BATCH = 32
# name and argument, near the levels that rand-m9-mstd0.5-inc1 draws, both signs
LIKELY_OPS = (
    ("AutoContrast", 0.0),
    ("Equalize", 0.0),
    ("Invert", 0.0),
    ("Rotate", 27.0),
    ("Rotate", -25.0),
    ("Posterize", 1.0),
    ("Posterize", 0.0),
    ("Solarize", 26.0),
    ("SolarizeAdd", 99.0),
    ("Color", 1.81),
    ("Color", 0.19),
    ("Contrast", 1.81),
    ("Contrast", 0.19),
    ("Brightness", 1.81),
    ("Brightness", 0.19),
    ("Sharpness", 1.81),
    ("Sharpness", 0.19),
    ("ShearX", 0.27),
    ("ShearY", -0.27),
    ("TranslateXRel", 0.405),
    ("TranslateYRel", -0.405),
)
Pixels = np.ndarray[Any, Any]


def through_dali(
    config: DataConfig,
    files: Sequence[Pixels],
    params: AugmentParams,
    *,
    fill_color: tuple[int, int, int] = (0, 0, 0),
) -> Pixels:
    """Runs files through the loader's pipeline on the CPU.

    Args:
        config: sizes and filter.
        files: contents of each file, (bytes,) uint8.
        params: their parameters.
        fill_color: as in `build_pipeline`.

    Returns:
        (B, H, W, 3) float32 levels, 0 to 255.
    """
    starts = iter(range(0, len(files), _BATCH))

    def feed() -> tuple[Any, ...]:
        start = next(starts)  # its StopIteration ends the pipeline
        batch = slice(start, start + _BATCH)
        part = AugmentParams(*(field[batch] for field in params))
        return pipeline_inputs(list(files[batch]), part, config.img_size)

    pipeline = build_pipeline(
        replace(config, channels_last=True),
        feed,
        batch_size=_BATCH,
        num_ops=params.ops.shape[1],
        fill_color=fill_color,
        device=torch.device("cpu"),
    )
    images: list[Pixels] = []
    while len(images) < len(files):
        (out,) = pipeline.run()
        images += list(np.array(out.as_tensor()))
    return np.stack(images).astype(np.float32)
