"""Losses as modules: with a trainable projector, and the published training objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

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
    "FeatureLoss",
    "PooledFeatureKD",
    "PooledMetric",
    "ProjectedFeatureKD",
    "pool_channels",
    "smooth_labels",
]

PooledMetric = Literal["cosine", "mse"]


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

    Examples:
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
        width = getattr(self.proj, "in_features", "Cs")
        checks.check_floating("student", student, ("B", "N", width))
        feature = _project(self.proj, student)
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


class PooledFeatureKD(nn.Module):
    """Distance of a student's pooled features from a teacher's, with a trainable linear projector.

    With p = W s + b and the teacher's pooled feature t: "cosine" is 1 - cos(p, t), "mse" is the
    mean of (p - t)^2 over the channels; both are averaged over the batch, in float32 (float64 for
    a float64 student). The projector's parameters belong to the optimizer.

    Args:
        student_dim: Cs.
        teacher_dim: Ct.
        metric: "cosine" or "mse".

    Examples:
        >>> loss = PooledFeatureKD(192, 384)
        >>> loss(torch.randn(2, 192), torch.randn(2, 384)).shape
        torch.Size([])
    """

    def __init__(
        self, student_dim: int, teacher_dim: int, *, metric: PooledMetric = "cosine"
    ) -> None:
        super().__init__()
        if metric not in get_args(PooledMetric):
            allowed = ", ".join(get_args(PooledMetric))
            raise ValueError(f"metric: expected one of {allowed}; got {metric!r}")
        self.proj = nn.Linear(student_dim, teacher_dim)
        self.metric: PooledMetric = metric

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, Cs), (B, Ct) -> scalar."""
        checks.check_floating("student", student, ("B", getattr(self.proj, "in_features", "Cs")))
        checks.check_not_empty("student", student)
        feature = _project(self.proj, student)
        checks.check_floating("teacher", teacher, feature.shape)
        checks.check_constant("teacher", teacher)
        dtype = accumulation_dtype(student.dtype)
        feature, teacher = feature.to(dtype), teacher.to(dtype)
        if self.metric == "mse":
            return F.mse_loss(feature, teacher)
        return (1 - F.cosine_similarity(feature, teacher, dim=1)).mean()


def _project(proj: nn.Module, x: Tensor) -> Tensor:
    """Calls a projector; a plain linear layer of another dtype is cast to the dtype of `x`."""
    # Modules with hooks, substitutes and sharded weights are called, so that these take effect.
    if type(proj) is nn.Linear and are_plain(proj) and proj.weight.dtype != x.dtype:
        return support.project(x, proj.weight, proj.bias)
    feature: Tensor = proj(x)
    return feature


class FeatureLoss(nn.Module):
    """Mean feature loss over layer pairs, some of them with a trainable projector.

    Without a projector, widths that differ are average-pooled (see `pool_channels`).

    Args:
        metric: "mse" or "spectral", for the pairs without a projector.
        grids: (H, W) of the patch grid of each pair, "spectral" only; None takes square grids.
        projectors: number of a pair -> its loss with projector; it has its own metric and grid.
    """

    def __init__(
        self,
        metric: Metric,
        grids: Sequence[tuple[int, int] | None] | None = None,
        projectors: Mapping[int, ProjectedFeatureKD] | None = None,
    ) -> None:
        super().__init__()
        checks.check_metric(metric)
        self.metric: Metric = metric
        self.grids = grids
        named = {str(number): module for number, module in (projectors or {}).items()}
        self.projectors = nn.ModuleDict(named)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """One (B, N, C) map per layer pair, in the same order -> scalar.

        Raises:
            ValueError: the lists of maps differ in length or are empty, or the token counts of a
                pair differ.
        """
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
            if str(number) in self.projectors:
                terms.append(self.projectors[str(number)](s, t))
                continue
            s, t = pool_channels(s, t)
            terms.append(projected_feature_kd(s, t, metric=self.metric, grid=grid))
        return torch.stack(terms).mean()


class DistillationTerms(NamedTuple):
    """Scalar terms of the loss; call `backward` on `total`, the others are detached."""

    total: Tensor
    logits: Tensor
    """(1 - alpha) CE + alpha tau^2 KL; without labels alpha tau^2 KL."""
    features: Tensor
    """Mean feature loss over the layer pairs, before weighting; 0 without a feature loss."""
    pooled: Tensor
    """Distance of the pooled features, before weighting; 0 without it."""


class DistillationLoss(nn.Module):
    """The published objective: (1 - alpha) CE + beta w_feat L_feat + alpha L_soft ([EM26]).

    L_soft = tau^2 KL(teacher || student); L_feat is the mean over layer pairs. If the widths of a
    pair differ, the wider map is average-pooled over neighbouring channels to the narrower width.
    This baseline does not help the student, which is why Lift and WideLast exist. A distance of
    pooled features, weighted by `pooled`, can be added. Without labels there is no cross-entropy:
    beta w_feat L_feat + alpha L_soft.

    Args:
        alpha: weight of the teacher's logits, from 0 (cross-entropy alone) to 1.
        beta, w_feat: the feature loss is weighted by their product.
        tau: temperature.
        feature: "mse", "spectral", or None for no feature loss.
        label_smoothing: smoothing of integer targets, from 0 to 1.
        grids: (H, W) of the patch grid of each pair, "spectral" only; None takes square grids.
        pooled: weight of the distance of pooled features, which `forward` takes as a scalar.

    Examples:
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
        pooled: float = 0.0,
    ) -> None:
        super().__init__()
        checks.check_fraction("alpha", alpha)
        checks.check_fraction("label_smoothing", label_smoothing)
        checks.check_positive("tau", tau)
        self.alpha = alpha
        self.beta = beta
        self.w_feat = w_feat
        self.tau = tau
        self.label_smoothing = label_smoothing
        self.features = None if feature is None else FeatureLoss(feature, grids)
        self.pooled = pooled

    def forward(
        self,
        student_logits: Tensor | None,
        target: Tensor | None,
        teacher_logits: Tensor | None = None,
        student_features: Sequence[Tensor] = (),
        teacher_features: Sequence[Tensor] = (),
        *,
        feature_loss: Tensor | None = None,
        pooled_loss: Tensor | None = None,
    ) -> DistillationTerms:
        """Computes the loss of one batch.

        Args:
            student_logits: (B, K); None if neither labels nor the teacher's logits are used.
            target: (B,) int64 indices or (B, K) soft labels; None without labels.
            teacher_logits: (B, K), or None if alpha is 0.
            student_features, teacher_features: one (B, N, C) map per layer pair, in the same order.
            feature_loss: L_feat as a scalar instead of the maps, if it is computed elsewhere
                (`featkd.models.Lift.forward_with_loss`, or a `FeatureLoss` with projectors).
            pooled_loss: distance of the pooled features (`PooledFeatureKD`), if it is used.

        Raises:
            ValueError: the lists of maps differ in length or are empty although `feature` is set,
                the token counts of a pair differ, or no term is left: no target, alpha 0, and
                no `feature`.
        """
        logits = self._logits_loss(student_logits, target, teacher_logits)
        weighted = [] if logits is None else [logits]
        if self.features is not None:
            if feature_loss is None:
                feature_loss = self.features(student_features, teacher_features)
            weighted.append(self.beta * self.w_feat * feature_loss)
        if pooled_loss is not None:
            weighted.append(self.pooled * pooled_loss)
        if not weighted:
            raise ValueError("target: None, but alpha is 0 and no features are compared: no loss")
        total = weighted[0]
        for term in weighted[1:]:
            total = total + term
        none = torch.zeros_like(total)
        terms = (logits, feature_loss, pooled_loss)
        return DistillationTerms(total, *(none if x is None else x.detach() for x in terms))

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
        teacher = teacher if self.alpha > 0 else None  # it may have other classes
        return soft_kd(student, teacher, target, alpha=self.alpha, tau=self.tau)


def pool_channels(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the wider of two maps over neighbouring channels to the narrower width.

    Args:
        student: (B, N, Cs). teacher: (B, N, Ct).

    Returns:
        Both maps with min(Cs, Ct) channels. A map that already has that width is returned as is.

    Examples:
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
