"""soft_kd on CPU tensors: loss and gradient from one sweep over the rows.

A row stays in the cache from its logits to its gradient. At tau 1 both terms share the student's
softmax: two exponentials a class, where autograd takes seven. Equations as in `featkd.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featkd.cpu.rows import soft_kd
from featkd.reference import accumulation_dtype


def sweep(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    *,
    alpha: float,
    tau: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """One pass over the rows.

    Args:
        student: (B, K), any strides.
        teacher: (B, K), any strides; None where alpha is 0.
        target: (B,) int64 or (B, K) floating, any strides; None where alpha is 1.
        alpha, tau: as in `featkd.functional.soft_kd`.
        need_gradient: form the student's gradient.

    Returns:
        The rows' losses (B,), in the accumulators' dtype, and the gradient of their sum (B, K), in
        the student's; the latter is empty where not needed.

    Raises:
        RuntimeError: a class index outside of [0, K).
    """
    dtype = accumulation_dtype(student.dtype)
    losses = torch.empty(len(student), dtype=dtype)
    gradient = torch.empty(student.shape if need_gradient else 0, dtype=student.dtype)
    slope = gradient if need_gradient else None
    soft_kd(student, teacher, target, alpha, tau, losses, slope)
    return losses, gradient
