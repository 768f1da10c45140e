"""RandAugment's operations as DALI operators, with their arguments as tensors.

They compute what Pillow's functions, called by timm, compute. `docs/training.md` lists the
differences in pixels. Pillow truncates fractions and DALI rounds, so `_TRUNCATE` is added before
DALI rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from featkd.data.augment_params import RandAugmentOp

NUM_VALUES = 12
_TRUNCATE = -0.5 + 2**-10  # turns rounding into truncation; keeps whole numbers
_GREY = np.array([19595, 38470, 7471]) / 65536  # Pillow's weights of red, green and blue
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's ImageFilter.SMOOTH

# codes of the operations
NONE, AFFINE, SATURATION, CONTRAST, BRIGHTNESS, INVERT = range(6)
AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, ADD, SHARPNESS = range(6, 12)


def _affine(*matrix: float) -> tuple[int, Any]:
    """Encodes an affine map of output to input coordinates: x' = a x + b y + c, y' likewise."""
    return AFFINE, matrix


def _rotation(side: int, degrees: float) -> tuple[int, Any]:
    angle, centre = math.radians(degrees), side / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return _affine(
        *(cos, -sin, centre - cos * centre + sin * centre),
        *(sin, cos, centre - sin * centre - cos * centre),
    )


def _saturation(factor: float) -> tuple[int, Any]:
    """Encodes a (3, 4) matrix: a color transform, and the offset in its last column."""
    matrix = factor * np.eye(3) + (1 - factor) * np.tile(_GREY, (3, 1))
    return SATURATION, np.hstack((matrix, np.full((3, 1), _TRUNCATE))).ravel()


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


def _base_name(name: str) -> str:
    """Strips timm's suffixes, which change how arguments are drawn but not what they mean."""
    return name.removesuffix("Increasing").removesuffix("Original")


def is_supported(name: str) -> bool:
    """Checks whether the operation with timm's name `name` is implemented."""
    return _base_name(name) in _ENCODERS


def encode_op(operation: RandAugmentOp | None, side: int) -> tuple[int, np.ndarray[Any, Any]]:
    """Encodes an operation on images of side x side pixels for `apply_op`.

    Args:
        operation: the operation; None keeps the image.
        side: height and width of the images.

    Returns:
        The code of the operation, and NUM_VALUES float32 values. An operation uses the first ones.
    """
    values = np.zeros(NUM_VALUES, np.float32)
    if operation is None:
        return NONE, values
    kind, arguments = _ENCODERS[_base_name(operation.name)](side, *operation.arguments)
    values[: len(arguments)] = arguments
    return kind, values


def apply_op(
    images: Any, kind: Any, values: Any, fill_color: tuple[int, int, int], on_gpu: bool
) -> Any:
    """Applies one operation per image; called while a pipeline with conditionals is defined.

    Args:
        images: (H, W, 3) uint8.
        kind: code from `encode_op`, on the CPU.
        values: values from `encode_op`, on the CPU.
        fill_color: red, green and blue that affine operations fill with.
        on_gpu: True if the images are on the GPU.

    Returns:
        Images of the same shape and type.
    """
    from nvidia.dali import fn, types

    scalar = values[0].gpu() if on_gpu else values[0]
    all_bits = types.Constant(255, dtype=types.UINT8)
    if kind == NONE:
        result = images
    elif kind == AFFINE:
        # warp_affine fills all channels with one value. Subtracting the fill color makes it 0.
        color = types.Constant(np.array(fill_color, np.float32), device="gpu" if on_gpu else "cpu")
        moved = fn.warp_affine(
            images - color, matrix=fn.reshape(values[:6], shape=[2, 3]), fill_value=0.0
        )
        result = fn.cast(moved + color, dtype=types.UINT8)
    elif kind == SATURATION:
        matrix = fn.reshape(values, shape=[3, 4])
        result = fn.coord_transform(images, MT=matrix, dtype=types.UINT8)
    elif kind == CONTRAST:
        grey = fn.coord_transform(images, M=_GREY.tolist(), dtype=types.FLOAT)
        mean = fn.cast(fn.reductions.mean(grey), dtype=types.UINT8)
        result = fn.cast(images * scalar + (1 - scalar) * mean + _TRUNCATE, dtype=types.UINT8)
    elif kind == BRIGHTNESS:
        result = fn.brightness(images, brightness=values[0], brightness_shift=_TRUNCATE / 255)
    elif kind == INVERT:
        result = images ^ all_bits
    elif kind == AUTOCONTRAST:
        darkest = fn.reductions.min(images, axes=[0, 1])
        spread = fn.reductions.max(images, axes=[0, 1]) - darkest
        flat = spread == 0
        scale = (255.0 + flat) / (spread + flat) - 255.0 * flat  # 1 if all pixels are equal
        result = fn.cast((images - darkest * (spread > 0)) * scale + _TRUNCATE, dtype=types.UINT8)
    elif kind == EQUALIZE:
        # DALI's histogram counts the values up to a pixel's own, Pillow's those below it. Inverting
        # the image turns one into the other.
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
        result = fn.cast(sharpened + _TRUNCATE, dtype=types.UINT8)
    return result
