"""The ops in plain torch: for CPU tensors, exported graphs, and calls that no kernel supports.

The functions accept any floating dtype and are differentiable by autograd. They convert the output
of a linear layer to float32 (float64 stays float64), so that only the result is rounded.
`featkd.functional` checks the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.runtime.dtypes import accumulation_dtype

TIE = 1e-10
"""Tolerance below a threshold: a share this close reaches it. Rounding in float64 is smaller."""


def feature_distance(
    feature: Tensor,
    teacher: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    grid: tuple[int, int] | None,
    pooled_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Distance of Y = LN(feature) from the teacher's map, and the mean of Y over the tokens.

    The distance is the mean of (Y - T)^2 or, with a grid, its spectral form ([EM26], feature
    losses). Arguments and results are those of `featkd.ops.feature_distance`.
    """
    dtype = accumulation_dtype(feature.dtype)
    output = feature.to(dtype)
    if norm_weight is not None:
        output = _layer_norm(output, norm_weight, norm_bias, eps)
    loss = None
    if teacher is not None:
        target = teacher.detach().to(dtype)
        if grid is None:
            loss = F.mse_loss(output, target)
        else:
            loss = spectral_mean_square(output - target, grid)
    pooled = None if pooled_dtype is None else output.mean(1).to(pooled_dtype)
    return loss, pooled


def spectral_mean_square(difference: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of Re^2 and Im^2 of rfft2(d, norm="ortho") over the patch grid, without an FFT.

    By Parseval, the energy of the half spectrum of real rows of W values is half the energy of the
    full spectrum, plus half the energy of the columns w = 0 and, if W is even, w = W/2, which are
    their own mirror images. The energies of these columns, summed over h, are the energies of the
    row sums and of the alternating row sums:

        sum |rfft2(d)|^2 = 1/2 (sum d^2 + 1/W sum_h (sum_w d)^2
                                + [W even] 1/W sum_h (sum_w (-1)^w d)^2)

    If W is even, the last two terms are 2/W times the energies of the sums over even w and over odd
    w, which take one pass.

    Args:
        difference: (B, H*W, C), any floating dtype.
        grid: (H, W), the patch grid in row-major order.

    Returns:
        Scalar in the dtype of `difference`.
    """
    height, width = grid
    batch, _, channels = difference.shape
    parities = 1 if width % 2 else 2
    rows = difference.reshape(batch, height, width // parities, parities, channels)
    energy = difference.square().sum() + parities / width * rows.sum(2).square().sum()
    return 0.5 * energy / (batch * channels * height * (width // 2 + 1) * 2)


def two_layer_norms(
    h: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """r = LN_p(h), u = LN_1(r); arguments and results of `featkd.ops.two_layer_norms`."""
    gamma_p, beta_p, gamma_1, beta_1 = parameters
    residual = _layer_norm(h.to(accumulation_dtype(h.dtype)), gamma_p, beta_p, eps)
    normed = _layer_norm(residual, gamma_1, beta_1, eps)
    return residual.to(residual_dtype), normed.to(h.dtype)


def soft_kd(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor | None,
    *,
    alpha: float,
    tau: float,
) -> Tensor:
    """(1 - alpha) CE(student, target) + alpha tau^2 KL(teacher || student), batch means."""
    dtype = accumulation_dtype(student_logits.dtype)
    student = student_logits.to(dtype)
    log_p = student.log_softmax(1) if alpha != 1 or tau == 1 else None
    terms = []
    # terms of weight zero are omitted, not multiplied by zero: 0 * inf would be NaN
    if alpha != 1:
        assert log_p is not None
        assert target is not None
        if target.dim() == 1:  # F.nll_loss would ignore an index of -100
            picked = log_p.gather(1, target[:, None])
        else:
            picked = (target.to(dtype) * log_p).sum(1)
        terms.append(-(1 - alpha) * picked.mean())
    if alpha != 0:
        assert teacher_logits is not None
        log_s = log_p if log_p is not None and tau == 1 else (student / tau).log_softmax(1)
        log_t = (teacher_logits.detach().to(dtype) / tau).log_softmax(1)
        divergence = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
        terms.append(alpha * tau**2 * divergence)
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


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
    kind = query.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        scores = (query.to(dtype) * scale) @ key.to(dtype).mT
        shares = _mix_heads(scores, pre_weight, pre_bias).softmax(-1)
        mixed = _mix_heads(shares, post_weight, post_bias) @ value.to(dtype)
    return mixed.transpose(1, 2).to(query.dtype).contiguous().transpose(1, 2)


def _mix_heads(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes sum_h weight_gh maps_h + bias_g for maps (B, heads, ...)."""
    mixed = (weight.to(maps.dtype) @ maps.flatten(2)).view(maps.shape)
    return mixed + bias.to(maps.dtype)[:, None, None]


def first_reaching(curve: Tensor, levels: Tensor, tie: float = TIE) -> Tensor:
    """Returns the first index, from 1, at which a rising curve reaches each level.

    Args:
        curve: (..., n), ascending.
        levels: (T,), in the dtype of the curve.
        tie: values this close below a level reach it.

    Returns:
        (..., T) int64; n for a level that is not reached.
    """
    below = (curve[..., None] < levels - tie).sum(-2)
    return (below + 1).clamp(max=curve.shape[-1])


def set_bad_aside(x: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces NaN and Inf by zeros: LAPACK refuses a batch that contains any.

    Args:
        x: (..., N, D), floating.

    Returns:
        The matrices, and factors (...) for their results: NaN for a matrix that held NaN or Inf,
        otherwise 1, which changes no bit. The factors make the gradients of bad matrices NaN, too;
        torch.where would make them zero.
    """
    finite = x.detach().isfinite().all(-1).all(-1)
    return x.nan_to_num(0, 0, 0), torch.where(finite, 1.0, float("nan")).to(x.dtype)


def spectrum(x: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, ...]:
    """Computes singular values, energies and ranks with torch.linalg.svdvals in float64.

    Args:
        x: (..., N, D).
        thresholds: T shares of the energy.

    Returns:
        The fields of `featkd.linalg.Spectrum` with n = min(N, D): values (..., n), curve (..., n),
        ranks (..., T), and info, residual and resolved (...). Only the values have a gradient.
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


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(
        x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps
    )
