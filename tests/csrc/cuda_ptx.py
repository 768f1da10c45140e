"""nvcc's PTX of the spectrum kernels, launched on the CPU with checks on."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from featkd.benchmarks import csrc_counts
from featkd.benchmarks.csrc_counts import Results
from featkd.ptx import Emulator
from tests.spectra import THRESHOLDS

_MARK = r"// featkd barrier (\d+)\n"


def with_switches(ptx: str, kernel: str) -> str:
    """The same PTX, whose barriers of the number in the argument `only_resolved` do nothing."""
    scope = (
        "{{ .reg .pred %kept; .reg .b32 %dropped;\n"
        f"ld.param.u32 %dropped, [{kernel}_param_17];\n"
        "setp.ne.s32 %kept, %dropped, {number};\n"
        "@%kept bar.sync \t0; }}"
    )

    def switched(found: re.Match[str]) -> str:
        return found[1] + scope.format(number=found[2])

    return re.sub(rf"({_MARK}(?:(?!bar\.sync).)*?)bar\.sync \t0;", switched, ptx, flags=re.S)


def barriers(ptx: str) -> set[int]:
    return {int(number) for number in re.findall(_MARK, ptx)}


def solve(
    emulator: Emulator,
    x: np.ndarray,
    real: type[np.floating[Any]],
    *,
    blocks: int = 2,
    seed: int = 1,
    dropped: int = 0,
    **options: Any,
) -> Results:
    """As `csrc_counts.launch`, with outputs poisoned before; `dropped` is for `with_switches`."""
    outputs = [9, 10, 13, 14, 15, *([16] if dropped == 0 else [])]
    options |= {"outputs": outputs, "seed": seed, "blocks": blocks, "only_resolved": dropped}
    return csrc_counts.launch(emulator, x, real, THRESHOLDS, **options)
