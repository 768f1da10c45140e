"""Losses as modules: with a trainable projector, and the published training objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featkd.functional import Metric, projected_feature_kd, soft_kd
from featkd.ops import support
from featkd.ops.plain_modules import are_plain
from featkd.runtime import checks
from featkd.runtime.dtypes import accumulation_dtype

__all__ = [
    "DistillationLoss",
    "DistillationTerms",
    "ProjectedFeatureKD",
    "pool_channels",
    "smooth_labels",
]


class ProjectedFeatureKD(nn.Module):
    """Feature distillation loss with its own trainable linear projector.

    Equation and source as in `featkd.functional.projected_feature_kd`. The projector's parameters
    belong to the optimizer: add `loss.parameters()` to it.

    Args:
        student_dim: Cs.
        teacher_dim: Ct.
        bias: whether the projector has a bias.
        norm: whether a LayerNorm follows it, as in Lift.
        eps: LayerNorm's epsilon.
        metric: "mse" or "spectral".
        grid: (H, W), "spectral" only; None takes a square grid.

    Example:
        >>> loss = ProjectedFeatureKD(192, 384)
        >>> loss(torch.randn(2, 49, 192), torch.randn(2, 49, 384)).shape
        torch.Size([])
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        bias: bool = False,
        norm: bool = True,
        eps: float = 1e-5,
        metric: Metric = "mse",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        checks.check_metric(metric)
        self.proj = nn.Linear(student_dim, teacher_dim, bias=bias)
        self.norm = nn.LayerNorm(teacher_dim, eps=eps) if norm else None
        self.eps = eps
        self.metric: Metric = metric
        self.grid = grid

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, N, Cs), (B, N, Ct) -> scalar."""
        proj = self.proj
        checks.check_floating("student", student, ("B", "N", getattr(proj, "in_features", "Cs")))
        # Modules with hooks, substitutes and sharded weights are called, so that these take effect.
        if type(proj) is nn.Linear and are_plain(proj) and proj.weight.dtype != student.dtype:
            feature = support.project(student, proj.weight, proj.bias)
        else:
            feature = proj(student)
        norm: nn.Module | None = self.norm
        if norm is not None and not (type(norm) is nn.LayerNorm and are_plain(norm)):
            feature, norm = norm(feature), None
        return projected_feature_kd(
            feature,
            teacher,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=self.eps,
            metric=self.metric,
            grid=self.grid,
        )


class DistillationTerms(NamedTuple):
    """Scalar terms of the loss; call `backward` on `total`, the others are detached."""

    total: Tensor
    logits: Tensor
    """(1 - alpha) CE + alpha tau^2 KL; without labels alpha tau^2 KL."""
    features: Tensor
    """Mean feature loss over the layer pairs, before weighting; 0 without a feature loss."""


class DistillationLoss(nn.Module):
    """The published objective: (1 - alpha) CE + beta w_feat L_feat + alpha L_soft ([EM26]).

    L_soft = tau^2 KL(teacher || student); L_feat is the mean over layer pairs. If the widths of a
    pair differ, the wider map is average-pooled over neighbouring channels to the narrower width.
    This baseline does not help the student, which is why Lift and WideLast exist. Without labels
    there is no cross-entropy: beta w_feat L_feat + alpha L_soft.

    Args:
        alpha: weight of the teacher's logits, from 0 (cross-entropy alone) to 1.
        beta, w_feat: the feature loss is weighted by their product.
        tau: temperature.
        feature: "mse", "spectral", or None for no feature loss.
        label_smoothing: smoothing of integer targets, from 0 to 1.
        grids: (H, W) of the patch grid of each pair, "spectral" only; None takes square grids.

    Example:
        >>> loss = DistillationLoss(alpha=0.9, w_feat=0.2, feature="mse")
        >>> maps = [torch.randn(2, 49, 8)]
        >>> loss(torch.randn(2, 5), torch.tensor([0, 4]), torch.randn(2, 5), maps, maps).features
        tensor(0.)
    """

    def __init__(
        self,
        *,
        alpha: float = 0.0,
        beta: float = 1.0,
        w_feat: float = 0.2,
        tau: float = 1.0,
        feature: Metric | None = None,
        label_smoothing: float = 0.0,
        grids: Sequence[tuple[int, int] | None] | None = None,
    ) -> None:
        super().__init__()
        checks.check_fraction("alpha", alpha)
        checks.check_fraction("label_smoothing", label_smoothing)
        checks.check_positive("tau", tau)
        if feature is not None:
            checks.check_metric(feature)
        self.alpha = alpha
        self.beta = beta
        self.w_feat = w_feat
        self.tau = tau
        self.feature = feature
        self.label_smoothing = label_smoothing
        self.grids = grids

    def forward(
        self,
        student_logits: Tensor | None,
        target: Tensor | None,
        teacher_logits: Tensor | None = None,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        *,
        feature_loss: Tensor | None = None,
    ) -> DistillationTerms:
        """Computes the loss of one batch.

        Args:
            student_logits: (B, K); None if neither labels nor the teacher's logits are used.
            target: (B,) int64 indices or (B, K) soft labels; None without labels.
            teacher_logits: (B, K), or None if alpha is 0.
            student_features, teacher_features: one (B, N, C) map per layer pair, in the same order.
            feature_loss: L_feat as a scalar instead of the maps, if the student has computed it
                (`featkd.models.Lift.forward_with_loss`).

        Raises:
            ValueError: the lists of maps differ in length or are empty although `feature` is set,
                the token counts of a pair differ, or no term is left: no target, alpha 0, and
                no `feature`.
        """
        logits = self._logits_loss(student_logits, target, teacher_logits)
        if self.feature is None:
            if logits is None:
                raise ValueError("target: None, and alpha is 0 and feature None: no loss is left")
            return DistillationTerms(logits, logits.detach(), torch.zeros_like(logits))
        features = feature_loss
        if features is None:
            features = self._feature_loss(student_features, teacher_features)
        total = self.beta * self.w_feat * features
        if logits is None:
            return DistillationTerms(total, torch.zeros_like(total), features.detach())
        return DistillationTerms(logits + total, logits.detach(), features.detach())

    def _logits_loss(
        self, student: Tensor | None, target: Tensor | None, teacher: Tensor | None
    ) -> Tensor | None:
        """Computes the terms of the logits; None if there are none."""
        if target is None and self.alpha == 0:
            return None
        if student is None:
            raise ValueError("student_logits: None, but labels or the teacher's logits are used")
        if target is None:
            return self.alpha * soft_kd(student, teacher, None, alpha=1.0, tau=self.tau)
        if self.label_smoothing > 0 and target.dim() == 1:
            target = smooth_labels(target, student.shape[1], self.label_smoothing)
        return soft_kd(student, teacher, target, alpha=self.alpha, tau=self.tau)

    def _feature_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        assert self.feature is not None
        if len(student) != len(teacher) or not student:
            raise ValueError(
                f"student_features, teacher_features: expected the same number of maps, at least "
                f"one; got {len(student)} and {len(teacher)}"
            )
        grids = self.grids or [None] * len(student)
        if len(grids) != len(student):
            raise ValueError(f"grids: {len(grids)} given for {len(student)} layer pairs")
        terms = []
        for number, (s, t, grid) in enumerate(zip(student, teacher, grids, strict=True)):
            if s.shape[:2] != t.shape[:2]:
                raise ValueError(
                    f"layer pair {number}: the student's map is {tuple(s.shape)}, the teacher's "
                    f"{tuple(t.shape)}; images and tokens must agree (same image and patch size)"
                )
            s, t = pool_channels(s, t)
            terms.append(projected_feature_kd(s, t, metric=self.feature, grid=grid))
        return torch.stack(terms).mean()


def pool_channels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the wider of two maps over neighbouring channels to the narrower width.

    Args:
        student: (B, N, Cs). teacher: (B, N, Ct).

    Returns:
        Both maps with min(Cs, Ct) channels. A map that already has that width is returned as is.

    Example:
        >>> s, t = pool_channels(torch.zeros(1, 1, 2), torch.tensor([[[1., 3., 5., 7.]]]))
        >>> t
        tensor([[[2., 6.]]])
    """
    width = min(student.shape[2], teacher.shape[2])
    return _pooled(student, width), _pooled(teacher, width)


def _pooled(x: Tensor, width: int) -> Tensor:
    """Computes `adaptive_avg_pool1d`, by strided sums if all windows have the same size.

    The strided sums avoid the transposed copy that the general form needs on a CPU.
    """
    several, left = divmod(x.shape[2], width)
    if left:
        return F.adaptive_avg_pool1d(x, width)
    if several == 1:
        return x
    dtype = accumulation_dtype(x.dtype)
    total = x[..., ::several].to(dtype)
    for first in range(1, several):
        total = total + x[..., first::several]
    return (total / several).to(x.dtype)


def smooth_labels(target: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) class indices -> (B, classes) float32 soft labels: 1 - s on the class, s / K on all."""
    size, dtype = (len(target), classes), torch.float32
    soft = torch.full(size, smoothing / classes, dtype=dtype, device=target.device)
    return soft.scatter_add_(1, target[:, None], torch.full_like(soft[:, :1], 1 - smoothing))
