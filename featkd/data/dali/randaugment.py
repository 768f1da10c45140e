"""RandAugment's operations as DALI operators, with their arguments as tensors.

They compute what Pillow's functions, called by timm, compute. `docs/loaders.md` lists the
differences in pixels. Pillow truncates fractions and DALI rounds, so `_TRUNCATE` is added before
DALI rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featkd.data.rand_augment import OPERATIONS

Values = NDArray[np.float64]

NUM_VALUES = 12
_TRUNCATE = -0.5 + 2**-10  # turns rounding into truncation; keeps whole numbers
_GREY = np.array([19595, 38470, 7471]) / 65536  # Pillow's weights of red, green and blue
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's ImageFilter.SMOOTH

# codes of the operations
NONE, AFFINE, SATURATION, CONTRAST, BRIGHTNESS, INVERT = range(6)
AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, ADD, SHARPNESS = range(6, 12)


def _affine(*entries: Any) -> Values:
    """Stacks numbers and (K,) arrays into (K, 6), for K arguments.

    They map output to input coordinates: x' = a x + b y + c, y' = d x + e y + f.
    """
    return np.stack(np.broadcast_arrays(*entries), axis=1).astype(np.float64)


def _rotation(side: int, degrees: Values) -> Values:
    angle, centre = np.radians(degrees), side / 2
    cos, sin = np.cos(angle), np.sin(angle)
    return _affine(
        *(cos, -sin, centre - cos * centre + sin * centre),
        *(sin, cos, centre - sin * centre - cos * centre),
    )


def _saturation(side: int, factor: Values) -> Values:
    """Encodes (3, 4) matrices: color transforms, and the offset in their last column."""
    blend = factor[:, None, None]
    matrix = blend * np.eye(3) + (1 - blend) * np.tile(_GREY, (3, 1))
    offset = np.full((len(factor), 3, 1), _TRUNCATE)
    return np.concatenate((matrix, offset), axis=2).reshape(-1, NUM_VALUES)


def _sharpening(side: int, factor: Values) -> Values:
    blend = factor[:, None, None]
    kernels: Values = blend * np.outer([0, 1, 0], [0, 1, 0]) + (1 - blend) * _SMOOTH
    return kernels.reshape(-1, 9)


def _plain(side: int, argument: Values) -> Values:
    return argument[:, None]


# operation -> its code, and its values, given the side of the images and K arguments
_ENCODERS: dict[str, tuple[int, Callable[[int, Values], Values]]] = {
    "AutoContrast": (AUTOCONTRAST, _plain),
    "Equalize": (EQUALIZE, _plain),
    "Invert": (INVERT, _plain),
    "Rotate": (AFFINE, _rotation),
    "Posterize": (POSTERIZE, lambda side, x: _plain(side, 256 - 2.0 ** (8 - np.minimum(x, 8)))),
    "Solarize": (SOLARIZE, _plain),
    "SolarizeAdd": (ADD, _plain),
    "Color": (SATURATION, _saturation),
    "Desaturate": (SATURATION, lambda side, x: _saturation(side, np.clip(1 - x, 0, 1))),
    "Contrast": (CONTRAST, _plain),
    "Brightness": (BRIGHTNESS, _plain),
    "Sharpness": (SHARPNESS, _sharpening),
    "ShearX": (AFFINE, lambda side, x: _affine(1, x, 0, 0, 1, 0)),
    "ShearY": (AFFINE, lambda side, x: _affine(1, 0, 0, x, 1, 0)),
    "TranslateXRel": (AFFINE, lambda side, x: _affine(1, 0, x * side, 0, 1, 0)),
    "TranslateYRel": (AFFINE, lambda side, x: _affine(1, 0, 0, 0, 1, x * side)),
}


def is_supported(name: str) -> bool:
    """Checks whether the operation `name` of `rand_augment.OPERATIONS` is implemented."""
    return name in _ENCODERS


def encode_ops(
    ops: NDArray[np.int64], arguments: Values, side: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Encodes operations on images of side x side pixels for `apply_op`.

    Args:
        ops: (B,) positions in `rand_augment.OPERATIONS`; -1 keeps the image.
        arguments: (B,) arguments.
        side: height and width of the images.

    Returns:
        The codes of the operations, (B,), and (B, NUM_VALUES) values, of which an operation uses
        the first ones.
    """
    kinds = np.full(len(ops), NONE, np.int32)
    values = np.zeros((len(ops), NUM_VALUES), np.float32)
    for op in set(ops.tolist()) - {-1}:
        (where,) = np.nonzero(ops == op)
        kind, encode = _ENCODERS[OPERATIONS[op]]
        encoded = encode(side, arguments[where])
        kinds[where] = kind
        values[where, : encoded.shape[1]] = encoded
    return kinds, values


def apply_op(
    images: Any, kind: Any, values: Any, fill_color: tuple[int, int, int], on_gpu: bool
) -> Any:
    """Applies one operation per image; called while a pipeline with conditionals is defined.

    Args:
        images: (H, W, 3) uint8.
        kind: code from `encode_ops`, on the CPU.
        values: values from `encode_ops`, on the CPU.
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
