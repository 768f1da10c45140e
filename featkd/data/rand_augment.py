"""RandAugment's operations and arguments, drawn for a whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timm.data import create_transform
from timm.data.auto_augment import RandAugment

from featkd.data.config import DataConfig
from featkd.data.draws import normal

Floats = NDArray[np.float64]

_PER_LAYER = 4  # numbers per layer after its operation: applied or not, two for the level, the sign


_FACTORS = ("Color", "Contrast", "Brightness", "Sharpness")
# timm's name -> argument, given the level (1 at magnitude 10) and a random sign
_ARGUMENTS: dict[str, Callable[[Floats, Floats], Any]] = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), lambda x, sign: np.zeros_like(x)),
    "Rotate": lambda x, sign: 30 * x * sign,
    "Posterize": lambda x, sign: np.floor(4 * x),
    "PosterizeIncreasing": lambda x, sign: 4 - np.floor(4 * x),
    "Solarize": lambda x, sign: np.minimum(256, np.floor(256 * x)),
    "SolarizeIncreasing": lambda x, sign: np.maximum(0, 256 - np.floor(256 * x)),
    "SolarizeAdd": lambda x, sign: np.minimum(128, np.floor(110 * x)),
    **dict.fromkeys(_FACTORS, lambda x, sign: 0.1 + 1.8 * x),
    **dict.fromkeys(
        [f"{name}Increasing" for name in _FACTORS],
        lambda x, sign: np.maximum(0.1, 1 + 0.9 * x * sign),
    ),
    **dict.fromkeys(("ShearX", "ShearY"), lambda x, sign: 0.3 * x * sign),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), lambda x, sign: 0.45 * x * sign),
    "Desaturate": lambda x, sign: np.clip(0.5 + 0.5 * x, 0.5, 1),
    "GaussianBlur": lambda x, sign: np.clip(0.1 + 1.9 * x, 0.1, 2),
}


OPERATIONS = tuple(name for name in _ARGUMENTS if not name.endswith("Increasing"))
"""timm's names without their suffixes; `RandAugmentSampler` returns positions in this tuple."""


def timm_rand_augment(config: DataConfig) -> RandAugment:
    """Returns timm's RandAugment, as timm reads `config.augment.rand_augment`.

    Without one it is that of no operation.
    """
    transform = create_transform(
        config.img_size,
        is_training=True,
        auto_augment=config.augment.rand_augment or "rand-n0",
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
    )
    (found,) = (s for s in transform.transforms if isinstance(s, RandAugment))
    return found


class RandAugmentSampler:
    """Draws operations and arguments with the probabilities of timm's RandAugment.

    Args:
        timms: timm's RandAugment, which holds the choices and the magnitude.

    Attributes:
        names: names in `OPERATIONS` of the operations that are chosen from.
        num_ops: number of operations per image.
        count: numbers that `sample` needs per image.

    Raises:
        ValueError: there are fewer weighted operations than layers, or timm has an operation
            that featkd does not know.
    """

    def __init__(self, timms: RandAugment) -> None:
        # Without layers none is chosen, and timm may have operations that featkd does not know.
        full_names = [op.name for op in timms.ops] if timms.num_layers else []
        if unknown := [name for name in full_names if name not in _ARGUMENTS]:
            raise ValueError(
                f"data.augment.rand_augment: this timm chooses from {', '.join(unknown)}, which "
                f"featkd does not know; allowed: {', '.join(_ARGUMENTS)}; set it to null"
            )
        self.names = [name.removesuffix("Increasing") for name in full_names]
        self.num_ops: int = timms.num_layers
        self._weights = timms.choice_weights if full_names else None
        if self._weights is not None and self.num_ops > len(full_names):
            raise ValueError(
                f"data.augment.rand_augment: n{self.num_ops} with weights, which draws without "
                f"repeats from {len(full_names)} operations; expected at most n{len(full_names)}"
            )
        self._ids = np.array([OPERATIONS.index(name) for name in self.names], np.int64)
        self._full_names = full_names  # not the functions, which cannot be pickled
        self._choices = self.num_ops if self._weights is None else len(full_names)
        self.count = self._choices + _PER_LAYER * self.num_ops
        first = timms.ops[0]  # all have the same probability and magnitude
        self._prob: float = first.prob
        self._magnitude: float = first.magnitude
        self._std: float = first.magnitude_std
        self._upper: float = first.magnitude_max or 10.0

    def sample(self, numbers: Floats) -> tuple[NDArray[np.int64], Floats]:
        """Turns uniform numbers, (B, count), into operations and arguments, (B, num_ops) each.

        An operation is a position in `OPERATIONS`, or -1 if it is skipped. The argument is the one
        of timm's function, 0 if that has none.
        """
        if self._weights is None:
            chosen = (numbers[:, : self._choices] * len(self._ids)).astype(np.int64)
        else:
            # Without repeats: waiting times with the weights as rates, in the order of their ends.
            ends = -np.log1p(-numbers[:, : self._choices]) / self._weights
            chosen = np.argsort(ends, axis=1)[:, : self.num_ops]
        layers = numbers[:, self._choices :].reshape(len(numbers), self.num_ops, _PER_LAYER)
        if self._std == float("inf"):
            level = self._magnitude * layers[..., 1]
        else:
            level = self._magnitude + self._std * normal(layers[..., 1], layers[..., 2])
        level = np.clip(level, 0.0, self._upper) / 10
        sign = np.where(layers[..., 3] < 0.5, -1.0, 1.0)
        arguments = np.empty_like(level)
        for choice in set(chosen.ravel().tolist()):
            where = chosen == choice
            arguments[where] = _ARGUMENTS[self._full_names[choice]](level[where], sign[where])
        return np.where(layers[..., 0] >= self._prob, -1, self._ids[chosen]), arguments
