"""Every operation's mathematics in plain torch: the oracle of the tests and the slow backend.

Works in any floating dtype and is differentiable by autograd. Half-precision inputs are upcast
to float32 on entry, so that a result here has no rounding but the final one; float64 stays
float64. Arguments are taken as valid: `featkd.functional` checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.factors import LowRank, restore

TIE = 1e-10
"""A share this little below a threshold still reaches it: float64's rounding is less."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def projected_feature_kd(
    student: Tensor,
    teacher: Tensor | LowRank,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    metric: str,
    grid: tuple[int, int] | None,
) -> Tensor:
    """E = LN(S W^T + b) - T, then mean E^2 or its spectral form ([EM26], feature losses)."""
    dtype = accumulation_dtype(student.dtype)
    with _full_precision(student):
        projected = _project(student, weight, bias, norm_weight, norm_bias, eps, dtype)
        difference = projected - _teacher_map(teacher, dtype)
        if metric == "mse":
            return difference.square().mean()
        assert grid is not None
        return spectral_mean_square(difference, grid)


def _teacher_map(teacher: Tensor | LowRank, dtype: torch.dtype) -> Tensor:
    if isinstance(teacher, LowRank):
        return restore(teacher, dtype).detach()
    return teacher.detach().to(dtype)


def spectral_mean_square(difference: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of Re^2 and Im^2 of rfft2(d, norm="ortho") over the patch grid, without an FFT.

    For real rows of W values the half spectrum's energy is, by Parseval, half of the full
    spectrum's plus half of what the columns w = 0 (and, W even, w = W/2) hold, since those two
    are their own mirror images. Their sums over h are the energies of the row sums and of the
    alternating row sums:

        sum |rfft2(d)|^2 = 1/2 (sum d^2 + 1/W sum_h (sum_w d)^2
                                + [W even] 1/W sum_h (sum_w (-1)^w d)^2)

    Args:
        difference: (B, H*W, C), any floating dtype.
        grid: (H, W), the patch grid in row-major order.

    Returns:
        A scalar in `difference`'s dtype.
    """
    height, width = grid
    batch, _, channels = difference.shape
    rows = difference.reshape(batch, height, width, channels)
    energy = rows.square().sum() + rows.sum(2).square().sum() / width
    if width % 2 == 0:
        alternating = rows[:, :, 0::2].sum(2) - rows[:, :, 1::2].sum(2)
        energy = energy + alternating.square().sum() / width
    return 0.5 * energy / (batch * channels * height * (width // 2 + 1) * 2)


def widelast_projection(
    x: Tensor,
    weight: Tensor,
    proj_norm_weight: Tensor,
    proj_norm_bias: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """r = LN_p(x W^T), u = LN_1(r): the entry of a block that is wider than the one before."""
    dtype = accumulation_dtype(x.dtype)
    with _full_precision(x):
        residual = _project(x, weight, None, proj_norm_weight, proj_norm_bias, eps, dtype)
        normed = _layer_norm(residual, norm1_weight, norm1_bias, eps)
    return residual.to(x.dtype), normed.to(x.dtype)


def lift_head(
    features: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    teacher: Tensor | LowRank | None,
    *,
    eps: float,
    metric: str,
    grid: tuple[int, int] | None,
) -> tuple[Tensor, Tensor | None]:
    """z = LN(f W^T); the mean of z over the tokens, and z's distance from the teacher's map."""
    dtype = accumulation_dtype(features.dtype)
    with _full_precision(features):
        lifted = _project(features, weight, None, norm_weight, norm_bias, eps, dtype)
    pooled = lifted.mean(1).to(features.dtype)
    if teacher is None:
        return pooled, None
    loss = projected_feature_kd(
        lifted, teacher, None, None, None, None, eps=eps, metric=metric, grid=grid
    )
    return pooled, loss


def soft_kd(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    *,
    alpha: float,
    tau: float,
) -> Tensor:
    """(1 - alpha) CE(student, target) + alpha tau^2 KL(teacher || student), batch means."""
    dtype = accumulation_dtype(student_logits.dtype)
    with _full_precision(student_logits):
        student = student_logits.to(dtype)
        loss = torch.zeros((), dtype=dtype, device=student.device)
        # A term of weight zero is left out, not multiplied by zero: 0 * inf would be NaN.
        if alpha != 1:
            log_p = student.log_softmax(1)
            if target.dim() == 1:
                picked = log_p.gather(1, target[:, None])
            else:
                picked = (target.to(dtype) * log_p).sum(1)
            loss = loss - (1 - alpha) * picked.mean()
        if alpha != 0:
            assert teacher_logits is not None
            log_s = (student / tau).log_softmax(1)
            log_t = (teacher_logits.detach().to(dtype) / tau).log_softmax(1)
            divergence = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
            loss = loss + alpha * tau**2 * divergence
        return loss


def talking_heads_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    *,
    scale: float,
) -> Tensor:
    """O = post(softmax_k(pre(Q K^T scale))) V; pre and post mix the heads [THA20]."""
    dtype = accumulation_dtype(query.dtype)
    with _full_precision(query):
        scores = (query.to(dtype) * scale) @ key.to(dtype).mT
        shares = _mix_heads(scores, pre_weight, pre_bias).softmax(-1)
        mixed = _mix_heads(shares, post_weight, post_bias) @ value.to(dtype)
    return mixed.transpose(1, 2).to(query.dtype).contiguous().transpose(1, 2)


def _mix_heads(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sum_h weight_gh maps_h + bias_g of (B, heads, ...) maps."""
    mixed = (weight.to(maps.dtype) @ maps.flatten(2)).view(maps.shape)
    return mixed + bias.to(maps.dtype)[:, None, None]


def first_reaching(curve: Tensor, levels: Tensor, tie: float = TIE) -> Tensor:
    """The first index, from 1, at which a rising curve reaches each level.

    Args:
        curve: (..., n), ascending.
        levels: (T,), of the curve's dtype.
        tie: a value this close below a level reaches it.

    Returns:
        (..., T) int64; n where a level is not reached.
    """
    below = (curve[..., None] < levels - tie).sum(-2)
    return (below + 1).clamp(max=curve.shape[-1])


def set_bad_aside(x: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices without their NaN and Inf, for one of which LAPACK refuses the whole batch.

    Args:
        x: (..., N, D), floating.

    Returns:
        x with zeros for NaN and Inf, and (...) factors of the results: NaN for the matrices that
        held any and 1, which changes no bit, for the others. With factors the gradients of the
        former are NaN too, where a choice by torch.where would make zeros of them.
    """
    finite = x.detach().isfinite().all(-1).all(-1)
    return x.nan_to_num(0, 0, 0), torch.where(finite, 1.0, float("nan")).to(x.dtype)


def spectrum(x: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, ...]:
    """Singular values, energies and ranks by torch.linalg.svdvals in float64.

    Args:
        x: (..., N, D).
        thresholds: T shares of the energy.

    Returns:
        The fields of `featkd.linalg.Spectrum`, n = min(N, D): values (..., n), curve (..., n),
        ranks (..., T), info, residual and resolved (...). The values alone have a gradient.
    """
    dtype = accumulation_dtype(x.dtype)
    wide, factor = set_bad_aside(x.double())
    finite = factor == 1
    each = finite[..., None]
    empty = wide.numel() == 0
    largest = finite.double() if empty else wide.detach().abs().amax((-2, -1))
    scale = torch.where(largest > 0, largest, 1)[..., None]
    values = torch.linalg.svdvals(wide / scale[..., None])
    energy = values.detach().square()
    total = energy.sum(-1, keepdim=True)
    curve = (energy.cumsum(-1) / torch.where(total > 0, total, 1)).clamp(max=1)
    levels = curve.new_tensor(list(thresholds))
    ranks = torch.where(each, torch.where(total > 0, first_reaching(curve, levels), 0), -1)
    norm2 = (wide.detach() / scale[..., None]).square().sum((-2, -1))
    residual = torch.where(norm2 > 0, (total[..., 0] / norm2 - 1).abs(), 0)
    nan = float("nan")
    return (
        (values * scale * factor[..., None]).to(dtype),
        torch.where(each, curve, nan).to(dtype),
        ranks,
        (~finite).int(),
        torch.where(finite, residual, nan),
        torch.zeros_like(finite, dtype=torch.int32),
    )


def _project(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LN(x W^T + b) in `dtype`; either step is left out where it has no parameters."""
    x = x.to(dtype)
    if weight is not None:
        x = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if norm_weight is not None:
        x = _layer_norm(x, norm_weight, norm_bias, eps)
    return x


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off where x's device has it (the meta device has not)."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(
        x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps
    )
