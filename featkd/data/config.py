"""Configuration of loading and augmentation; the defaults are the ImageNet recipe of [EM26]."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

from featkd.runtime.checks import check_choice, check_count, check_fraction, check_positive

_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n\d+|p\d+(\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)))*"
)

HELD_OUT = 0.1  # share of the unlabelled images that validates by default


def _check_range(name: str, value: tuple[float, float], upper: float) -> None:
    """Raises ValueError unless `value` is an increasing pair of numbers in (0, upper]."""
    if len(value) != 2 or not 0 < value[0] <= value[1] <= upper:
        limit = "" if upper == float("inf") else f" <= {upper:g}"
        raise ValueError(f"{name}: expected (low, high) with 0 < low <= high{limit}, got {value!r}")


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation; the fields are in the order in which they are applied.

    `rand_augment=None, scale=(1, 1), ratio=(1, 1), hflip=0, random_erasing=0, repeats=1` turns off
    all augmentation, which suits digits and other tiny images.

    Args:
        scale: smallest and largest fraction of the image's area that the random crop keeps.
        ratio: smallest and largest aspect ratio of the random crop.
        hflip: probability of a horizontal flip.
        rand_augment: timm's RandAugment string, e.g. "rand-m9-n2-mstd0.5-inc1"; null turns it off.
        color_jitter: strength of brightness, contrast and saturation jitter; null turns it off.
            Needs `rand_augment: null`, because timm ignores it next to RandAugment.
        random_erasing: probability of filling a rectangle with normal noise, drawn per pixel.
        repeats: copies of each image per epoch, each augmented differently (repeated
            augmentation). The epoch keeps its length. 1 turns it off.
        mixup: parameter a of the Beta(a, a) distribution for blending pairs of images; 0 turns it
            off. `mixup` and `cutmix` need an even batch_size. They run after the loader, on the
            training device (`featkd.data.Mixer`).
        cutmix: parameter a of the Beta(a, a) distribution for the area of a rectangle that is
            pasted from one image onto the other; 0 turns it off.
        mixup_prob: probability that a batch is mixed.
        mixup_switch_prob: probability that a mixed batch uses cutmix, if both are on.

    Raises:
        ValueError: a field is out of range.

    Examples:
        >>> AugmentConfig(hflip=2.0)
        Traceback (most recent call last):
        ValueError: data.augment.hflip: expected a number from 0 to 1, got 2.0
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    rand_augment: str | None = "rand-m9-n2-mstd0.5-inc1"
    color_jitter: float | None = None
    random_erasing: float = 0.25
    repeats: int = 3
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5

    def __post_init__(self) -> None:
        _check_range("data.augment.scale", self.scale, 1.0)
        _check_range("data.augment.ratio", self.ratio, float("inf"))
        for name in ("hflip", "random_erasing", "mixup_prob", "mixup_switch_prob"):
            check_fraction(f"data.augment.{name}", getattr(self, name))
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"data.augment.{name}: expected a finite number >= 0, got "
                    f"{getattr(self, name)!r}"
                )
        check_count("data.augment.repeats", self.repeats, 1)
        if self.rand_augment is not None and not _RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                "data.augment.rand_augment: expected null or a RandAugment string of timm such as "
                f'"rand-m9-n2-mstd0.5-inc1", got {self.rand_augment!r}'
            )
        if self.color_jitter is not None:
            check_positive("data.augment.color_jitter", self.color_jitter)
            if self.rand_augment is not None and "-t3a" not in self.rand_augment:
                raise ValueError(
                    f"data.augment.color_jitter: got {self.color_jitter!r} together with "
                    f"rand_augment={self.rand_augment!r}; timm ignores it then, so set one of the "
                    "two to null"
                )

    @property
    def is_random(self) -> bool:
        """True if a sample's pixels are drawn, so that they differ between epochs and copies."""
        return (
            (*self.scale, *self.ratio) != (1, 1, 1, 1)
            or self.hflip not in (0, 1)
            or self.rand_augment is not None
            or self.color_jitter is not None
            or self.random_erasing > 0
        )

    @property
    def mixes(self) -> bool:
        """True if batches are mixed after the loader."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class DataConfig:
    """An image set on disk, `<path>/<split>/<class>/*.jpg`, and its preprocessing.

    The class folders of the *training* split, sorted by name, define the classes. A split folder
    can hold WebDataset tar files instead; then `<path>/classes.txt` has one class name per line.

    Args:
        path: folder that holds the split folders.
        train_split: folder of the training images under path; "." is path itself.
        val_split: folder of the validation images under path; "." is path itself. null holds out
            `val_fraction` of the training images instead.
        val_fraction: with `val_split=null`, share of the training images that validates and is
            not trained on, 0 < val_fraction < 1; null for 0.1 if `labels` is "none". A hash of
            each file's name (relative to the split folder) decides, so an image keeps its side
            when others are added.
        labels: "folders" for labels from class folders (or shards); "none" for training without
            labels. Then a split is all images in its folder and the folders below it, or shards
            whose labels, if any, are not read.
        first_label: label of the first class in tar shards, usually 0 or 1.
        img_size: height and width of the model's input, in pixels.
        mean: mean of the red, green and blue channels, for values in 0..1.
        std: standard deviation of the channels.
        crop_pct: fraction of the shorter side that the central crop of the evaluation keeps.
        interpolation: filter for resizing.
        workers: loader processes per rank; 0 loads in the training process. With DALI, the number
            of threads.
        backend: "timm" (Pillow in worker processes), "dali" (NVIDIA DALI), or "auto", which uses
            DALI if batches go to a CUDA device and DALI supports the configuration.
        channels_last: return images in torch's channels_last memory format.
        on_bad_image: "error" raises at an unreadable image. "skip" replaces it with the next
            readable one in training, and omits it in evaluation.
        augment: augmentation of the training images.

    Raises:
        ValueError: a field is out of range.
    """

    path: str = ""
    train_split: str = "train"
    val_split: str | None = "val"
    val_fraction: float | None = None
    labels: Literal["folders", "none"] = "folders"
    first_label: int = 0
    img_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    workers: int = 8
    backend: Literal["auto", "timm", "dali"] = "auto"
    channels_last: bool = False
    on_bad_image: Literal["error", "skip"] = "error"
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        for name in ("train_split", "val_split"):
            if getattr(self, name) == "":
                raise ValueError(f'data.{name}: expected a folder under path (or "."), got ""')
        self._check_val_fraction()
        check_count("data.img_size", self.img_size, 1)
        check_count("data.workers", self.workers, 0)
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"data.{name}: expected 3 numbers, got {getattr(self, name)!r}")
        for value in self.std:
            check_positive("data.std", value)
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct: expected 0 < crop_pct <= 1, got {self.crop_pct!r}")
        for name in ("labels", "interpolation", "backend", "on_bad_image"):
            check_choice(f"data.{name}", getattr(self, name), get_args(_HINTS[name]))

    @property
    def held_out(self) -> float | None:
        """Share of the training images that validates; None with a validation split."""
        if self.val_split is not None:
            return None
        return HELD_OUT if self.val_fraction is None else self.val_fraction

    def _check_val_fraction(self) -> None:
        """Raises ValueError if val_fraction does not fit val_split."""
        fraction = self.val_fraction
        if self.val_split is not None and fraction is not None:
            raise ValueError(
                f"data.val_fraction: got {fraction!r} together with "
                f"data.val_split={self.val_split!r}; set data.val_split to null to hold out a "
                "fraction of the training images"
            )
        if self.val_split is not None or (fraction is None and self.labels == "none"):
            return
        if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise ValueError(
                "data.val_fraction: expected 0 < val_fraction < 1 with data.val_split=null, got "
                f"{fraction!r}"
            )


_HINTS = get_type_hints(DataConfig)
