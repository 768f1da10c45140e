"""Process of a part: python -m benchmarks.gpu.part NAME DEVICE SHARD SHARDS FILE."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .recorder import Recorder

# part -> module and function, imported in `main`: a part needs only the packages that it uses
PARTS = {
    "ops": ("checks", "ops"),
    "compiled": ("checks", "compiled"),
    "large": ("checks", "large"),
    "linalg": ("checks", "linalg"),
    "updates": ("training", "updates"),
    "tools": ("training", "tools"),
    "sanitizer": ("sanitizer", "checks"),
    "warm": ("speed", "warm"),
    "speed": ("speed", "ops"),
    "launches": ("launches", "kernels"),
}


def main(words: Sequence[str]) -> int:
    """Runs the items of a shard."""
    name, kind, shard, shards, file = words
    import torch

    module, function = PARTS[name]
    work = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    work(Recorder(Path(file)), torch.device(kind), int(shard), int(shards))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
