"""Data configuration: the published defaults, and an error for each field out of range."""

from __future__ import annotations

import dataclasses
from typing import Any

import jsonargparse
import pytest

from featkd.data import AugmentConfig, DataConfig


def test_defaults_are_the_published_recipe() -> None:
    augment = AugmentConfig()
    assert augment.rand_augment == "rand-m9-n2-mstd0.5-inc1"
    assert (augment.scale, augment.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert (augment.hflip, augment.random_erasing, augment.repeats) == (0.5, 0.25, 3)
    assert augment.color_jitter is None
    assert not augment.mixes
    data = DataConfig()
    assert (data.img_size, data.crop_pct, data.interpolation) == (224, 0.875, "bicubic")
    assert data.augment == augment


RATIOS = {"scale": [(0.0, 1.0), (0.5, 0.2), (0.5, 1.1), (0.5,)], "ratio": [(0.0, 1.0), (2.0, 1.0)]}
AUGMENT = {
    **RATIOS,
    "hflip": [-0.1, float("nan")],
    "random_erasing": [1.5],
    "mixup": [-0.2],
    "cutmix": [float("inf")],
    "mixup_prob": [1.1],
    "mixup_switch_prob": [-0.5],
    "repeats": [0, 1.5],
    "rand_augment": ["", "augmix-m3", "rand-m9-q2", "rand-m9-mstd.5.5"],
    "color_jitter": [-1.0, 0.4],
}
DATA = {
    "img_size": [0],
    "workers": [-1],
    "mean": [(0.5, 0.5)],
    "std": [(0.5,), (0.5, 0.0, 0.5)],
    "crop_pct": [0.0, 1.1],
    "interpolation": ["nearest"],
    "on_bad_image": ["ignore"],
    "train_split": [""],
    "val_split": [""],
}


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [(AugmentConfig, field, value) for field, values in AUGMENT.items() for value in values]
    + [(DataConfig, field, value) for field, values in DATA.items() for value in values],
)
def test_a_field_out_of_range(config: Any, field: str, value: Any) -> None:
    name = "augment" if config is AugmentConfig else "data"
    with pytest.raises(ValueError, match=rf"{name}\.{field}: ") as raised:
        config(**{field: value})
    shown = {"": '""', (0.5, 0.0, 0.5): "0.0"}.get(value, repr(value))
    assert (shown if config is DataConfig else repr(value)) in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["rand", "rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8-mmax20", "rand-m9-tweights", "rand-t3a"],
)
def test_rand_augment_strings_of_timm(text: str) -> None:
    AugmentConfig(rand_augment=text)


def test_color_jitter_is_accepted_if_timm_applies_it() -> None:
    AugmentConfig(color_jitter=0.3, rand_augment=None)
    AugmentConfig(color_jitter=0.3, rand_augment="rand-m9-t3a")


def test_every_field_has_its_help_text() -> None:
    """jsonargparse takes the help texts from the docstrings."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DataConfig, "data")
    text = " ".join(parser.format_help().split())
    for config, prefix in ((DataConfig, "data"), (AugmentConfig, "data.augment")):
        for field in dataclasses.fields(config):
            if field.name == "augment":
                continue
            described = text.split(f"--{prefix}.{field.name} ")[-1].split("(type:")[0]
            assert len(described.split()) > 3, field.name
    parsed = parser.parse_args(["--data.augment.scale=[0.5,1]", "--data.augment.rand_augment=null"])
    built = parser.instantiate(parsed).data
    assert built.augment == AugmentConfig(scale=(0.5, 1.0), rand_augment=None)
