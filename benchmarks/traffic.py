"""Bytes that kernels move, counted on their PTX as it runs on the CPU, against the floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from featkd.ptx import Counters, run_triton

from .aot import run
from .problem import Case

# by the names of their arguments: sums, statistics and unscaled gradients, which are neither inputs
# nor results of an op
_HELPERS = ("partial", "statistics", "totals", "means")
_UNSCALED = "values"


@dataclass(frozen=True)
class Traffic:
    """A launch's counters, and the bytes of its tensors."""

    name: str
    counters: Counters
    tensors: dict[tuple[int, int], int]
    """Bytes of each tensor that is an input or a result of the op, by place and size."""
    unscaled: frozenset[tuple[int, int]] = frozenset()
    """The tensors that an earlier launch has written for this one to scale."""

    @property
    def moved(self) -> int:
        """Different bytes read, and written: what memory moves if the caches hold the rest."""
        return self.counters.distinct_read_bytes + self.counters.distinct_write_bytes

    @property
    def floor(self) -> int:
        """Every input and result of the launch once."""
        return sum(self.tensors.values())


def count(case: Case, arch: int = 80) -> list[Traffic]:
    """Run a case on the CPU and count each of its launches."""
    found: list[Traffic] = []

    def execute(kernel: Any, grid: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        launch = run_triton(
            kernel, grid, check=False, count=True, time_limit=600, arch=arch, **arguments, **options
        )
        tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        helpers = {k for k in tensors if any(word in k for word in _HELPERS)}
        assert launch.counters is not None
        found.append(
            Traffic(
                name=kernel.fn.__name__,
                counters=launch.counters,
                tensors={
                    (v.data_ptr(), v.nbytes): v.nbytes
                    for k, v in tensors.items()
                    if k not in helpers
                },
                unscaled=frozenset(
                    (v.data_ptr(), v.nbytes) for k, v in tensors.items() if k == _UNSCALED
                ),
            )
        )

    run(case, execute, arch)
    return found


def over_floor(launches: list[Traffic]) -> float:
    """All launches' bytes over the floor of them together."""
    tensors = {key: size for launch in launches for key, size in launch.tensors.items()}
    for launch in launches:
        for key in launch.unscaled:
            tensors.pop(key, None)
    return sum(launch.moved for launch in launches) / sum(tensors.values())
