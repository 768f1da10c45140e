"""Argument checks: every error names the argument, what came and what is allowed."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

METRICS = ("mse", "spectral")


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_tensor(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")


def check_floating(name: str, x: Tensor, shape: Sequence[int | str] | None = None) -> None:
    """Raise TypeError unless `x` is a real floating-point tensor, ValueError as `check_shape`."""
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if shape is not None:
        check_shape(name, x, shape)


def check_shape(name: str, x: Tensor, expected: Sequence[int | str]) -> None:
    """Raise ValueError unless `x` has the expected shape; a str stands for any size."""
    fits = x.dim() == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, x.shape, strict=True)
    )
    if not fits:
        want = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(x.shape)}")


def check_target(name: str, x: Tensor, batch: int, classes: int) -> None:
    """Check (batch,) class indices or (batch, classes) soft labels, but not their values."""
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
    """Raise ValueError where a mean over `x` would be 0/0."""
    if x.numel() == 0:
        raise ValueError(f"{name}: has no elements (shape {tuple(x.shape)}); the mean is undefined")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError where the given tensors lie on more than one device."""
    places = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")


def check_constant(name: str, x: Tensor) -> None:
    """Raise ValueError where a gradient with respect to `x` would silently be dropped."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires grad, but the loss gives the teacher no gradient; "
            f"run the teacher under torch.no_grad() or pass {name}.detach()"
        )


def check_teacher_map(teacher: Tensor, shape: tuple[int, int, int]) -> None:
    """Check a teacher's map (B, N, Ct): floating, not empty, and without a gradient."""
    check_floating("teacher", teacher, shape)
    check_constant("teacher", teacher)
    check_not_empty("teacher", teacher)


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above zero."""
    _check_number(name, value, "a finite number > 0")
    if not 0 < value < math.inf:  # as torch.compile can trace it of a value that varies
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def check_shares(name: str, values: Iterable[float]) -> None:
    """Raise ValueError unless each of `values` lies in (0, 1]."""
    for value in values:
        check_fraction(name, value)
        if value == 0:
            raise ValueError(f"{name}: expected numbers above 0 and at most 1, got 0")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in [0, 1]."""
    _check_number(name, value, "a number from 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")


def _check_number(name: str, value: object, allowed: str) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {allowed}, got {value!r}")


def check_metric(metric: str) -> None:
    """Raise ValueError unless `metric` names a feature distance."""
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}; got {metric!r}")


def resolve_grid(metric: str, grid: tuple[int, int] | None, tokens: int) -> tuple[int, int] | None:
    """The patch grid that a metric needs: None for "mse", a square one where none is given.

    Raises:
        TypeError: the grid is no pair of ints.
        ValueError: the grid's product is not the number of tokens (whatever the metric), or
            "spectral" gets none and the tokens form no square.
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
            f"grid: {tokens} tokens form no square; pass grid=(H, W) with H*W == {tokens}"
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
    """Check a LayerNorm's parameters of shape (channels,).

    Both are needed, or, where they are optional: none, the weight alone, or both.
    """
    if not optional:
        for name, x in zip(names, (norm_weight, norm_bias), strict=True):
            check_floating(name, x)  # type: ignore[arg-type]
    if norm_weight is None:
        if norm_bias is not None:
            raise ValueError(f"{names[1]}: given without {names[0]}")
        return
    check_floating(names[0], norm_weight, (channels,))
    if norm_bias is not None:
        check_floating(names[1], norm_bias, (channels,))
