"""The compiled library of csrc/, loaded at the first call that needs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from featkd.ops import backends

LIBRARY = Path(__file__).parent.with_name("_csrc.so")
PROBE = "featkd::spectrum"  # an operator with a kernel for each device that csrc is built for

# pip keeps the wheel that it has built without csrc, unless told not to.
REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir /path/to/featkd"

_DEVICES = ("cpu", "cuda")
_known: dict[Path, str] = {}


def choose(op: str, kernel: str, device: torch.device, unsupported: Callable[[], str]) -> str:
    """Returns the backend of a call of an op in csrc: "cpu", "cuda" or "reference".

    Args:
        op: name of the op, for `backends.last_backend` and the warning about the reference.
        kernel: operator of csrc, for example "featkd::spectrum".
        device: device of the tensors; devices other than CPU and CUDA use the reference.
        unsupported: returns the reason if csrc does not support the call, otherwise "".
    """

    def why_not() -> str:
        if device.type not in _DEVICES:
            return f"csrc has no kernel for tensors on {device.type}"
        why = unsupported() or missing()
        if not why and not has_kernel(kernel, device.type):
            return f"csrc has no {device.type} half"
        return why

    return backends.choose(op, device, why_not, own=device.type, devices=_DEVICES)


def missing() -> str:
    """Loads the library; returns the reason if it cannot be used, otherwise ""."""
    if LIBRARY not in _known:
        _known[LIBRARY] = _load()
    return _known[LIBRARY]


def _load() -> str:
    if not LIBRARY.is_file():
        return (
            "csrc is not built, because torch or a C++ compiler was missing when featkd was "
            "installed. Results are the same, but featkd.linalg and the attention of CaiT teachers "
            f"are slower. With both installed, run: {REBUILD}"
        )
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded: {error.__cause__ or error}"
    return ""


def has_kernel(op: str, device: str) -> bool:
    """Checks whether an operator, such as "featkd::spectrum", is built for "cpu" or "cuda"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, device.upper())


# `torch.compiler.assume_constant_result` sets the same attribute but imports the whole compiler.
for _function in (missing, has_kernel):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]
