"""soft_kd in Triton: one row kernel for the losses (forward) and the gradient (backward).

For each row, with p and s the student's softmax at temperatures 1 and tau, t the teacher's at tau,
and y the labels (one-hot for class indices) ([EM26], SoftKD):

    loss = (1 - alpha) (-sum_k y_k log p_k) + alpha tau^2 sum_k t_k (log t_k - log s_k)
    d loss / d x = (1 - alpha) (p sum_k y_k - y) + alpha tau (s - t)

Both are divided by the batch size. Memory traffic: both logits once each way, and the gradient
once. The backward pass computes the softmaxes again, so nothing is kept. Rows of more than 8,192
classes (4,096 in float64) are read three times, the last two from the cache.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from featkd.kernels import rows
from featkd.kernels.launch import channels_adjacent, launch, triton_type
from featkd.kernels.reduce import add_up
from featkd.runtime.dtypes import accumulation_dtype


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["upstream"])
def soft_kd_rows(
    student,  # (B, K) any floating dtype, classes adjacent
    teacher,  # (B, K) any floating dtype, classes adjacent; None: no KL term
    target,  # (B,) int64, or (B, K) any floating dtype, classes adjacent; None: no CE term
    losses,  # (B,) ACC: each row's share of the loss, or None
    upstream,  # one number, any floating dtype: the loss's gradient, or None
    gradient,  # (B, K) student's dtype, or None
    student_row, teacher_row, target_row, batch,
    ce_weight, kl_weight, per_tau,  # 1 - alpha, alpha tau^2, 1 / tau
    ce_rest, kl_rest, per_tau_rest,  # their rounding errors in float32, or None
    CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SOFT: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    STUDENT_ALIGNED: tl.constexpr, TEACHER_ALIGNED: tl.constexpr, TARGET_ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Maxima of a few rows, then their sums, then their losses or gradients.

    Each step is a sweep over blocks of classes. If one block holds the row, the compiler merges the
    equal loads and exponentials of the sweeps and keeps them in registers.
    """
    BLOCKS: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
    LOWEST: tl.constexpr = float("-inf")
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < batch
    row = row.to(tl.int64)  # an offset in elements may exceed 2^31
    # Triton knows the alignment of strides that 16 divides; rows of 1,000 half-precision numbers
    # begin at multiples of 16 bytes, too
    from_student = tl.multiple_of(row * student_row, STUDENT_ALIGNED)
    from_teacher = tl.multiple_of(row * teacher_row, TEACHER_ALIGNED)
    from_target = tl.multiple_of(row * target_row, TARGET_ALIGNED)
    ce_weight = _full_precision(ce_weight, ce_rest, ACC) / batch.to(ACC)
    kl_weight = _full_precision(kl_weight, kl_rest, ACC) / batch.to(ACC)
    per_tau = _full_precision(per_tau, per_tau_rest, ACC)

    x_top = tl.full((ROWS, BLOCK), LOWEST, ACC)
    z_top = tl.full((ROWS, BLOCK), LOWEST, ACC)
    for k in range(BLOCKS):
        x = rows.load_rows(student, from_student, valid, k, CLASSES, BLOCK, LOWEST)
        x_top = tl.maximum(x_top, x.to(ACC))
        if teacher is not None:
            z = rows.load_rows(teacher, from_teacher, valid, k, CLASSES, BLOCK, LOWEST)
            z_top = tl.maximum(z_top, z.to(ACC))
    x_top = tl.max(x_top, 1)[:, None]
    z_top = tl.max(z_top, 1)[:, None]

    sum_p = tl.zeros((ROWS, BLOCK), ACC)
    sum_s = tl.zeros((ROWS, BLOCK), ACC)
    sum_t = tl.zeros((ROWS, BLOCK), ACC)
    apart = tl.zeros((ROWS, BLOCK), ACC)
    mass = tl.zeros((ROWS, BLOCK), ACC)
    picked = tl.zeros((ROWS, BLOCK), ACC)
    for k in range(BLOCKS):
        x = rows.load_rows(student, from_student, valid, k, CLASSES, BLOCK, LOWEST)
        x = x.to(ACC) - x_top
        if target is not None:
            sum_p += tl.exp(x)
        if teacher is not None:
            z = rows.load_rows(teacher, from_teacher, valid, k, CLASSES, BLOCK, LOWEST)
            z = z.to(ACC) - z_top
            t = _softened_exp(z, per_tau, HAS_TEMPERATURE)
            sum_s += _softened_exp(x, per_tau, HAS_TEMPERATURE)
            sum_t += t
            apart += rows.mask_out_of_bounds(t * (z - x), valid, k, CLASSES, BLOCK)
        if SOFT:
            y = rows.load_rows(target, from_target, valid, k, CLASSES, BLOCK, 0.0).to(ACC)
            mass += y
            picked += rows.mask_out_of_bounds(y * x, valid, k, CLASSES, BLOCK)
    sum_p = tl.sum(sum_p, 1)
    sum_s = tl.sum(sum_s, 1)
    sum_t = tl.sum(sum_t, 1)
    mass = tl.sum(mass, 1)
    picked = tl.sum(picked, 1)
    loss = tl.zeros((ROWS,), ACC)
    if target is not None:
        if not SOFT:
            label = tl.load(target + from_target, mask=valid, other=0)
            known = (label >= 0) & (label < CLASSES)
            mass = tl.where(known, 1.0, float("nan")).to(ACC)
            picked = tl.load(student + from_student + label, mask=valid & known, other=0.0)
            picked = picked.to(ACC) - tl.reshape(x_top, (ROWS,))
        loss += ce_weight * (mass * tl.log(sum_p) - picked)
    if teacher is not None:
        divergence = tl.sum(apart, 1) / sum_t
        if HAS_TEMPERATURE:
            divergence *= per_tau
        loss += kl_weight * (divergence + tl.log(sum_s) - tl.log(sum_t))

    if losses is not None:
        tl.store(losses + row, loss, mask=valid)

    if gradient is not None:
        scale = tl.load(upstream).to(ACC)
        kl_grad = kl_weight * scale
        if HAS_TEMPERATURE:
            kl_grad *= per_tau
        ce_grad = ce_weight * scale
        of_p = (ce_grad * mass / sum_p)[:, None]
        of_s = (kl_grad / sum_s)[:, None]
        of_t = (kl_grad / sum_t)[:, None]
        for k in range(BLOCKS):
            x = rows.load_rows(student, from_student, valid, k, CLASSES, BLOCK, LOWEST)
            x = x.to(ACC) - x_top
            grad = tl.zeros((ROWS, BLOCK), ACC)
            if teacher is not None:
                z = rows.load_rows(teacher, from_teacher, valid, k, CLASSES, BLOCK, LOWEST)
                z = z.to(ACC) - z_top
                grad += _softened_exp(x, per_tau, HAS_TEMPERATURE) * of_s
                grad -= _softened_exp(z, per_tau, HAS_TEMPERATURE) * of_t
            if target is not None:
                if SOFT:
                    y = rows.load_rows(target, from_target, valid, k, CLASSES, BLOCK, 0.0)
                    grad += tl.exp(x) * of_p - ce_grad * y.to(ACC)
                else:
                    here = (k * BLOCK + tl.arange(0, BLOCK))[None, :] == label[:, None]
                    grad += tl.exp(x) * of_p - tl.where(here, ce_grad, 0.0)
            rows.store_rows(gradient, row * CLASSES, valid, grad, k, CLASSES, BLOCK)


@triton.jit
def _full_precision(value, rest, ACC: tl.constexpr):
    """Sum of a float32 argument and its rounding error, (1,) ACC: launches pass float32 alone."""
    value = tl.zeros((1,), ACC) + value
    if rest is not None:
        value += rest
    return value


@triton.jit
def _softened_exp(x, per_tau, HAS_TEMPERATURE: tl.constexpr):
    """exp(x / tau); if tau is 1, the exp(x) of the other softmax, which the compiler reuses."""
    if HAS_TEMPERATURE:
        x = x * per_tau
    return tl.exp(x)


@dataclass(frozen=True)
class Config:
    """Launch sizes: rows per program, classes per block (a power of two), warps."""

    rows: int
    block: int
    num_warps: int


@lru_cache(maxsize=64)
def config(classes: int, acc: torch.dtype) -> Config:
    """Returns one block per row while the registers suffice, several rows per program if short.

    A thread holds 8 to 16 logits of each tensor. Compiled ahead of time, nothing spills; whole rows
    of 16,384 classes with soft labels would.

    Args:
        acc: dtype of the accumulators.
    """
    whole = triton.next_power_of_2(classes)
    block = whole if whole * acc.itemsize <= 4 * 8192 else 2048
    rows_each = max(1, 256 // block)
    return Config(rows_each, block, num_warps=max(1, min(16, rows_each * block // 256)))


def _float32_parts(value: float, acc: torch.dtype) -> tuple[float, float | None]:
    """Rounds `value` to float32; returns its rounding error, too, if `acc` is float64."""
    high = ctypes.c_float(value).value
    return high, value - high if acc == torch.float64 else None


def forward(
    student: Tensor, teacher: Tensor | None, target: Tensor | None, alpha: float, tau: float
) -> Tensor:
    """Returns the loss, a scalar. Tensors whose classes are not adjacent are copied.

    Args:
        student: (B, K).
        teacher: (B, K), or None if alpha is 0.
        target: (B,) int64 or (B, K) floating, or None if alpha is 1. An index outside [0, K) makes
            the loss NaN.
        alpha, tau: as in `featkd.functional.soft_kd`.
    """
    losses = student.new_empty(len(student), dtype=accumulation_dtype(student.dtype))
    loss = losses.new_empty(())
    _launch(student, teacher, target, alpha, tau, losses=losses)
    add_up(None, None, losses, loss)
    return loss


def backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    alpha: float,
    tau: float,
) -> Tensor:
    """Returns the gradient of the student's logits; `upstream` is the loss's gradient, a scalar."""
    gradient = student.new_empty(student.shape)
    _launch(student, teacher, target, alpha, tau, upstream=upstream, gradient=gradient)
    return gradient


def _launch(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    alpha: float,
    tau: float,
    *,
    losses: Tensor | None = None,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    student = channels_adjacent(student)
    teacher = None if teacher is None else channels_adjacent(teacher)
    soft = target is not None and target.dim() == 2
    target = channels_adjacent(target) if target is not None and soft else target
    batch, classes = student.shape
    acc = accumulation_dtype(student.dtype)
    chosen = config(classes, acc)
    strides = [0 if x is None else x.stride(0) for x in (student, teacher, target)]
    ce, kl, per_tau = (_float32_parts(x, acc) for x in (1 - alpha, alpha * tau**2, 1 / tau))
    launch(
        soft_kd_rows,
        (-(-batch // chosen.rows),),
        {
            "student": student,
            "teacher": teacher,
            "target": target,
            "losses": losses,
            "upstream": upstream,
            "gradient": gradient,
            "student_row": strides[0],
            "teacher_row": strides[1],
            "target_row": strides[2],
            "batch": batch,
            "ce_weight": ce[0],
            "kl_weight": kl[0],
            "per_tau": per_tau[0],
            "ce_rest": ce[1],
            "kl_rest": kl[1],
            "per_tau_rest": per_tau[1],
            "CLASSES": classes,
            "ROWS": chosen.rows,
            "BLOCK": chosen.block,
            "SOFT": soft,
            "HAS_TEMPERATURE": tau != 1,
            "STUDENT_ALIGNED": math.gcd(strides[0], 16),
            "TEACHER_ALIGNED": math.gcd(strides[1], 16),
            "TARGET_ALIGNED": math.gcd(strides[2], 16),
            "ACC": triton_type(acc),
        },
        num_warps=chosen.num_warps,
    )
