"""Sums that come out the same bit for bit in any order: whole multiples of one quantum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_MOST = 2**62  # half of int64's range


class FixedPointSum:
    """A sum of tensors in int64 multiples of a power of two.

    Integer addition is exact and has no order, so that one process, four of them and a run that
    was killed and resumed have the same sum. A floating-point sum depends on how it is split.

    Args:
        shape: of what is added.
        quantum: the unit, a power of two; each addition errs by at most half of it.

    Example:
        >>> total = FixedPointSum((), quantum=2.0**-40)
        >>> for value in (0.1, 0.2, 0.3):
        ...     total.add(torch.tensor(value, dtype=torch.float64))
        >>> round(total.value().item(), 11)
        0.6
    """

    def __init__(self, shape: tuple[int, ...], quantum: float) -> None:
        if not (0 < quantum < math.inf and math.frexp(quantum)[0] == 0.5):
            raise ValueError(f"quantum: expected a power of two, got {quantum!r}")
        self.quantum = quantum
        self._sum = torch.zeros(shape, dtype=torch.int64)
        self._bound = 0  # no entry's magnitude is above it

    def add(self, value: Tensor) -> None:
        """Add a float64 tensor of this sum's shape.

        Raises:
            ValueError: it holds NaN or Inf.
            OverflowError: the sum would leave int64's range.
        """
        steps = (value.detach() / self.quantum).round()
        largest = steps.abs().max().item() if steps.numel() else 0.0
        if not math.isfinite(largest):
            raise ValueError("value: holds NaN or Inf, which no sum can take")
        self._grow(int(largest))
        self._sum = self._sum.to(steps.device) + steps.to(torch.int64)

    def merge(self, other: FixedPointSum) -> None:
        """Add another sum of the same quantum and shape."""
        if (other.quantum, other._sum.shape) != (self.quantum, self._sum.shape):
            raise ValueError(
                f"other: expected quantum {self.quantum} and shape {tuple(self._sum.shape)}, got "
                f"{other.quantum} and {tuple(other._sum.shape)}"
            )
        self._grow(other._bound)
        self._sum = self._sum + other._sum.to(self._sum.device)

    def value(self) -> Tensor:
        """The sum in float64."""
        return self._sum.double() * self.quantum

    def state_dict(self) -> dict[str, Any]:
        return {"quantum": self.quantum, "sum": self._sum.cpu(), "bound": self._bound}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> FixedPointSum:
        made = cls(tuple(state["sum"].shape), state["quantum"])
        made._sum, made._bound = state["sum"], state["bound"]
        return made

    def _grow(self, by: int) -> None:
        if self._bound + by > _MOST:
            raise OverflowError(
                f"sum: {self._bound + by} quanta of {self.quantum:g} are more than {_MOST}; the "
                "values grew far beyond those that the quantum was chosen for"
            )
        self._bound += by


def quantum_for(largest: float, bits: int) -> float:
    """The power of two that is `bits` bits below `largest` (which may be 0)."""
    return math.ldexp(1.0, math.frexp(largest if largest > 0 else 1.0)[1] - bits)
