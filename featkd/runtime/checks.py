"""Argument checks. Each error names the argument, the value and what is allowed."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

METRICS = ("mse", "spectral")


def check_tensor(name: str, x: Tensor) -> None:
    """Raises TypeError unless `x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")


def check_floating(name: str, x: Tensor, shape: Sequence[int | str] | None = None) -> None:
    """Raises TypeError unless `x` is a real floating-point tensor; also calls `check_shape`."""
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if shape is not None:
        check_shape(name, x, shape)


def check_shape(name: str, x: Tensor, expected: Sequence[int | str]) -> None:
    """Raises ValueError unless `x` has the expected shape; a str in it matches any size."""
    fits = x.dim() == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, x.shape, strict=True)
    )
    if not fits:
        want = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(x.shape)}")


def check_target(name: str, x: Tensor, batch: int, classes: int) -> None:
    """Checks the shape and dtype of (batch,) class indices or (batch, classes) soft labels."""
    check_tensor(name, x)
    if x.dim() not in (1, 2):
        raise ValueError(
            f"{name}: expected shape ({batch}) for class indices or ({batch}, {classes}) for soft "
            f"labels, got {tuple(x.shape)}"
        )
    if x.dim() == 2:
        check_floating(name, x)
    elif x.dtype != torch.int64:
        raise TypeError(f"{name}: class indices must be int64, got {x.dtype}")
    check_shape(name, x, (batch, classes)[: x.dim()])


def check_not_empty(name: str, x: Tensor) -> None:
    """Raises ValueError if `x` has no elements, so that its mean is undefined."""
    if x.numel() == 0:
        raise ValueError(f"{name}: has no elements (shape {tuple(x.shape)}); the mean is undefined")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError if the given tensors are on more than one device."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")


def check_constant(name: str, x: Tensor) -> None:
    """Raises ValueError if `x` requires a gradient, which the losses do not compute."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires grad, but the loss gives the teacher no gradient; "
            f"run the teacher under torch.no_grad() or pass {name}.detach()"
        )


def check_teacher_map(teacher: Tensor, shape: tuple[int, int, int]) -> None:
    """Checks a teacher's feature map (B, N, Ct): floating, not empty, without a gradient."""
    check_floating("teacher", teacher, shape)
    check_constant("teacher", teacher)
    check_not_empty("teacher", teacher)


def check_not_swapped(student: Tensor, teacher: Tensor, weight: Tensor) -> None:
    """Raises ValueError if the maps fit the projection only in the other order."""
    maps = [x for x in (student, teacher) if isinstance(x, Tensor) and x.dim() == 3]
    if len(maps) < 2 or not isinstance(weight, Tensor) or weight.dim() != 2:
        return
    widths = student.shape[2], teacher.shape[2]
    if widths == tuple(weight.shape) and widths[0] != widths[1]:
        raise ValueError(
            f"student, teacher: weight {tuple(weight.shape)} projects a student of {widths[1]} "
            f"channels to a teacher of {widths[0]}, got a student of {widths[0]} and a teacher of "
            f"{widths[1]}; the two maps are swapped"
        )


def warn_of_class_token(metric: str, grid: object, tokens: int) -> None:
    """Warns once if the maps seem to contain the class token: N - 1 is a square and N is not.

    Compiled graphs don't warn: their number of tokens may be symbolic.
    """
    if metric != "mse" or grid is not None or tokens < 5 or torch.compiler.is_compiling():
        return
    side = math.isqrt(tokens - 1)
    if side * side == tokens - 1 and tokens not in _warned_of:
        _warned_of.add(tokens)
        warnings.warn(
            f"the feature maps have {tokens} = {side}*{side} + 1 tokens: pass patch tokens only, "
            "without the class token, or grid=(H, W) if this is the patch grid",
            stacklevel=3,
        )


_warned_of: set[int] = set()  # numbers of tokens


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number above zero."""
    _check_number(name, value, "a finite number > 0")
    if not 0 < value < math.inf:  # not math.isfinite: torch.compile traces this for dynamic values
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Raises ValueError unless `value` is an int >= `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")


def check_width(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless `value` is a whole number above zero."""
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected a whole number >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")


def check_shares(name: str, values: Iterable[float]) -> None:
    """Raises TypeError or ValueError unless `values` is a sequence of numbers in (0, 1]."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of numbers, such as (0.9,), got {values!r}")
    for value in values:
        check_fraction(name, value)
        if value == 0:
            raise ValueError(f"{name}: expected numbers above 0 and at most 1, got 0")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in [0, 1]."""
    _check_number(name, value, "a number from 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")


def _check_number(name: str, value: object, allowed: str) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {allowed}, got {value!r}")


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the allowed words."""
    if value not in (allowed := tuple(allowed)):
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")


def check_metric(metric: str) -> None:
    """Raises ValueError unless `metric` names a feature distance."""
    check_choice("metric", metric, METRICS)


def resolve_grid(metric: str, grid: tuple[int, int] | None, tokens: int) -> tuple[int, int] | None:
    """Returns the patch grid for a metric: None for "mse", a square grid by default otherwise.

    Raises:
        TypeError: `grid` is not a pair of ints.
        ValueError: the product of `grid` is not the number of tokens (for any metric), or
            `metric` is "spectral", `grid` is None and the number of tokens is not a square.
    """
    if grid is not None:
        pair = isinstance(grid, (tuple, list)) and len(grid) == 2
        if not (pair and all(isinstance(size, numbers.Integral) for size in grid)):
            raise TypeError(f"grid: expected None or a pair of ints (H, W), got {grid!r}")
        height, width = grid
        if height < 1 or width < 1 or height * width != tokens:
            raise ValueError(
                f"grid: ({height}, {width}) has {height * width} cells, but the feature maps have "
                f"{tokens} tokens; expected H >= 1 and W >= 1 with H*W == {tokens}"
            )
        return (height, width) if metric == "spectral" else None
    if metric == "mse":
        return None
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"grid: {tokens} tokens do not form a square; pass grid=(H, W) with H*W == {tokens}, "
            "or patch tokens only if class or other extra tokens are among them"
        )
    return side, side


def check_norm(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    channels: int,
    names: tuple[str, str] = ("norm_weight", "norm_bias"),
    *,
    optional: bool = False,
) -> None:
    """Checks the parameters of a LayerNorm, of shape (channels,).

    Both are required, unless `optional` is set. Then both, only the weight, or neither are allowed.
    """
    if optional and norm_weight is None and norm_bias is not None:
        raise ValueError(f"{names[1]}: given without {names[0]}; pass both or neither")
    for name, x in zip(names, (norm_weight, norm_bias), strict=True):
        if x is not None or not optional:
            check_floating(name, x, (channels,))  # type: ignore[arg-type]
