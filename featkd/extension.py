"""The compiled library of csrc/: loaded when first needed, and why not where it cannot be."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_csrc.so")

_known: dict[Path, str] = {}


def missing() -> str:
    """Load the library; returns why it cannot be used, or ""."""
    if LIBRARY not in _known:
        _known[LIBRARY] = _load()
    return _known[LIBRARY]


def _load() -> str:
    if not LIBRARY.is_file():
        return "csrc is not built: no torch or no C++ compiler was there when featkd was installed"
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded: {error.__cause__ or error}"
    return ""


def has_kernel(op: str, device: str) -> bool:
    """Whether an operator like "featkd::spectrum" is implemented for "cpu" or "cuda" tensors."""
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    key = keys.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


# What `torch.compiler.assume_constant_result` sets, which imports all of the compiler.
for _function in (missing, has_kernel):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]
