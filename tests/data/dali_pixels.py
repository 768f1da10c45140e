"""RandAugment's operations, and the DALI pipeline on given files and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from featkd.data import DataConfig
from featkd.data.augment_params import AugmentParams, RandAugmentOp
from featkd.data.dali import build_pipeline, pipeline_inputs

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
    num_ops: int,
    fill_color: tuple[int, int, int],
) -> Pixels:
    """Runs files through the loader's pipeline on the CPU as one batch, without normalization.

    Args:
        config: sizes and filter; its statistics are not used.
        files: contents of each file, (bytes,) uint8.
        params: parameters for each file.
        num_ops, fill_color: as in `build_pipeline`.

    Returns:
        (B, H, W, 3) float32 levels, 0 to 255.
    """
    levels = replace(config, mean=(0, 0, 0), std=(1 / 255,) * 3, channels_last=True)
    pipeline = build_pipeline(
        levels,
        lambda: pipeline_inputs(list(files), params, num_ops, config.img_size),
        batch_size=len(files),
        num_ops=num_ops,
        fill_color=fill_color,
        device=torch.device("cpu"),
    )
    (out,) = pipeline.run()
    return np.array(out.as_tensor())
