"""Preprocessing of the images that a model was trained on."""

from __future__ import annotations

from typing import Any

from timm.data import resolve_model_data_config

from featkd.models.features import FeatureModel


def read_preprocessing(model: FeatureModel) -> tuple[dict[str, Any], str]:
    """Returns the preprocessing that timm's record of a model describes.

    Returns:
        The fields of `featkd.data.DataConfig`; and a note if the record has another crop than
        featkd's, which keeps the middle of an image, otherwise "".
    """
    found = resolve_model_data_config(model)
    mode, note = found["crop_mode"], ""
    if mode != "center":
        note = f"crop_mode: timm's record has {mode}, but the images are cropped at their centre"
    return {
        "img_size": found["input_size"][-1],
        "mean": tuple(found["mean"]),
        "std": tuple(found["std"]),
        "crop_pct": found["crop_pct"],
        "interpolation": found["interpolation"],
    }, note
