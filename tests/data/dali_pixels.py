"""The DALI pipeline on given files and decisions, and RandAugment's operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from featkd.data import DataConfig
from featkd.data.augment_params import Decisions, Operation
from featkd.data.dali.pipeline import as_arrays, build_pipeline

_BATCH = 32
# near the levels that rand-m9-mstd0.5-inc1 draws, both signs
OPERATIONS = (
    Operation("AutoContrast", ()),
    Operation("Equalize", ()),
    Operation("Invert", ()),
    Operation("Rotate", (27.0,)),
    Operation("Rotate", (-25.0,)),
    Operation("PosterizeIncreasing", (1,)),
    Operation("PosterizeIncreasing", (0,)),
    Operation("SolarizeIncreasing", (26,)),
    Operation("SolarizeAdd", (99,)),
    Operation("ColorIncreasing", (1.81,)),
    Operation("ColorIncreasing", (0.19,)),
    Operation("ContrastIncreasing", (1.81,)),
    Operation("ContrastIncreasing", (0.19,)),
    Operation("BrightnessIncreasing", (1.81,)),
    Operation("BrightnessIncreasing", (0.19,)),
    Operation("SharpnessIncreasing", (1.81,)),
    Operation("SharpnessIncreasing", (0.19,)),
    Operation("ShearX", (0.27,)),
    Operation("ShearY", (-0.27,)),
    Operation("TranslateXRel", (0.405,)),
    Operation("TranslateYRel", (-0.405,)),
)
Pixels = np.ndarray[Any, Any]


def through_dali(
    config: DataConfig,
    files: Sequence[Pixels],
    decisions: Sequence[Decisions],
    *,
    layers: int = 0,
    fill: tuple[int, int, int] = (0, 0, 0),
) -> Pixels:
    """Runs files through the loader's pipeline on the CPU, without its normalisation.

    Args:
        config: sizes and filter; its statistics are not used.
        files: contents of each file, (bytes,) uint8.
        decisions: decisions for each file.
        layers, fill: as in `build_pipeline`.

    Returns:
        (B, H, W, 3) float32 levels, 0 to 255.
    """
    levels = replace(config, mean=(0, 0, 0), std=(1 / 255,) * 3, channels_last=True)
    starts = iter(range(0, len(files), _BATCH))

    def feed() -> tuple[list[Any], ...]:
        start = next(starts)  # its StopIteration ends the pipeline
        batch = slice(start, start + _BATCH)
        return as_arrays(list(files[batch]), decisions[batch], layers, config.img_size)

    pipeline = build_pipeline(
        levels,
        feed,
        batch_size=_BATCH,
        layers=layers,
        fill=fill,
        device=torch.device("cpu"),
    )
    found: list[Pixels] = []
    while len(found) < len(files):
        (out,) = pipeline.run()
        found += list(np.array(out.as_tensor()))
    return np.stack(found)
