"""RandAugment's operations as DALI operators, with their arguments as tensors.

The formulas are Pillow's, whose functions timm calls. `docs/training.md` has how far the pixels
are apart. Pillow cuts fractions off where DALI rounds: `_CUT` makes the one the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from featkd.data.augment_params import Operation

NUM_VALUES = 12
_CUT = -0.5 + 2**-10  # added before rounding; whole numbers stay what they are
_GREY = np.array([19595, 38470, 7471]) / 65536  # Pillow's weights of red, green, blue
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's ImageFilter.SMOOTH

# kinds of operations
NONE, AFFINE, SATURATION, CONTRAST, BRIGHTNESS, INVERT = range(6)
AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, ADD, SHARPNESS = range(6, 12)


def _affine(*matrix: float) -> tuple[int, Any]:
    """Where in the image a pixel of the result comes from: x' = a x + b y + c, y' likewise."""
    return AFFINE, matrix


def _rotation(side: int, degrees: float) -> tuple[int, Any]:
    angle, centre = math.radians(degrees), side / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return _affine(
        *(cos, -sin, centre - cos * centre + sin * centre),
        *(sin, cos, centre - sin * centre - cos * centre),
    )


def _saturation(factor: float) -> tuple[int, Any]:
    """The matrix that a pixel's three values are multiplied by, and what is added."""
    matrix = factor * np.eye(3) + (1 - factor) * np.tile(_GREY, (3, 1))
    return SATURATION, np.hstack((matrix, np.full((3, 1), _CUT))).ravel()


_ENCODERS: dict[str, Callable[..., tuple[int, Any]]] = {
    "AutoContrast": lambda side: (AUTOCONTRAST, ()),
    "Equalize": lambda side: (EQUALIZE, ()),
    "Invert": lambda side: (INVERT, ()),
    "Rotate": _rotation,
    "Posterize": lambda side, bits: (POSTERIZE, (256 - 2.0 ** (8 - min(bits, 8)),)),
    "Solarize": lambda side, threshold: (SOLARIZE, (threshold,)),
    "SolarizeAdd": lambda side, added: (ADD, (added,)),
    "Color": lambda side, factor: _saturation(factor),
    "Desaturate": lambda side, factor: _saturation(min(1.0, max(0.0, 1.0 - factor))),
    "Contrast": lambda side, factor: (CONTRAST, (factor,)),
    "Brightness": lambda side, factor: (BRIGHTNESS, (factor,)),
    "Sharpness": lambda side, factor: (
        SHARPNESS,
        (factor * np.outer([0, 1, 0], [0, 1, 0]) + (1 - factor) * _SMOOTH).ravel(),
    ),
    "ShearX": lambda side, factor: _affine(1, factor, 0, 0, 1, 0),
    "ShearY": lambda side, factor: _affine(1, 0, 0, factor, 1, 0),
    "TranslateX": lambda side, pixels: _affine(1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda side, pixels: _affine(1, 0, 0, 0, 1, pixels),
    "TranslateXRel": lambda side, share: _affine(1, 0, share * side, 0, 1, 0),
    "TranslateYRel": lambda side, share: _affine(1, 0, 0, 0, 1, share * side),
}


def _plain(name: str) -> str:
    """timm's further names set how a level becomes an argument; the argument means the same."""
    return name.removesuffix("Increasing").removesuffix("Original")


def supported(name: str) -> bool:
    """Whether an operation, by timm's name, can be done."""
    return _plain(name) in _ENCODERS


def encode(operation: Operation | None, side: int) -> tuple[int, np.ndarray[Any, Any]]:
    """What `augment` takes for an operation on an image of side x side pixels.

    Args:
        operation: the operation, or None for none.
        side: height and width of the images.

    Returns:
        Its kind, and NUM_VALUES float32 values, of which a kind uses the first ones.
    """
    values = np.zeros(NUM_VALUES, np.float32)
    if operation is None:
        return NONE, values
    kind, found = _ENCODERS[_plain(operation.name)](side, *operation.arguments)
    values[: len(found)] = found
    return kind, values


def augment(images: Any, kind: Any, values: Any, fill: tuple[int, int, int], on_gpu: bool) -> Any:
    """Apply an operation to each image; called while a pipeline with conditionals is defined.

    Args:
        images: (H, W, 3) uint8, on the GPU where `on_gpu`.
        kind: from `encode`, on the CPU.
        values: from `encode`, on the CPU.
        fill: what an affine operation moves in from outside the image.
        on_gpu: where the images are.

    Returns:
        Images of the same shape and type.
    """
    from nvidia.dali import fn, types

    scalar = values[0].gpu() if on_gpu else values[0]
    all_bits = types.Constant(255, dtype=types.UINT8)
    if kind == NONE:
        result = images
    elif kind == AFFINE:
        # an operator's own fill is one value for all channels: it fills with 0, what is left of
        # `fill` where that is the origin
        origin = types.Constant(np.array(fill, np.float32), device="gpu" if on_gpu else "cpu")
        moved = fn.warp_affine(
            images - origin, matrix=fn.reshape(values[:6], shape=[2, 3]), fill_value=0.0
        )
        result = fn.cast(moved + origin, dtype=types.UINT8)
    elif kind == SATURATION:
        matrix = fn.reshape(values, shape=[3, 4])
        result = fn.coord_transform(images, MT=matrix, dtype=types.UINT8)
    elif kind == CONTRAST:
        grey = fn.coord_transform(images, M=_GREY.tolist(), dtype=types.FLOAT)
        mean = fn.cast(fn.reductions.mean(grey), dtype=types.UINT8)
        result = fn.cast(images * scalar + (1 - scalar) * mean + _CUT, dtype=types.UINT8)
    elif kind == BRIGHTNESS:
        result = fn.brightness(images, brightness=values[0], brightness_shift=_CUT / 255)
    elif kind == INVERT:
        result = images ^ all_bits
    elif kind == AUTOCONTRAST:
        darkest = fn.reductions.min(images, axes=[0, 1])
        spread = fn.reductions.max(images, axes=[0, 1]) - darkest
        flat = spread == 0
        scale = (255.0 + flat) / (spread + flat) - 255.0 * flat  # 1 where all pixels are equal
        result = fn.cast((images - darkest * (spread > 0)) * scale + _CUT, dtype=types.UINT8)
    elif kind == EQUALIZE:
        # DALI counts the values up to a pixel's own, Pillow those below it: DALI's way from above
        result = fn.equalize(images ^ all_bits) ^ all_bits
    elif kind == POSTERIZE:
        result = images & fn.cast(scalar, dtype=types.UINT8)
    elif kind == SOLARIZE:
        result = images ^ (fn.cast(images >= scalar, dtype=types.UINT8) * all_bits)
    elif kind == ADD:
        added = fn.cast(scalar, dtype=types.UINT8) * fn.cast(images < 128, dtype=types.UINT8)
        result = images + added
    else:
        kernel = fn.reshape(values[:9], shape=[3, 3])
        if on_gpu:
            kernel = kernel.gpu()
        sharpened = fn.filter(images, kernel, dtype=types.FLOAT)
        result = fn.cast(sharpened + _CUT, dtype=types.UINT8)
    return result
