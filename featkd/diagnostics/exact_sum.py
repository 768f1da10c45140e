"""Sums that come out the same bit for bit in any order: whole multiples of fixed units."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_BITS = 40  # between one unit and the next; a word holds 2^21 additions beside them
_MOST = 2**62
_LOWEST = -960  # exponent of the smallest unit


class ExactSum:
    """A sum of tensors in words of int64, whose units are 2^(40 k).

    Each addend is split into multiples of the unit below its largest entry and of the next one,
    which leaves less than 2^-40 of that entry; the split depends on the addend alone, and integer
    addition is exact and has no order. So one process, four of them and a run that was killed and
    resumed have the same sum; a floating-point sum depends on how it is split.

    Args:
        shape: of what is added.

    Example:
        >>> total = ExactSum(())
        >>> for value in (0.1, 0.2, 0.3, 1e30, -1e30):
        ...     total.add(torch.tensor(value, dtype=torch.float64))
        >>> round(total.value().item(), 11)
        0.6
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._words: dict[int, Tensor] = {}  # by the exponent of the unit
        self._bounds: dict[int, int] = {}  # no entry of the word is larger

    def add(self, value: Tensor) -> None:
        """Add a float64 tensor of this sum's shape.

        Raises:
            ValueError: it holds NaN or Inf.
            OverflowError: after 2^21 additions, at the least.
        """
        rest = value.detach()
        largest = rest.abs().max().item() if rest.numel() else 0.0
        if not math.isfinite(largest):
            raise ValueError("value: holds NaN or Inf, which no sum can take")
        if largest == 0:
            return
        top = max(_LOWEST + _BITS, math.frexp(largest)[1] // _BITS * _BITS)
        for exponent in (top, top - _BITS):
            steps = (rest * 2.0**-exponent).round()
            rest = rest - steps * 2.0**exponent
            self._put(exponent, steps.to(torch.int64), 2 ** (_BITS + 1))

    def merge(self, other: ExactSum) -> None:
        """Add another sum of the same shape."""
        if other.shape != self.shape:
            raise ValueError(f"other: expected shape {self.shape}, got {other.shape}")
        for exponent, word in other._words.items():
            self._put(exponent, word, other._bounds[exponent])

    def value(self) -> Tensor:
        """The sum in float64, on the CPU."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for exponent in sorted(self._words):  # the small ones first
            total += self._words[exponent].cpu().double() * 2.0**exponent
        return total

    def state_dict(self) -> dict[str, Any]:
        words = {exponent: word.cpu() for exponent, word in self._words.items()}
        return {"shape": self.shape, "words": words, "bounds": dict(self._bounds)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ExactSum:
        made = cls(tuple(state["shape"]))
        made._words, made._bounds = dict(state["words"]), dict(state["bounds"])
        return made

    def _put(self, exponent: int, steps: Tensor, bound: int) -> None:
        before = self._bounds.get(exponent, 0)
        if before + bound > _MOST:
            raise OverflowError("sum: more additions than the 2^21 that an exact sum has room for")
        self._bounds[exponent] = before + bound
        word = self._words.get(exponent)
        self._words[exponent] = steps if word is None else word.to(steps.device) + steps
