"""Share of a teacher's energy that a narrower student can reproduce: limits of linear projectors.

The limits hold under squared error, for the energy of all images, token by token. They assume a
student that can put any values into its channels. They predict neither the result of training nor
an accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from featkd.diagnostics.layer_diagnostics import LayerResult
from featkd.diagnostics.source import Layer


@dataclass(frozen=True)
class StudentReach:
    """Limits of a student of r channels on one teacher layer, as shares of the layer's energy.

    Attributes:
        teacher: the layer.
        channels, teacher_channels: r, and the teacher's D.
        pooled: without a projector, against the teacher's map pooled to r channels.
        shared: with one linear projector, r to D, for all images: the r leading axes of the
            dataset PCA.
        shared_with_bias: the same with a bias, which holds the mean token. It bounds Lift, whose
            LayerNorm has a bias, and any projector that is removed after training.
        per_image: with one projector per image.
        per_image_gaussian: the same for Gaussian maps of this size.
    """

    teacher: Layer
    channels: int
    teacher_channels: int
    pooled: float
    shared: float
    shared_with_bias: float
    per_image: float
    per_image_gaussian: float


def student_reach(teacher: Layer, result: LayerResult, channels: int) -> StudentReach:
    """Computes the limits of a student of `channels` channels on a teacher layer.

    Args:
        teacher: the layer.
        result: its figures, with an uncentred PCA.
        channels: r.

    Raises:
        ValueError: the PCA is centred.
    """
    pca = result.pca
    if pca.centred:
        raise ValueError("result: expected an uncentred PCA, got a centred one")
    d = result.channels
    r = min(channels, d)
    values, vectors, mean = pca.eigenvalues, pca.vectors, pca.mean
    total = float(values.sum())
    moment = (vectors * values) @ vectors.T
    # orthogonal projector (D, D) onto the subspace that adaptive pooling to r channels keeps
    rows = F.adaptive_avg_pool1d(torch.eye(d, dtype=torch.float64), r).T  # (r, D)
    pooling = rows.T @ torch.linalg.pinv(rows.T)
    about_mean = torch.linalg.eigvalsh(moment - torch.outer(mean, mean)).clamp(min=0)  # ascending
    curve, null = result.spectrum.curve_weighted, result.gaussian_spectrum.curve_mean
    return StudentReach(
        teacher=teacher,
        channels=channels,
        teacher_channels=d,
        pooled=float((pooling @ moment).diagonal().sum()) / total,
        shared=float(values[:r].sum()) / total,
        shared_with_bias=1 - float(about_mean[: d - r].sum()) / total,
        per_image=float(curve[min(r, len(curve)) - 1]),
        per_image_gaussian=float(null[min(r, len(null)) - 1]),
    )
