"""Transforms: pixels equal to timm's, whose parameters they are given."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter

from featkd.data import AugmentConfig, DataConfig, SampleKey, build_transform
from featkd.data.augment import TrainTransform, apply_op
from featkd.data.augment_params import AugmentParams
from featkd.data.rand_augment import OPERATIONS


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def recorded(transform: Any, image: Image.Image) -> tuple[Tensor, AugmentParams]:
    """Runs timm's transform; returns its pixels and the parameters that it drew."""
    crop, flip, rand_augment, *rest = transform.transforms
    seen: list[Any] = []
    done: list[tuple[int, float]] = []
    draw = RandomResizedCropAndInterpolation.get_params
    crop.get_params = lambda *arguments: seen.append(draw(*arguments)) or seen[-1]
    flipped = flip.forward(cropped := crop(image))
    for op in rand_augment.ops:
        op.aug_fn = _spy(op.name, NAME_TO_OP[op.name], done)
    result = flipped
    for step in (rand_augment, *rest):
        result = step(result)
    params = AugmentParams(
        np.array(seen, np.int32),
        np.full((1, 2), 16, np.int32),
        np.zeros((1, 2), np.int32),
        np.array([flipped is not cropped]),
        np.array([[op for op, _ in done]], np.int64).reshape(1, -1),
        np.array([[argument for _, argument in done]]).reshape(1, -1),
    )
    return result, params


def _spy(name: str, function: Any, done: list[tuple[int, float]]) -> Any:
    def spy(image: Image.Image, *arguments: float, **options: Any) -> Any:
        done.append((OPERATIONS.index(name.removesuffix("Increasing")), (*arguments, 0)[0]))
        return function(image, *arguments, **options)

    return spy


@pytest.mark.parametrize("form", ["rand-m9-n2-mstd0.5-inc1", "rand-m7-n3-p1", "rand-m9-p1-t3a"])
def test_pixels_equal_timms_with_the_parameters_that_timm_drew(form: str) -> None:
    config = DataConfig(img_size=16, augment=AugmentConfig(rand_augment=form, random_erasing=0))
    ours = TrainTransform(config, seed=0)
    timms = create_transform(
        16, is_training=True, auto_augment=form, interpolation="bicubic",
        mean=config.mean, std=config.std, color_jitter=None,
    )  # fmt: skip
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    seen = set()
    for index in range(120):
        image = picture(seed=index)
        try:
            expected, params = recorded(timms, image)
        except ValueError:  # timm's posterize with no bits
            continue
        got = F.normalize(F.to_tensor(ours.apply(image, params)), config.mean, config.std)
        assert torch.equal(got, expected)
        seen |= {*params.ops.ravel().tolist(), bool(params.flip[0]) - 2}
    assert len(seen) == 2 + (3 if form.endswith("t3a") else 15)


def test_posterize_with_no_bits_is_black() -> None:
    """With "rand-m9-n2-mstd0.5-inc1" 2.3 % of its uses keep no bits, on which timm can fail."""
    options = {"resample": 3}
    black = apply_op(picture(), "Posterize", 0.0, options)
    assert black.size == (40, 30)
    assert np.asarray(black).max() == 0
    for bits in range(1, 9):
        assert apply_op(picture(), "Posterize", float(bits), options) == posterize(picture(), bits)


def test_color_jitter_is_distributed_as_torchvisions(no_augment: AugmentConfig) -> None:
    """A grey image shows the brightness alone; a coloured one also the order of the three."""
    config = DataConfig(img_size=4, augment=replace(no_augment, color_jitter=0.4))
    ours, theirs = TrainTransform(config, seed=0), ColorJitter(0.4, 0.4, 0.4)
    torch.manual_seed(0)
    for color in ((100, 100, 100), (200, 60, 20)):
        image = Image.new("RGB", (4, 4), color)
        levels = []
        for index in range(250):
            pixels = ours(image, SampleKey(0, index, 0)) / 255, F.to_tensor(theirs(image))
            levels.append([x[:, 0, 0].numpy() for x in pixels])
        found, expected = np.array(levels).swapaxes(0, 1)
        assert np.abs(found.mean(0) - expected.mean(0)).max() < 4 * 0.2 / 250**0.5
        assert (found.std(0) / expected.std(0)) == pytest.approx(1, abs=0.15)
        assert np.abs(np.quantile(found, (0, 0.2, 0.8, 1), 0)
                      - np.quantile(expected, (0, 0.2, 0.8, 1), 0)).max() < 0.04  # fmt: skip


def test_evaluation_is_resize_crop_normalize() -> None:
    config = DataConfig(img_size=28)  # 28 / 0.875 = 32
    image = picture(60, 45)
    resized = image.resize((42, 32), Image.Resampling.BICUBIC)
    cropped = np.asarray(resized.crop((7, 2, 35, 30)), dtype=np.float32) / 255
    expected = (cropped - np.array(config.mean)) / np.array(config.std)
    got = build_transform(config)(image)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_everything_off_gives_the_image_itself(no_augment: AugmentConfig) -> None:
    config = DataConfig(img_size=8, augment=no_augment)
    image = picture(8, 8)
    got = TrainTransform(config, 0)(image, SampleKey(0, 0, 0))
    assert torch.equal(got.permute(1, 2, 0), torch.from_numpy(np.array(image)))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (8, 8), (32, 32), (1, 200), (300, 2)])
def test_small_images(size: tuple[int, int]) -> None:
    transform = TrainTransform(DataConfig(img_size=24), 0)
    for copy in range(60):
        got = transform(picture(*size), SampleKey(0, 0, copy))
        assert got.shape == (3, 24, 24)
        assert got.dtype == torch.uint8
    assert build_transform(DataConfig(img_size=8))(picture(*size)).shape == (3, 8, 8)
