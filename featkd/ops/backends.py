"""The choice of an op's implementation, and a record of which one ran last.

"auto" takes the Triton kernels for CUDA tensors, and plain torch (`featkd.ops.reference`) for all
others and for what the kernels do not support. Forward-mode derivatives and torch.func transforms
take the reference too.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "reference")


class _Chosen(threading.local):
    """What `use_backend` asks for in this thread.

    Not a ContextVar: torch.compile traces reading one only in its newest versions, and setting one
    in none. Set in `__init__`, which every thread calls: a class's attribute that an instance may
    hide is guarded wrongly.
    """

    def __init__(self) -> None:
        self.name: str | None = None


_chosen = _Chosen()
_default: str | None = None  # None until first asked for: FEATKD_BACKEND, then "auto"
_last: dict[str, str] = {}
_warned: set[tuple[str, str]] = set()


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def wanted_backend() -> str:
    """The backend asked for: by this thread's `use_backend`, by FEATKD_BACKEND, or "auto"."""
    global _default
    if _chosen.name is not None:
        return _chosen.name
    if _default is None:
        _default = _check(os.environ.get("FEATKD_BACKEND", "auto"), "FEATKD_BACKEND")
    return _default


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of all ops that this thread calls while the block runs.

    A backward pass runs on its forward pass's backend. Other threads, also those started inside of
    the block, choose for themselves; FEATKD_BACKEND sets the default of all.
    `torch.utils.checkpoint` recomputes in one of autograd's threads: put the block inside of the
    checkpointed function.

    Args:
        name: "auto", "triton" or "reference". A call that the kernels do not support still runs on
            the reference, with one warning that gives the reason.

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
    before = _chosen.name
    _chosen.name = _check(name, "backend")
    try:
        yield
    finally:
        _chosen.name = before


def last_backend(op: str) -> str | None:
    """The backend that last ran an op's forward pass in this process; None before the first.

    Args:
        op: an op's name as in `featkd.functional`, for instance "projected_feature_kd".
    """
    return _last.get(op)


def record(op: str, backend: str) -> None:
    """Called by an op's implementation as it runs."""
    _last[op] = backend


def choose(
    op: str,
    device: torch.device,
    unsupported: Callable[[], str],
    *,
    own: str = "triton",
    devices: Sequence[str] = ("cuda",),
) -> str:
    """Returns the backend of one call: the op's own one, or "reference".

    Args:
        op: the op's name.
        device: the tensors' device.
        unsupported: returns why the op's own backend cannot take this call, or "".
        own: name of the op's own backend.
        devices: kinds of device on which "auto" takes it.
    """
    wanted = wanted_backend()
    if wanted == "reference" or (wanted == "auto" and device.type not in devices):
        return "reference"
    # a custom op's outputs have no tangents, and torch says nothing if no input requires grad
    tangents = forward_ad._current_level >= 0  # of torch.func.jvp too
    why = "forward-mode derivatives" if tangents else unsupported()
    if not why:
        return own
    _warn_once(op, why)
    return "reference"


def _warn_once(op: str, why: str) -> bool:
    if (op, why) not in _warned:
        _warned.add((op, why))
        level, frame = 1, sys._getframe()
        while frame.f_back and frame.f_globals["__name__"].startswith("featkd."):
            level, frame = level + 1, frame.f_back  # to the line of the user's code
        warnings.warn(f"featkd.{op} runs on the reference backend: {why}", stacklevel=level)
    return True


# torch.compile runs it as it traces the call, and puts True in its place: no graph break, and no
# guard on what was warned of. `torch.compiler.assume_constant_result` sets the same, but imports
# all of the compiler.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
