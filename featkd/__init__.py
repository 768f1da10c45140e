"""featkd: feature distillation of Vision Transformers, fast and practical.

Implements [EM26] = arXiv 2511.15572 v3, "From Per-Image Low-Rank to Encoding Mismatch:
Rethinking Feature Distillation in Vision Transformers" (ICML 2026).

Importing this package loads nothing heavy: submodules load when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = ("data", "functional", "linalg", "losses", "models", "train")

_BACKENDS = ("last_backend", "use_backend")

__all__ = ["__version__", *_BACKENDS, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _BACKENDS:
        return getattr(importlib.import_module(f"{__name__}.ops.backends"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
