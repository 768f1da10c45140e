"""Sums that are bitwise equal in any order: integer multiples of fixed units."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from featkd.diagnostics.accumulator import Accumulator

_BITS = 40  # between two units; an int64 word then has room for 2^21 additions
_MOST = 2**62
_LOWEST = -960  # exponent of the smallest unit


class ExactSum(Accumulator):
    """Sum of tensors in int64 words, whose units are 2^(40 k).

    Each addend is split into multiples of the unit below its largest entry and of the next one;
    the rest is below 2^-40 of that entry. The split depends on the addend alone, and integer
    addition is exact. The sum is therefore the same on one process, on four, and in a run that was
    killed and resumed, unlike a floating-point sum.

    Examples:
        >>> total = ExactSum()
        >>> for value in (0.1, 0.2, 0.3, 1e30, -1e30):
        ...     total.add(torch.tensor(value, dtype=torch.float64))
        >>> round(total.value().item(), 11)
        0.6
    """

    _parts = ("_words", "_bounds")

    def __init__(self) -> None:
        self._words: dict[int, Tensor] = {}  # by the exponent of the unit
        self._bounds: dict[int, int] = {}  # upper bounds on the words' entries

    def add(self, value: Tensor) -> None:
        """Adds a float64 tensor; all have one shape.

        Raises:
            ValueError: it holds NaN or Inf, or its shape differs.
            OverflowError: more additions than the sum has room for, which is at least 2^21.
        """
        rest = value.detach()
        self._keep_shape("value", tuple(rest.shape))
        largest = rest.abs().max().item() if rest.numel() else 0.0
        if not math.isfinite(largest):
            raise ValueError("value: holds NaN or Inf, which an exact sum cannot represent")
        if largest == 0:
            return
        top = max(_LOWEST + _BITS, math.frexp(largest)[1] // _BITS * _BITS)
        for exponent in (top, top - _BITS):
            steps = (rest * 2.0**-exponent).round()
            rest = rest - steps * 2.0**exponent
            self._add_word(exponent, steps.to(torch.int64), 2 ** (_BITS + 1))

    def merge(self, other: ExactSum) -> None:
        """Adds another sum of the same shape."""
        super().merge(other)
        for exponent, word in other._words.items():
            self._add_word(exponent, word, other._bounds[exponent])

    def value(self) -> Tensor:
        """The sum in float64, on the CPU."""
        total = torch.zeros(self._shape or (), dtype=torch.float64)
        for exponent in sorted(self._words):  # smallest units first
            total += self._words[exponent].cpu().double() * 2.0**exponent
        return total

    def state_dict(self) -> dict[str, Any]:
        words = {exponent: word.cpu() for exponent, word in self._words.items()}
        return {**super().state_dict(), "words": words, "bounds": dict(self._bounds)}

    def _add_word(self, exponent: int, steps: Tensor, bound: int) -> None:
        before = self._bounds.get(exponent, 0)
        if before + bound > _MOST:
            raise OverflowError("sum: an exact sum has room for 2^21 additions, got more")
        self._bounds[exponent] = before + bound
        word = self._words.get(exponent)
        self._words[exponent] = steps if word is None else word.to(steps.device) + steps
