"""What a narrower student can reach of a teacher's maps: limits of linear projectors.

The limits are of energy over all images, token by token, under squared error: the best that a
projector can do where the student could put any numbers it likes into its channels. They say
nothing of what training finds, nor of accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featkd.diagnostics.source import Layer
from featkd.diagnostics.stream import LayerResult


@dataclass(frozen=True)
class Reach:
    """Shares of the energy of one teacher layer, for a student of r channels.

    Attributes:
        teacher: the layer.
        channels, teacher_channels: r, and the teacher's D.
        pooled: without a projector, where the teacher's map is pooled to r channels.
        shared: one linear projector for all images, r to D: the r leading axes of the data set's
            PCA.
        shared_with_bias: the same with a bias, which holds the mean token. Lift's map is behind a
            LayerNorm with a bias, so this bounds it, and any projector that is dropped later.
        per_image: what r channels would hold if each image had a projector of its own.
        per_image_gaussian: the same of Gaussian maps: what few tokens alone make easy.
    """

    teacher: Layer
    channels: int
    teacher_channels: int
    pooled: float
    shared: float
    shared_with_bias: float
    per_image: float
    per_image_gaussian: float


def reach(teacher: Layer, result: LayerResult, channels: int) -> Reach:
    """The limits for a student of `channels` channels on a teacher's layer.

    Args:
        teacher: the layer.
        result: its figures, from an uncentred PCA.
        channels: r.
    """
    pca = result.pca
    if pca.centred:
        raise ValueError("result: expected an uncentred PCA, got a centred one")
    d = result.channels
    values, vectors = pca.eigenvalues, pca.vectors
    total = float(values.sum())
    r = min(channels, d)
    moment = (vectors * values) @ vectors.T
    curve, null = result.spectrum.curve_weighted, result.gaussian_spectrum.curve_mean
    return Reach(
        teacher=teacher,
        channels=channels,
        teacher_channels=d,
        pooled=float((_pooling(d, r) @ moment).diagonal().sum()) / total,
        shared=float(values[:r].sum()) / total,
        shared_with_bias=1 - _rest_when_centred(moment, pca.mean, r) / total,
        per_image=float(curve[min(r, len(curve)) - 1]),
        per_image_gaussian=float(null[min(r, len(null)) - 1]),
    )


def of_focus(reaches: Sequence[Reach], focus: Sequence[Layer]) -> Reach | None:
    """The limits on the teacher's layer in focus, whatever order the layers were asked for in."""
    return next((r for r in reaches if r.teacher in focus), None)


def _pooling(d: int, r: int) -> Tensor:
    """Orthogonal projector onto what is left of D channels by adaptive pooling to r."""
    rows = F.adaptive_avg_pool1d(torch.eye(d, dtype=torch.float64), r).T  # (r, D)
    projector: Tensor = rows.T @ torch.linalg.pinv(rows.T)
    return projector


def _rest_when_centred(moment: Tensor, mean: Tensor, r: int) -> float:
    """Energy beyond the mean token and the r leading axes about it."""
    around = torch.linalg.eigvalsh(moment - torch.outer(mean, mean)).clamp(min=0)
    return float(around[: len(around) - r].sum())
