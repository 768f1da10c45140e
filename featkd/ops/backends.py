"""Choice of the implementation of each op, and a record of the last one that ran.

"auto" uses the Triton kernels for CUDA tensors. All other tensors, and calls that the kernels do
not support, use plain torch (`featkd.ops.reference`). So do forward-mode derivatives and torch.func
transforms.
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
    """Backend requested by `use_backend` in this thread; None outside its blocks.

    Not a ContextVar: only the newest versions of torch.compile trace reads of one, and none trace
    writes. `__init__`, which runs in each thread, sets the attribute: torch.compile places a wrong
    guard on a class attribute that an instance attribute may hide.
    """

    def __init__(self) -> None:
        self.name: str | None = None


class _Last:
    """Backend of the last call of each op, as attributes.

    torch.compile guards the keys of a dict that is written to, and would compile the second call
    again.
    """


_chosen = _Chosen()
# Not read at the first call, which torch.compile would guard and compile the second call again.
_default = os.environ.get("FEATKD_BACKEND", "auto")
_last = _Last()
_warned: set[tuple[str, str]] = set()


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}; got {name!r}")
    return name


def wanted_backend() -> str:
    """Returns the backend requested by `use_backend` in this thread or by FEATKD_BACKEND."""
    return _check(_default, "FEATKD_BACKEND") if _chosen.name is None else _chosen.name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Sets the backend of all ops that this thread calls while the block runs.

    A backward pass runs on the backend of its forward pass. The block does not affect other
    threads, not even threads started inside it; FEATKD_BACKEND sets the default for all threads.
    `torch.utils.checkpoint` recomputes in a thread of autograd: put the block inside the
    checkpointed function.

    Args:
        name: "auto", "triton" or "reference". A call that the kernels do not support runs on the
            reference, and one warning gives the reason.

    Raises:
        ValueError: unknown name.

    Examples:
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
    """Returns the backend of the last forward pass of an op in this process; None before it.

    Args:
        op: name of the op in `featkd.functional`, for example "projected_feature_kd".
    """
    last: str | None = vars(_last).get(op)
    return last


def record(op: str, backend: str) -> None:
    """Records the backend that runs an op; called by the ops."""
    setattr(_last, op, backend)


def choose(
    op: str,
    device: torch.device,
    unsupported: Callable[[], str],
    *,
    own: str = "triton",
    devices: Sequence[str] = ("cuda",),
) -> str:
    """Returns the backend of a call: `own` or "reference".

    Args:
        op: name of the op.
        device: device of the tensors.
        unsupported: returns the reason if `own` does not support the call, otherwise "".
        own: name of the op's own backend.
        devices: device types on which "auto" uses `own`.
    """
    wanted = wanted_backend()
    if wanted == "reference" or (wanted == "auto" and device.type not in devices):
        return "reference"
    # the outputs of a custom op have no tangents; torch does not complain if no input requires grad
    tangents = forward_ad._current_level >= 0  # also in torch.func.jvp
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
            level, frame = level + 1, frame.f_back  # up to the user's code
        warnings.warn(f"featkd.{op} runs on the reference backend: {why}", stacklevel=level)
    return True


# torch.compile runs the function while it traces and inserts the result, True: there is no graph
# break and no guard on `_warned`. `torch.compiler.assume_constant_result` sets the same attribute
# but imports the whole compiler.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
