"""Process of a part: python -m benchmarks.gpu.part MODULE:FUNCTION DEVICE SHARD SHARDS FILE."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .recorder import Recorder


def main(words: Sequence[str]) -> int:
    """Runs the items of a shard."""
    name, kind, shard, shards, file = words
    import torch

    # imported here: a part needs only the packages that it uses
    work = pkgutil.resolve_name(f"{__package__}.{name}")
    work(Recorder(Path(file)), torch.device(kind), int(shard), int(shards))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
