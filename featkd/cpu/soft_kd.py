"""soft_kd on CPU tensors: loss and gradient from one sweep over the rows.

A chunk of rows stays in the cache from its logits to its gradient. At tau 1 both terms share the
student's softmax: four exponentials a class, where autograd takes seven. Equations as in
`featkd.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featkd.reference import accumulation_dtype

# of a chunk: at (128, 1000) 65,536 took 0.63 ms, 131,072 0.49, 262,144 0.50; half as many again
# cost more calls than they spare the cache (two AVX2 cores of 512 KiB L2 each)
_LOGITS = 131_072


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
    batch, classes = student.shape
    losses = torch.zeros(batch, dtype=dtype)
    gradient = torch.empty(student.shape if need_gradient else 0, dtype=student.dtype)
    step = max(1, _LOGITS // classes)
    for part in (slice(i, i + step) for i in range(0, batch, step)):
        x = student[part].to(dtype).contiguous()
        loss = losses[part]
        labels: Tensor | None = None
        share: Tensor | float = 0.0  # of p in the gradient: 1 - alpha times the labels' sum
        if target is not None:
            labels = target[part]
            share = 1 - alpha
            log_p = x.log_softmax(1)
            if labels.dim() == 1:
                loss.sub_(log_p.gather(1, labels[:, None])[:, 0], alpha=1 - alpha)
            else:
                labels = labels.to(dtype).contiguous()
                share = labels.sum(1, keepdim=True).mul_(share)
                loss.sub_((labels * log_p).sum(1), alpha=1 - alpha)
        if teacher is not None:
            log_t = _softened(teacher[part].to(dtype).contiguous(), tau)
            log_s = log_p if target is not None and tau == 1 else _softened(x, tau)
            t = log_t.exp()
            loss.add_(log_t.sub_(log_s).mul_(t).sum(1), alpha=alpha * tau**2)
        if not need_gradient:
            continue
        if teacher is None:
            slope = log_p.exp_().mul_(share)
        elif target is not None and tau == 1:
            slope = log_p.exp_().mul_(alpha + share).sub_(t, alpha=alpha)
        else:
            slope = log_s.exp_().sub_(t).mul_(alpha * tau)
            if target is not None:
                slope.add_(log_p.exp_().mul_(share))
        if labels is not None and labels.dim() == 1:
            slope.scatter_(1, labels[:, None], alpha - 1, reduce="add")
        elif labels is not None:
            slope.sub_(labels, alpha=1 - alpha)
        gradient[part].copy_(slope)
    return losses, gradient


def _softened(x: Tensor, tau: float) -> Tensor:
    """The log-softmax of each row at a temperature."""
    return (x if tau == 1 else x / tau).log_softmax(1)
