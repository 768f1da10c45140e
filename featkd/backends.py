"""Which implementation of an op runs: the choice, and which one ran last.

"auto" takes the Triton kernels for CUDA tensors, the fused CPU path for CPU tensors, and plain
torch (`featkd.reference`) for everything else and for what the other two do not support.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("auto", "triton", "cpu", "reference")

_wanted: str | None = None  # None until first asked for: FEATKD_BACKEND, then "auto"
_last: dict[str, str] = {}
_warned: set[tuple[str, str]] = set()


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def wanted_backend() -> str:
    """The backend asked for: by `use_backend`, else by FEATKD_BACKEND, else "auto"."""
    global _wanted
    if _wanted is None:
        _wanted = _check(os.environ.get("FEATKD_BACKEND", "auto"), "FEATKD_BACKEND")
    return _wanted


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of all ops in this process while the block runs.

    Args:
        name: "auto", "triton", "cpu" or "reference". What the named backend does not support
            still runs on the reference, with one warning that says why.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import featkd, torch
        >>> with featkd.use_backend("reference"):
        ...     loss = featkd.functional.projected_feature_kd(
        ...         torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
        ...     )
        >>> featkd.last_backend("projected_feature_kd")
        'reference'
    """
    global _wanted
    before = wanted_backend()
    _wanted = _check(name, "backend")
    try:
        yield
    finally:
        _wanted = before


def last_backend(op: str) -> str | None:
    """The backend that last ran an op's forward pass in this process; None before the first.

    Args:
        op: an op's name as in `featkd.functional`, for instance "projected_feature_kd".
    """
    return _last.get(op)


def record(op: str, backend: str) -> None:
    """Called by an op's implementation as it runs."""
    _last[op] = backend


def choose(op: str, device: torch.device, unsupported: Callable[[str], str]) -> str:
    """The backend for one call: the one asked for, or the reference where it cannot.

    Args:
        op: the op's name.
        device: where the tensors are.
        unsupported: given "triton" or "cpu", why that one cannot take this call, or "".
    """
    wanted = wanted_backend()
    backend = wanted
    if wanted == "auto":
        backend = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
    if backend == "reference":
        return backend
    why = unsupported(backend)
    if not why:
        return backend
    if (op, why) not in _warned and not torch.compiler.is_compiling():
        _warned.add((op, why))
        warnings.warn(f"featkd.{op} runs on the reference backend: {why}", stacklevel=4)
    return "reference"
